"""`mtl compare`: configurations, seeds and a tuning grid trained as runs of their own, and put side by side."""
