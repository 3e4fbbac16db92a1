"""Real terminals: what a program prints on one."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@contextmanager
def terminal(columns: int) -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """A terminal's stream, and a function that closes it and returns what was printed (a few kB at most)."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115, PTH123  closed by `printed`

    def printed() -> str:
        stream.close()
        return _read(master).replace("\r\n", "\n")

    try:
        yield stream, printed
    finally:
        stream.close()
        os.close(master)


def run_in_terminal(columns: int, *arguments: str, **environment: str) -> tuple[int, str]:
    """Runs `mtl` in a terminal; its exit code, and everything that it printed there."""
    surroundings = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR", "TERM")}
    master, slave = pty.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        command = [sys.executable, "-m", "mtl", *arguments]
        env = {**surroundings, "TERM": "xterm", **environment}
        process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env)
        os.close(slave)
        said = _read(master)
        return process.wait(), said.replace("\r\n", "\n")
    finally:
        os.close(master)


def lines_of(printed: str) -> list[str]:
    """The lines as they are seen, also those that others were printed over."""
    return [line for line in re.split(r"[\r\n]", _CONTROL.sub("", printed)) if line.strip()]


def _read(master: int) -> str:
    """Everything that was written to a terminal whose other end is closed."""
    content = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            piece = b""
        if not piece:
            return content.decode()
        content += piece
