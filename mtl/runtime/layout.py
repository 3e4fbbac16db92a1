"""Lines and tables that fit a width; None stands for any width, and then nothing is wrapped or left out."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

_GAP = "  "
_INDENT = 4
# Text after a hanging indent has at least this many columns, however narrow the terminal.
_LEAST = 16


def wrap_fields(line: str, width: int | None) -> str:
    """Wraps a line of fields that two spaces separate, such as `loss 1.234  depth abs_rel 0.5`.

    No field is broken: one that is longer than the width stays so. Lines after the first are indented.
    """
    if width is None or len(line) <= width:
        return line
    fields = [f"{field}{_GAP}" for field in line.split(_GAP)]
    return f"\n{' ' * _INDENT}".join(_fill(fields, width, width - _INDENT))


def fit_fields(line: str, width: int) -> str:
    """As many whole fields of a line as fit, and `...` in place of the others."""
    if len(line) <= width:
        return line
    fields = line.split(_GAP)
    while fields and len(_GAP.join([*fields, "..."])) > width:
        fields.pop()
    return _GAP.join([*fields, "..."])


def wrap_text(text: str, width: int | None, indent: int) -> str:
    """Wraps prose after `,`, `;` or `:`, and between words only where a part is longer than a line.

    Args:
        text: One line, printed after an indent that is already there.
        width: Of a line with its indent.
        indent: Of the lines after the first.
    """
    if width is None or indent + len(text) <= width:
        return text
    room = max(_LEAST, width - indent)
    parts: list[str] = []
    for part in re.findall(r".+?(?:[,;:] +| {2,}|$)", text):
        parts += [part] if len(part.rstrip()) <= room else re.findall(r"\S+ *", part)
    return f"\n{' ' * indent}".join(_fill(parts, room, room))


def _fill(parts: Sequence[str], first: int, later: int) -> list[str]:
    """Puts parts, each with the space after it, into lines of at most a number of letters."""
    lines = [""]
    for part in parts:
        room = first if len(lines) == 1 else later
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > room:
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
    table is split into blocks, each with the key columns. Only a single word can be wider than the width.

    Args:
        header: The columns' titles.
        rows: Their cells.
        numbers: The columns that are aligned to the right, and whose cells are never wrapped.
        width: The longest line.
        keys: How many columns at the beginning say what a row is about.
    """
    columns = list(zip(header, *rows, strict=True))
    whole = [max(map(len, column)) for column in columns]
    if width is None or _total(whole) <= width:
        return _block(columns, whole, numbers)
    narrowest = [_narrowest(column, number in numbers) for number, column in enumerate(columns)]
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
        widths = _shrunk([whole[each] for each in shown], [narrowest[each] for each in shown], right, width)
        texts.append(_block([columns[each] for each in shown], widths, right))
    return "\n\n".join(texts)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _narrowest(column: Sequence[str], is_number: bool) -> int:
    """Letters that a column needs at least."""
    words = [*column[0].split(), *(column[1:] if is_number else [word for cell in column[1:] for word in cell.split()])]
    return max(map(len, words), default=0)


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
            [cell] if len(cell) <= width else [*_fill(re.findall(r"\S+ *", cell), width, width)]
            for cell, width in zip(cells, widths, strict=True)
        ]
        for place in range(max(map(len, wrapped))):
            texts = [cell[place] if place < len(cell) else "" for cell in wrapped]
            aligned = [
                text.rjust(width) if number in numbers else text.ljust(width)
                for number, (text, width) in enumerate(zip(texts, widths, strict=True))
            ]
            lines.append(_GAP.join(aligned).rstrip())
        if row == 0:
            lines.append(_GAP.join("-" * width for width in widths))
    return "\n".join(lines)
