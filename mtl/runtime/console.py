"""What the user sees: lines, tables, a progress bar. Everything goes through the logger `mtl`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Never, TextIO

from tqdm import tqdm

logger = logging.getLogger("mtl")


class OutputError(Exception):
    """Standard output does not take what a command has to say: it is closed, or its disk is full."""


def say(text: str) -> None:
    """Prints what a command was asked for.

    Raises:
        OutputError: Standard output does not take it.
    """
    try:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error
    flush_stdout()


def flush_stdout() -> None:
    """Prints what is still in the buffer of standard output.

    Raises:
        OutputError: Standard output does not take it.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


def tell(text: str) -> None:
    """Prints a line on standard error; where that is closed, nobody can be told."""
    try:
        sys.stderr.write(text if text.endswith("\n") else f"{text}\n")
        sys.stderr.flush()
    except OSError:
        drop(sys.stderr)


def drop(stream: TextIO) -> None:
    """Sends a standard stream nowhere from here on: Python would fail on what is left in it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _BesideTheBar(logging.Handler):
    """Prints records as plain lines above a progress bar that may be running."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            # Nothing of a run gets lost by it: its numbers are in its files.
            drop(sys.stdout)
            tell(f"standard output cannot be written ({error.strerror}): the run continues without it")


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
