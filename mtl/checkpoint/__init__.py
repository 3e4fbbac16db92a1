"""Checkpoints, anyone's files of tensors, and the files of a run: written whole, checked when read."""
