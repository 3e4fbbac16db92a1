"""The nearest valid choice to a word that is none."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def hint(word: str, choices: Iterable[str], most: int = 1, cutoff: float = 0.5) -> str:
    """`; nearest: ...` to put behind a message, or nothing if no choice is near."""
    near = get_close_matches(word, list(choices), n=most, cutoff=cutoff)
    return f"; nearest: {', '.join(near)}" if near else ""
