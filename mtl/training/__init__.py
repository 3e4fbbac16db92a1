"""One run: its phases, epochs and steps; its state, on disk and back; what it logs."""
