"""Balancing: the tasks' losses combined to one loss, or their gradients to one gradient."""
