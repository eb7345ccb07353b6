"""Which window comes next: integer credits, keyed permutations, mixers, phases and the weight log.

Nothing here knows a rank or imports torch: the order of the samples is a pure function of the seed, the domains'
content, the weight log and the global sample index.
"""
