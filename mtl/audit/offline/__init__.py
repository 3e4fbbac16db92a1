"""Proofs from files: a finished run, or two checkpoints."""
