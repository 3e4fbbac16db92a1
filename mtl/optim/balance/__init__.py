"""How the losses of the tasks become one loss, or their gradients one gradient."""
