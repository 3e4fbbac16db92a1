"""The process and its machine: files written whole, tensors in memory, console, signals, random numbers, plug-ins."""
