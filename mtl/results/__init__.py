"""What is done with a run: its report, its summary, and what a freeze pays."""
