"""What happens beside the steps: one file a hook, with its state and the line that registers it."""
