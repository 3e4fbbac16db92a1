"""The checks of one phase: its contract, frozen tensors, trainable tensors, optimizers and ranks."""
