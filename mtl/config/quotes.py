"""Text that YAML does not take without quotes, as patterns often are: told with the quotes that it wants."""

from __future__ import annotations

import re

# Each of them means something in YAML, at the begin of a word or inside a [list].
_SPECIAL = "*!@%&`|>[]{}"


def quote_hint(text: str, line: int, column: int) -> str:
    """`; text with * must be in quotes: "**.bias"` to put behind YAML's error at a place, or nothing.

    Args:
        text: What was to be read.
        line: Of the error, from 0.
        column: Likewise.
    """
    lines = text.splitlines()
    for word in re.finditer(r"[^\s,\"']+", lines[line]) if line < len(lines) else ():
        if word.start() <= column <= word.end() and (hint := quoted(_without_brackets(word[0]))):
            return hint
    # A tag takes the closing bracket of its list with it: the error comes at the end of the text.
    tag = re.search(r"^[^#\n]*?(?:^|[\s\[,])(![^\s,\"']+)", text, flags=re.MULTILINE)
    return quoted(_without_brackets(tag[1])) if tag else ""


def quoted(word: str) -> str:
    """`; text with * must be in quotes: "*.bias"`, or nothing if there is nothing special about it."""
    special = next((character for character in word if character in _SPECIAL), None)
    return "" if special is None else f'; text with {special} must be in quotes: "{word}"'


def _without_brackets(word: str) -> str:
    """A word without the brackets of the list or table that it stands in, and without the colon of a key."""
    word = word.lstrip("[{").rstrip(":")
    for opening, closing in ("[]", "{}"):
        while word.endswith((closing, f"{closing}]", f"{closing}}}")) and word.count(closing) > word.count(opening):
            word = word[: word.rindex(closing)] + word[word.rindex(closing) + 1 :]
    return word.rstrip(":")
