"""Lines and tables that fit a width; None stands for any width, and then nothing is wrapped or left out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence

_GAP = "  "
_INDENT = 4
# Text after a hanging indent has at least this many columns, however narrow the terminal.
_LEAST = 16
# After such a letter a word may be broken; not before a digit, so that no number is.
_BREAK = re.compile(r"(?<=\w[_.\-/])(?=[^\W\d_])")


def columns_of(text: str) -> int:
    """How many columns a terminal shows a text in: two for a letter of East Asian width, none for a combining mark."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) != 0 for letter in text)


def wrap_lines(text: str, width: int | None) -> str:
    """Wraps every line of a text that is wider than a width; its later lines are indented further than its first.

    A line is wrapped between fields, which two spaces separate, and after `,`, `;` or `:`; between words only where a
    part is longer than a line. No word is broken: a path is copied in one piece.
    """
    if width is None:
        return text
    return "\n".join(_wrap_line(line, width) for line in text.split("\n"))


def _wrap_line(line: str, width: int) -> str:
    if columns_of(line) <= width:
        return line
    text = line.lstrip(" ")
    own = len(line) - len(text)
    hanging = own + _INDENT
    return line[:own] + _wrap(text, max(_LEAST, width - own), max(_LEAST, width - hanging), hanging)


def fit_fields(line: str, width: int) -> str:
    """As many whole fields of a line as fit, and `...` in place of the others."""
    if columns_of(line) <= width:
        return line
    fields = line.split(_GAP)
    while fields and columns_of(_GAP.join([*fields, "..."])) > width:
        fields.pop()
    return _GAP.join([*fields, "..."])


def wrap_text(text: str, width: int | None, indent: int) -> str:
    """Wraps prose after `,`, `;` or `:`, and between words only where a part is longer than a line.

    Args:
        text: One line, printed after an indent that is already there.
        width: Of a line with its indent.
        indent: Of the lines after the first.
    """
    if width is None or indent + columns_of(text) <= width:
        return text
    room = max(_LEAST, width - indent)
    return _wrap(text, room, room, indent)


def _wrap(text: str, first: int, later: int, indent: int) -> str:
    """Wraps one line into a first one and later ones, which have room for a number of columns and an indent."""
    parts: list[str] = []
    for part in re.findall(r".+?(?:[,;:] +| {2,}|$)", text):
        parts += [part] if columns_of(part.rstrip()) <= later else re.findall(r"\S+ *", part)
    return f"\n{' ' * indent}".join(_fill(parts, first, later))


def _fill(parts: Sequence[str], first: int, later: int) -> list[str]:
    """Puts parts, each with the space after it, into lines of at most a number of columns."""
    lines = [""]
    for part in parts:
        room = first if len(lines) == 1 else later
        if lines[-1] and columns_of(lines[-1]) + columns_of(part.rstrip()) > room:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines]


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Collection[int] = (),
    width: int | None = None,
    keys: int = 1,
) -> str:
    """Aligned columns.

    Where they are too wide, cells of text and the header are wrapped between words; where that is not enough, the
    table is split into blocks, each with the key columns; where a block of one column is still too wide, words are
    broken after `_`, `-`, `.` and `/`.

    Args:
        header: The columns' titles.
        rows: Their cells.
        numbers: The columns that are aligned to the right, and whose cells are never wrapped.
        width: The longest line.
        keys: How many columns at the beginning say what a row is about.
    """
    columns = list(zip(header, *rows, strict=True))
    whole = [max(map(columns_of, column)) for column in columns]
    if width is None or _total(whole) <= width:
        return _block(columns, whole, numbers)
    narrowest = [_narrowest(column, number in numbers, _words) for number, column in enumerate(columns)]
    broken = [_narrowest(column, number in numbers, _pieces) for number, column in enumerate(columns)]
    blocks: list[list[int]] = [[]]
    for number in range(keys, len(columns)):
        shown = [*range(keys), *blocks[-1], number]
        if blocks[-1] and _total([narrowest[each] for each in shown]) > width:
            blocks.append([])
        blocks[-1].append(number)
    texts = []
    for block in blocks:
        shown = [*range(keys), *block]
        right = [place for place, each in enumerate(shown) if each in numbers]
        widths = [whole[each] for each in shown]
        for least in (narrowest, broken):
            widths = _shrunk(widths, [least[each] for each in shown], right, width)
        texts.append(_block([columns[each] for each in shown], widths, right))
    return "\n\n".join(texts)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _words(cell: str) -> list[str]:
    """The words of a cell, each with the space after it."""
    return re.findall(r"\S+ *", cell)


def _pieces(cell: str) -> list[str]:
    """The parts of a cell's words, broken wherever they may be."""
    return [piece for word in _words(cell) for piece in _BREAK.split(word)]


def _narrowest(column: Sequence[str], is_number: bool, parts: Callable[[str], list[str]]) -> int:
    """Columns that a column of a table needs at least, if its cells are wrapped between parts."""
    words = [*parts(column[0]), *(column[1:] if is_number else [part for cell in column[1:] for part in parts(cell)])]
    return max((columns_of(word.rstrip()) for word in words), default=0)


def _shrunk(widths: Sequence[int], narrowest: Sequence[int], numbers: Collection[int], width: int) -> list[int]:
    """Takes from the widest columns until all fit, or none can give more; from titles over numbers first."""
    shrunk = list(widths)
    while _total(shrunk) > width:
        wider = [number for number, each in enumerate(shrunk) if each > narrowest[number]]
        if not wider:
            break
        shrunk[max(wider, key=lambda number: (number in numbers, shrunk[number]))] -= 1
    return shrunk


def _block(columns: Sequence[Sequence[str]], widths: Sequence[int], numbers: Collection[int]) -> str:
    lines: list[str] = []
    for row, cells in enumerate(zip(*columns, strict=True)):
        wrapped = [
            [cell] if columns_of(cell) <= width else _fill(_parts_within(cell, width), width, width)
            for cell, width in zip(cells, widths, strict=True)
        ]
        for place in range(max(map(len, wrapped))):
            texts = [cell[place] if place < len(cell) else "" for cell in wrapped]
            aligned = [
                _padding(text, width) + text if number in numbers else text + _padding(text, width)
                for number, (text, width) in enumerate(zip(texts, widths, strict=True))
            ]
            lines.append(_GAP.join(aligned).rstrip())
        if row == 0:
            lines.append(_GAP.join("-" * width for width in widths))
    return "\n".join(lines)


def _parts_within(cell: str, width: int) -> list[str]:
    """The words of a cell, broken where they are wider than a width."""
    words = [[word] if columns_of(word.rstrip()) <= width else _BREAK.split(word) for word in _words(cell)]
    return [part for parts in words for part in parts]


def _padding(text: str, width: int) -> str:
    return " " * (width - columns_of(text))
