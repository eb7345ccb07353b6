"""Per-domain held-out losses, and what they say about learning and forgetting."""
