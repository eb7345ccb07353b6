"""Checkpoints: visible only when whole, verified before they are used, pruned after a newer one is whole."""
