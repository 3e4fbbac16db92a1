"""What the user sees: lines, tables, a progress bar. Everything goes through the logger `mtl`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Never

from tqdm import tqdm

logger = logging.getLogger("mtl")


class _BesideTheBar(logging.Handler):
    """Prints records as plain lines above a progress bar that may be running."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def first_line(error: Exception) -> str:
    """What another library's error says, without the rest of its page."""
    return (str(error) or type(error).__name__).splitlines()[0]


def show_log(quiet: bool, only_errors: bool = False) -> None:
    """Shows the logger's lines on standard output; if quiet, only warnings; or only errors."""
    logger.handlers = [_BesideTheBar()]
    logger.setLevel(logging.ERROR if only_errors else logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 1) -> str:
    """Aligned columns, the first ones to the left, those from `numbers_from` on to the right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < numbers_from else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def progress_bar(total_images: int, title: str, quiet: bool) -> tqdm[Never]:
    """A bar over the images of one epoch; it disappears when it is done, and is not shown in a file or pipe."""
    return tqdm(
        total=total_images,
        desc=title,
        unit="img",
        leave=False,
        disable=quiet or None,
        dynamic_ncols=True,
        mininterval=0.5,
    )
