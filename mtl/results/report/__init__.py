"""The report of a run, or of several next to each other: one HTML file."""
