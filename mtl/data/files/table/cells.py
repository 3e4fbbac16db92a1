"""The language of a table's cells: class names and numbers, tags, lists of numbers, points.

`;` separates the entries of a list; an entry that is empty or `?` is missing. An empty cell is no label and is not
parsed.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mtl.runtime.text import count
from mtl.tasks.base import LabelKind

# As many as a task may have classes.
MOST_CLASSES = 2**20

_LARGEST = 3.4028234663852886e38  # of float32
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"-?\d+(\.0*)?", re.ASCII)
_MISSING = ("", "?")
_MOST_QUOTED = 60

Value = float | list[float] | list[list[float]]


class CellError(ValueError):
    """A cell that cannot be parsed.

    Attributes:
        word: The part of it that is wrong, for the nearest valid choice.
    """

    def __init__(self, message: str, word: str = "") -> None:
        super().__init__(message)
        self.word = word


class Language(ABC):
    """How the cells of one label are parsed, once the training cells are known.

    Attributes:
        classes: The names of the classes or tags; none of numbers and points.
    """

    classes: tuple[str, ...]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """That of a label."""

    @abstractmethod
    def parse(self, cell: str) -> Value:
        """A label: NaN where an entry is missing, 0 for a missing point.

        Args:
            cell: Not empty, without spaces around it.

        Raises:
            CellError: The cell is not of this language.
        """

    def parse_all(self, cells: Sequence[str]) -> list[float] | None:  # noqa: ARG002  most have no faster way
        """The labels of many cells, NaN for empty ones; None if each has to be parsed."""
        return None


def language_of(kind: LabelKind, cells: Iterable[str]) -> Language:
    """The language of a label.

    Args:
        kind: `class`, `tags`, `numbers` or `points`.
        cells: The cells of the training split, at least one, none of them empty.

    Raises:
        CellError: The first cell is of no language, or there are too many classes.
    """
    if kind in ("numbers", "points"):
        num = len(entries(next(iter(cells))))
        return NumberList(num) if kind == "numbers" else PointList(num)
    cells = list(dict.fromkeys(cells))
    if kind == "class":
        return ClassNumbers.of(cells) if all(map(_WHOLE.fullmatch, cells)) else ClassNames.of(cells)
    is_numbers = all(entry in ("0", "1", *_MISSING) for cell in cells for entry in entries(cell))
    return TagNumbers(_numbered(len(entries(cells[0])))) if is_numbers else TagNames.of(cells)


@dataclass(frozen=True)
class ClassNumbers(Language):
    """Class numbers from 0; -1 is no label.

    Attributes:
        seen: Those of the training split.
    """

    classes: tuple[str, ...]
    seen: frozenset[int]

    @classmethod
    def of(cls, cells: Iterable[str]) -> ClassNumbers:
        seen = frozenset(number for cell in cells if (number := class_number(cell)) >= 0)
        return cls(_numbered(max(seen, default=-1) + 1), seen)

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def parse(self, cell: str) -> float:
        number = class_number(cell)
        if number >= 0 and number not in self.seen:
            raise CellError(f"class {number} is never seen in training")
        return float(number) if number >= 0 else math.nan


@dataclass(frozen=True)
class ClassNames(Language):
    """Class names, numbered in alphabetical order."""

    classes: tuple[str, ...]
    number: dict[str, int]

    @classmethod
    def of(cls, cells: Iterable[str]) -> ClassNames:
        names = sorted(cells)
        return cls(tuple(names), {name: number for number, name in enumerate(names)})

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def parse(self, cell: str) -> float:
        if (number := self.number.get(cell)) is None:
            raise CellError(f"class {_quoted(cell)} is never seen in training", cell)
        return float(number)


@dataclass(frozen=True)
class TagNames(Language):
    """The names of the tags that an image has, numbered in alphabetical order: `a;b`, or `;` for none."""

    classes: tuple[str, ...]
    number: dict[str, int]

    @classmethod
    def of(cls, cells: Iterable[str]) -> TagNames:
        names = sorted({name for cell in cells for name in entries(cell) if name})
        return cls(tuple(names), {name: number for number, name in enumerate(names)})

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.classes),)

    def parse(self, cell: str) -> list[float]:
        has = [0.0] * len(self.classes)
        for name in entries(cell):
            if name and name not in self.number:
                raise CellError(f"tag {_quoted(name)} is never seen in training", name)
            if name:
                has[self.number[name]] = 1.0
        return has


@dataclass(frozen=True)
class TagNumbers(Language):
    """1 or 0 for each tag: `1;0;?`."""

    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.classes),)

    def parse(self, cell: str) -> list[float]:
        values = _of_number(entries(cell), len(self.classes), "number")
        if wrong := [entry for entry in values if entry not in ("0", "1", *_MISSING)]:
            raise CellError(f"expected 0, 1 or ?, got {_quoted(wrong[0])}")
        return [math.nan if entry in _MISSING else float(entry) for entry in values]


@dataclass(frozen=True)
class NumberList(Language):
    """A number, or a list of them: `1.5`, `1.5;2;?`."""

    num: int
    classes = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.num == 1 else (self.num,)

    def parse(self, cell: str) -> float | list[float]:
        if self.num == 1:
            return _number(cell)
        return [_number(entry) for entry in _of_number(entries(cell), self.num, "number")]

    def parse_all(self, cells: Sequence[str]) -> list[float] | None:
        if self.num > 1 or not set("".join(cells)) <= set("0123456789.+-eE"):
            return None
        try:
            numbers = [float(cell) if cell else math.nan for cell in cells]
        except ValueError:
            return None
        return numbers if all(-_LARGEST <= number <= _LARGEST or number != number for number in numbers) else None


@dataclass(frozen=True)
class PointList(Language):
    """Column, row and visibility of each point: `x,y,v;x,y,v`; a missing one is 0, 0, 0."""

    num: int
    classes = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num, 3)

    def parse(self, cell: str) -> list[list[float]]:
        return [_point(entry) for entry in _of_number(entries(cell), self.num, "point")]


def entries(cell: str) -> list[str]:
    """The entries of a list."""
    return [entry.strip() for entry in cell.split(";")]


def _numbered(num: int) -> tuple[str, ...]:
    return tuple(map(str, range(num)))


def _of_number(found: list[str], num: int, what: str) -> list[str]:
    if len(found) != num:
        raise CellError(f"expected {count(num, what)} as in the first labelled row of training, got {len(found)}")
    return found


def class_number(cell: str) -> int:
    """A class number, or -1 for none; raises `CellError` if it is neither."""
    if not _WHOLE.fullmatch(cell):
        raise CellError(f"expected a class number as in training, got {_quoted(cell)}")
    whole = cell.partition(".")[0]
    number = int(whole) if len(whole) < 20 else MOST_CLASSES
    if not -1 <= number < MOST_CLASSES:
        raise CellError(f"expected a class number from 0 to {MOST_CLASSES - 1}, or -1 for none, got {_quoted(cell)}")
    return number


def _number(entry: str) -> float:
    if entry in _MISSING or entry.lower() == "nan":
        return math.nan
    if not _NUMBER.fullmatch(entry):
        raise CellError(f"expected a number, got {_quoted(entry)}")
    number = float(entry)
    if abs(number) > _LARGEST:
        raise CellError(f"expected a number of 32 bits, got {_quoted(entry)}")
    return number


def _point(entry: str) -> list[float]:
    if entry in _MISSING:
        return [0.0, 0.0, 0.0]
    point = [_number(part.strip()) for part in entry.split(",")]
    if len(point) != 3 or any(map(math.isnan, point)) or point[2] not in (0, 1, 2):
        raise CellError(f"expected x,y,v with v 0, 1 or 2, got {_quoted(entry)}")
    return point


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _MOST_QUOTED else f"{text[:_MOST_QUOTED]}...")
