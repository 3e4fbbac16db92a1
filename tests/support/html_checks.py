"""What every page has to hold to: balanced elements, headings in order, texts for pictures, headers with scope."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_VOID = {"br", "img", "link", "meta"}


class Outline(HTMLParser):
    """Reads a page, and notes what is wrong with it.

    Attributes:
        mistakes: In words.
        headings: Levels and texts.
        cells: The texts of each row of each table.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.mistakes: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self.cells: list[list[str]] = []
        self._open: list[str] = []
        self._ids: set[str] = set()
        self._links: list[str] = []
        self._texts: list[str] = []
        self._titled: list[bool] = []
        self.feed(page)
        self.close()
        self._finish()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in _VOID:
            self._open.append(tag)
        if (own := values.get("id")) is not None:
            if own in self._ids:
                self.mistakes.append(f"id {own} twice")
            self._ids.add(own)
        match tag:
            case "html" if values.get("lang") != "en":
                self.mistakes.append("no language")
            case "img" if not values.get("alt"):
                self.mistakes.append("an image without a text")
            case "svg":
                self._titled.append(False)
                if values.get("role") != "img":
                    self.mistakes.append("a drawing without a role")
            case "title" if self._titled and self._open[-2] == "svg":
                self._titled[-1] = True
            case "th" if values.get("scope") not in ("row", "col"):
                self.mistakes.append("a header without scope")
            case "tr":
                self.cells.append([])
            case "a":
                self._links.append(values.get("href") or "")
        if tag in ("th", "td") or re.fullmatch("h[1-6]", tag):
            self._texts.append("")
        for name in ("src", "href", "srcset", "action", "data"):
            if re.match(r"(https?:)?//", values.get(name) or "") and tag != "a":
                self.mistakes.append(f"{tag} asks for {values[name]}")

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.mistakes.append(f"{tag} is closed, and not open")
        if tag == "svg" and not self._titled.pop():
            self.mistakes.append("a drawing without a title")
        if tag in ("th", "td"):
            self.cells[-1].append(" ".join(self._texts.pop().split()))
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), self._texts.pop()))

    def handle_data(self, data: str) -> None:
        self._texts = [text + data for text in self._texts]

    def _finish(self) -> None:
        if self._open:
            self.mistakes.append(f"not closed: {self._open}")
        levels = [level for level, _ in self.headings]
        if levels.count(1) != 1 or levels[0] != 1:
            self.mistakes.append("expected one heading of the first level, and that first")
        self.mistakes += [
            f"heading {text!r} of level {level} follows level {before}"
            for before, (level, text) in zip(levels, self.headings[1:], strict=False)
            if level > before + 1
        ]
        inner = [link[1:] for link in self._links if link.startswith("#")]
        self.mistakes += [f"#{link} leads nowhere" for link in inner if link not in self._ids]

    def row(self, *start: str) -> list[str]:
        """The only row that begins with these cells."""
        (found,) = (cells for cells in self.cells if cells[: len(start)] == list(start))
        return found
