"""The training loop, its hooks, and the assembly of a stage."""
