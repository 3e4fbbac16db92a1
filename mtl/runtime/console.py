"""What the user sees: lines, a log, a progress bar, as wide and as coloured as the stream they go to.

Everything that a run logs goes through the logger `mtl`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from mtl.runtime.layout import columns_of, fit_fields, wrap_lines

if TYPE_CHECKING:
    from typing import Never

    _Tqdm = tqdm[Never]
else:
    _Tqdm = tqdm

logger = logging.getLogger("mtl")
_PACKAGE = Path(__file__).parents[1]


class OutputError(Exception):
    """Standard output cannot be written: it is closed, or its disk is full."""


# --- streams


def line_width(stream: TextIO) -> int | None:
    """How many columns a line has; None if lines stay whole.

    The environment variable COLUMNS decides for any stream; without it a terminal has the width that it reports, or 80
    if it reports none. Lines in a file or a pipe stay whole: programs read them line by line.
    """
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def has_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours, and the user wants them (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# Also as argparse begins a line.
_PREFIX = re.compile(r"^(?:mtl[ \w]*: )?(warning|error):", re.MULTILINE)
_COLOURS = {"warning": "\x1b[33m", "error": "\x1b[31m"}
_NO_COLOUR = "\x1b[0m"


def paint(text: str, stream: TextIO) -> str:
    """Colours `warning:` and `error:` at the beginning of a line, if the stream shows colours."""
    if not has_colour(stream):
        return text
    return _PREFIX.sub(lambda found: f"{_COLOURS[found[1]]}{found[0]}{_NO_COLOUR}", text)


def print_lines(text: str) -> None:
    """Prints what a command was asked for as lines for a reader, wrapped to the width of the terminal.

    Raises:
        OutputError: Standard output cannot be written.
    """
    print_out(wrap_lines(text, line_width(sys.stdout)))


def print_out(text: str) -> None:
    """Prints what a command was asked for as it is, such as JSON, YAML or a path.

    Raises:
        OutputError: Standard output cannot be written.
    """
    try:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error
    flush_stdout()


def flush_stdout() -> None:
    """Writes what is still in the buffer of standard output.

    Raises:
        OutputError: Standard output cannot be written.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


def print_err(text: str) -> None:
    """Prints a message on standard error, wrapped to the width of the terminal; nothing if that is closed."""
    text = wrap_lines(text, line_width(sys.stderr))
    try:
        sys.stderr.write(paint(text if text.endswith("\n") else f"{text}\n", sys.stderr))
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Redirects a standard stream to nowhere: what is left in its buffer would fail when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def first_line(error: Exception) -> str:
    """The first line of another library's error, which may fill a page."""
    return (str(error) or type(error).__name__).splitlines()[0]


# --- the log


class _LogHandler(logging.Handler):
    """Prints records on standard output, above a progress bar that may be running.

    A warning begins with `warning: `, an error with `error: `. Lines are wrapped to the width of the terminal.
    """

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"{'error' if record.levelno >= logging.ERROR else 'warning'}: {text}"
        try:
            tqdm.write(paint(wrap_lines(text, line_width(sys.stdout)), sys.stdout), file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            # Nothing of a run is lost: its numbers are in its files.
            discard(sys.stdout)
            print_err(f"warning: standard output cannot be written ({error.strerror}): the run continues without it")


def show_log(quiet: bool, only_errors: bool = False) -> None:
    """Prints the log, and Python's warnings as warnings of it, on standard output.

    Args:
        quiet: Only warnings and errors.
        only_errors: Only errors, such as on all ranks but one.
    """
    logger.handlers = [_LogHandler()]
    logger.setLevel(logging.ERROR if only_errors else logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    warnings.showwarning = _log_warning


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    """Logs a warning: the audit's as it is, another library's with its place."""
    is_ours = category is UserWarning and Path(filename).is_relative_to(_PACKAGE)
    logger.warning(f"{message}" if is_ours else f"{message} ({category.__name__}, {filename}:{lineno})")


# --- the bar

# From the longest to the shortest: the first one is shown that leaves room for all losses.
_METERS = (
    "{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt}, {remaining} left, {rate_noinv_fmt}{postfix}",
    "{desc} {percentage:3.0f}%, {remaining} left, {rate_noinv_fmt}{postfix}",
    "{desc} {percentage:3.0f}%, {remaining} left{postfix}",
    "{desc} {percentage:3.0f}%{postfix}",
    "{percentage:.0f}%{postfix}",
)


class _Bar(_Tqdm):
    """A bar whose postfix is a line of fields; where the terminal is narrow, the fields come first."""

    @property
    def format_dict(self) -> Any:
        """The values that tqdm draws the bar from."""
        meter = super().format_dict
        width = None if self.disable else line_width(self.fp)
        if width is None:
            return meter
        # A line as long as the terminal is wide would be wrapped by some.
        return {**meter, "ncols": None, **_meter(meter, width - 1)}


def _meter(meter: Mapping[str, Any], width: int) -> dict[str, str]:
    """The form of a bar that fits, and as many of its fields as fit."""
    fields, room = meter["postfix"] or "", 0
    for form in _METERS:
        bare = tqdm.format_meter(**{**meter, "ncols": None, "bar_format": form, "postfix": ""})
        # tqdm puts a comma before them.
        room = width - columns_of(bare) - 2
        if columns_of(fields) <= room:
            break
    return {"bar_format": form, "postfix": fit_fields(fields, room)}


def progress_bar(total_images: int, title: str, quiet: bool) -> tqdm[Never]:
    """A bar over the images of one epoch; it disappears when it is done, and is not shown in a file or pipe."""
    return _Bar(total=total_images, desc=title, unit=" img", leave=False, disable=quiet or None, mininterval=0.5)
