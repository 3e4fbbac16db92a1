"""Optimizers and their state, learning-rate schedules, moving averages of weights, and loss balancing."""
