"""The report of a run, or of several next to each other: one HTML file."""

from mtl.results.report.write import write_report

__all__ = ["write_report"]
