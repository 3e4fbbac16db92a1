"""HTML from Python: text is escaped, whatever it holds, unless it is markup already."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape


class Html(str):
    """Markup, which is not escaped again."""

    __slots__ = ()


# What may stand inside an element; None is left out.
Piece = Html | str | int | None
# Stands for a number that is not there.
DASH = "\u2013"
_VOID = frozenset({"br", "img", "link", "meta"})


def tag(name: str, /, *pieces: Piece, **attributes: str | float | None) -> Html:
    """An element.

    Args:
        name: Of the element.
        pieces: What is in it.
        attributes: An underscore at the end is dropped, others become hyphens: `class_`, `aria_label`. None is left
            out, and floats have six digits.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{value:g}" if isinstance(value, float) else str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>" if name in _VOID else f"<{name}{written}>{joined(pieces)}</{name}>")


def joined(pieces: Iterable[Piece]) -> Html:
    """Pieces one after the other."""
    return Html(
        "".join(piece if isinstance(piece, Html) else escape(str(piece)) for piece in pieces if piece is not None)
    )


def separated(pieces: Sequence[Piece], by: Piece) -> Html:
    """Pieces with something between every two of them."""
    return joined(each for number, piece in enumerate(pieces) for each in ([by, piece] if number else [piece]))


def hidden(text: str) -> Html:
    """Text for screen readers only."""
    return tag("span", text, class_="sr")


def code(text: str) -> Html:
    return tag("code", text)


def table(
    caption: str, header: Sequence[Piece], rows: Iterable[Sequence[Piece]], keys: int = 1, class_: str | None = None
) -> Html:
    """A table in a box of its own, which scrolls where the table is wider than the page.

    Args:
        caption: What it shows; for screen readers, since a heading says it above.
        header: The titles of its columns.
        rows: Its cells; one that is a `td` or `th` already stays as it is.
        keys: How many of the first columns name the row: they are its headers, and aligned to the left.
        class_: Of the table.
    """
    titles = [
        title if _is_cell(title) else tag("th", title, scope="col", class_=None if at < keys else "num")
        for at, title in enumerate(header)
    ]
    body = [
        tag("tr", *(tag("th", cell, scope="row") if at < keys else _cell(cell) for at, cell in enumerate(row)))
        for row in rows
    ]
    inner = tag("table", tag("caption", caption), tag("thead", tag("tr", *titles)), tag("tbody", *body), class_=class_)
    return scrolling(inner, caption)


def scrolling(inner: Html, label: str) -> Html:
    """A box that scrolls sideways, by keyboard too."""
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label)


def _cell(cell: Piece) -> Html:
    return cell if isinstance(cell, Html) and _is_cell(cell) else tag("td", cell, class_="num")


def _is_cell(piece: Piece) -> bool:
    return isinstance(piece, Html) and piece.startswith(("<td", "<th"))


def left_title(text: str) -> Html:
    """The title of a column of words."""
    return tag("th", text, scope="col")


def text_cell(*pieces: Piece) -> Html:
    """A cell of words, aligned to the left."""
    return tag("td", *pieces, class_="words")


def definitions(pairs: Mapping[str, Piece]) -> Html:
    """Names and what they stand for."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", piece)) for name, piece in pairs.items()))


def number(value: float | None) -> str:
    """A measured number in some four digits; a dash for none, or one that is not finite."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.4g}"


def signed(value: float, digits: int) -> str:
    """A number with `digits` digits after the point, and no minus before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def seconds(value: float | None) -> str:
    """A duration in the unit that fits."""
    if value is None or not math.isfinite(value):
        return DASH
    if abs(value) < 120:
        return f"{value:.1f} s" if abs(value) < 10 else f"{value:.0f} s"
    return f"{value / 60:.1f} min" if abs(value) < 7200 else f"{value / 3600:.1f} h"
