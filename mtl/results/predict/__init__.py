"""Predictions of a trained model: for images in memory, and from files to files."""
