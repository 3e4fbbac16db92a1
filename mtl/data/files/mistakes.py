"""Mistakes in files of data, collected, and reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mtl.data.cache import DataError
from mtl.runtime.text import count, hint

MOST_SHOWN = 20


class LabelError(DataError):
    """Mistakes of which some are about labels that the data set does not have, or not of the kind that a task learns.

    Attributes:
        lines: Each with the label that it is about; None if it is about something else.
    """

    def __init__(self, lines: Sequence[tuple[str | None, str]]) -> None:
        super().__init__("\n".join(line for _, line in lines))
        self.lines = tuple(lines)


class Mistakes:
    """One line for each mistake; the first ones are kept, the others counted."""

    def __init__(self) -> None:
        self._lines: list[tuple[str | None, str]] = []
        self._number = 0

    def __len__(self) -> int:
        return self._number

    @property
    def is_full(self) -> bool:
        """Whether further mistakes are only counted."""
        return len(self._lines) == MOST_SHOWN

    def add(self, line: str, word: str = "", choices: Iterable[str] = (), label: str | None = None) -> None:
        """Notes a mistake.

        Args:
            line: File and row, what was expected, what came.
            word: What came, if there are choices.
            choices: What it could have been; the nearest is named.
            label: The label that tasks learn and the data set does not have.
        """
        self._number += 1
        if not self.is_full:
            self._lines.append((label, line + (hint(word, choices) if word else "")))

    def check(self) -> None:
        """Raises `DataError` if there was a mistake; `LabelError` if one of them is about a label."""
        if any(label is not None for label, _ in self._lines):
            raise LabelError([*self._lines, *((None, line) for line in self._others())])
        if self._lines:
            raise DataError(str(self))

    def __str__(self) -> str:
        """The lines that were kept, and how many more there are."""
        return "\n".join([*(line for _, line in self._lines), *self._others()])

    def _others(self) -> list[str]:
        more = self._number - len(self._lines)
        return [f"and {count(more, 'more mistake')}"] if more else []
