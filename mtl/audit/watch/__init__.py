"""What the audit looks at in a phase: the contract, frozen tensors, trainable tensors, optimizers, ranks."""
