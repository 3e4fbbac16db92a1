"""Errors of an export that are no mistake in the user's input."""

from __future__ import annotations


class ExportError(Exception):
    """A model that cannot be exported, or whose file does not compute the same; one line."""
