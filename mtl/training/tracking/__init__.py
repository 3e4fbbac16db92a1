"""What a run logs: metrics.jsonl, wandb, the console."""
