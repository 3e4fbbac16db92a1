"""What lies on disk, proven whole: checkpoints, anyone's files of tensors, and the files of a run."""
