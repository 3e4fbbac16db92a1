"""What changes weights: optimizers and their state, learning-rate schedules, averages, balanced losses."""
