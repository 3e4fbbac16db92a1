"""The process and its machine: files, tensors in memory, console, signals, random numbers, plug-ins."""
