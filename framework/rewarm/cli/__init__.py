"""The command line: one module a verb. Nothing here imports torch before a verb runs."""
