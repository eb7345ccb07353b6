"""The mixers, one file each: its settings, its rule with the source, its state, and the line that registers it."""
