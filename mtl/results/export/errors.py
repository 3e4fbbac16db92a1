"""What can go wrong in an export through no mistake of the user's input."""

from __future__ import annotations


class ExportError(Exception):
    """A model that cannot be exported, or whose file does not compute the same; one line."""
