"""Hints for text that YAML accepts only in quotes, as many patterns are."""

from __future__ import annotations

import re

# Each has a meaning in YAML, at the start of a word or inside a [list].
_SPECIAL = "*!@%&`|>[]{}"


def quote_hint(text: str, line: int, column: int) -> str:
    """`; text with * must be in quotes: "**.bias"` to append to YAML's error, or nothing.

    Args:
        text: The text with the error.
        line: The error's line, from 0.
        column: The error's column, from 0.
    """
    lines = text.splitlines()
    for word in re.finditer(r"[^\s,\"']+", lines[line]) if line < len(lines) else ():
        if word.start() <= column <= word.end() and (hint := quoted(_without_brackets(word[0]))):
            return hint
    # A tag takes the closing bracket of its list with it: the error comes at the end of the text.
    tag = re.search(r"^[^#\n]*?(?:^|[\s\[,])(![^\s,\"']+)", text, flags=re.MULTILINE)
    return quoted(_without_brackets(tag[1])) if tag else ""


def quoted(word: str) -> str:
    """`; text with * must be in quotes: "*.bias"`, or nothing if the word has no special character."""
    special = next((character for character in word if character in _SPECIAL), None)
    return "" if special is None else f'; text with {special} must be in quotes: "{word}"'


def _without_brackets(word: str) -> str:
    """A word without the brackets of the list or table around it, and without the colon of a key."""
    word = word.lstrip("[{").rstrip(":")
    for opening, closing in ("[]", "{}"):
        while word.endswith((closing, f"{closing}]", f"{closing}}}")) and word.count(closing) > word.count(opening):
            word = word[: word.rindex(closing)] + word[word.rindex(closing) + 1 :]
    return word.rstrip(":")
