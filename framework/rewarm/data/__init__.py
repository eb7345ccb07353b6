"""Text to tokens, tokens to windows: token files, domains, and the corpora of ``rewarm data demo``."""
