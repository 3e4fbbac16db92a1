"""Data sets that are made from the embedded garments."""
