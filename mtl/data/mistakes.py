"""Mistakes in files of data, collected, and reported at once."""

from __future__ import annotations

from collections.abc import Iterable

from mtl.data.cache import DataError
from mtl.runtime.text import count, hint

MOST_SHOWN = 20


class Mistakes:
    """One line for each mistake; the first ones are kept, the others counted."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._number = 0

    def __len__(self) -> int:
        return self._number

    @property
    def is_full(self) -> bool:
        """Whether further mistakes are only counted."""
        return len(self._lines) == MOST_SHOWN

    def add(self, line: str, word: str = "", choices: Iterable[str] = ()) -> None:
        """Notes a mistake.

        Args:
            line: File and row, what was expected, what came.
            word: What came, if there are choices.
            choices: What it could have been; the nearest is named.
        """
        self._number += 1
        if not self.is_full:
            self._lines.append(line + (hint(word, choices) if word else ""))

    def check(self) -> None:
        """Raises `DataError` if there was a mistake."""
        if self._lines:
            raise DataError(str(self))

    def __str__(self) -> str:
        """The lines that were kept, and how many more there are."""
        more = self._number - len(self._lines)
        return "\n".join([*self._lines, *([f"and {count(more, 'more mistake')}"] if more else [])])
