"""The compiled kernels of ``csrc`` and what calls them: their loader, and the update rule that runs on every device."""
