"""What a run records while it trains: console, metrics.jsonl, evaluation.jsonl, wandb, tensorboard."""
