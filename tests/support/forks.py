"""Starts programs in forks of a process that has imported everything: as `subprocess`, without the seconds of imports.

For tests of what a program does; what happens in its imports, or before them, needs a Python of its own.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
# The server of a program that a shell starts: that of the process which has started the shell.
VARIABLE = "MTL_TEST_FORKS"


@cache
def server() -> Path:
    """The socket of this process's server, which is started with the first program and ends with this process."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    place = Path(tempfile.mkdtemp(prefix="forks-")) / "socket"
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert process.stdin is not None and process.stdout is not None
    atexit.register(_end, process, place)
    assert process.stdout.readline() == b"ready\n", "the server of forks did not start"
    return place


def _end(process: subprocess.Popen[bytes], place: Path) -> None:
    process.communicate()
    place.unlink(missing_ok=True)
    place.parent.rmdir()


class Forked:
    """A program in a fork, used as a `subprocess.Popen`.

    Args:
        arguments: Those of `python`: -c CODE, -m MODULE or FILE, and what follows.
        stdout: A file or descriptor, or None for that of this process.
        stderr: As `stdout`.
        env: All its environment variables; this process's if None.
        cwd: Where it runs; here if None.
        new_session: Whether it leads a session of its own.
        server: The socket of another server than this process's.
    """

    stdout: IO[str] | None = None
    stderr: IO[str] | None = None

    def __init__(
        self,
        arguments: Sequence[str],
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        new_session: bool = False,
        server: Path | None = None,
    ) -> None:
        self.args, self.returncode = arguments, None
        self._said = b""
        self._connection = socket.socket(socket.AF_UNIX)
        asked = {
            "arguments": [*arguments],
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "new_session": new_session,
        }
        opened = [os.open(os.devnull, os.O_RDONLY)]
        try:
            streams = [opened[0]]
            for name, number, stream in (("stdout", 1, stdout), ("stderr", 2, stderr)):
                if stream == subprocess.STDOUT:
                    streams.append(streams[1])
                elif stream == subprocess.PIPE:
                    reads, writes = os.pipe()
                    setattr(self, name, open(reads, encoding="utf-8"))  # noqa: PTH123, SIM115
                    opened.append(writes)
                    streams.append(writes)
                else:
                    streams.append(number if stream is None else stream if isinstance(stream, int) else stream.fileno())
            self._connection.connect(str(server or globals()["server"]()))
            socket.send_fds(self._connection, [json.dumps(asked).encode()], streams)
        finally:
            for descriptor in opened:
                os.close(descriptor)
        self.pid = int(self._line(None) or 0)

    def _line(self, timeout: float | None) -> str | None:
        """The server's next answer; None if it does not come in time."""
        self._connection.settimeout(timeout)
        while b"\n" not in self._said:
            try:
                received = self._connection.recv(100)
            except (TimeoutError, BlockingIOError):
                return None
            if not received:
                raise ConnectionError("the server of forks has ended")
            self._said += received
        line, self._said = self._said.split(b"\n", 1)
        return line.decode()

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and (line := self._line(timeout)) is not None:
            self.returncode = int(line)
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        return self._wait(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired([*self.args], timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that is left of what it says, once it has ended and nobody else writes there."""
        said = {}

        def read(stream: IO[str]) -> None:
            with stream:
                said[stream] = stream.read()

        streams = [each for each in (self.stdout, self.stderr) if each is not None and not each.closed]
        readers = [threading.Thread(target=read, args=(stream,), daemon=True) for stream in streams]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return tuple(said.get(stream, "") for stream in (self.stdout, self.stderr))  # type: ignore[return-value, arg-type]

    def send_signal(self, sent: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, sent)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    arguments: Sequence[str], *, timeout: float, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """A program's end and all that it said: as `subprocess.run`, with `Forked`'s arguments.

    Raises:
        CalledProcessError: It is to be checked, and did not end well.
    """
    process = Forked(arguments, subprocess.PIPE, subprocess.PIPE, **options)
    try:
        stdout, stderr = process.communicate(timeout)
    finally:
        process.kill()
        code = process.wait()
    done = subprocess.CompletedProcess([*arguments], code, stdout, stderr)
    if check:
        done.check_returncode()
    return done


def as_python(file: Path) -> None:
    """Writes a program that is called as `python` is, and runs in a fork."""
    file.parent.mkdir(parents=True)
    file.write_text(f'#!/bin/sh\nexport {VARIABLE}={server()}\nexec {sys.executable} {__file__} "$@"\n')
    file.chmod(0o755)


def in_bash() -> str:
    """A function of bash, `forked`, which is `mtl` in a fork with the outputs that it is given."""
    return f'forked() {{ {VARIABLE}={server()} {sys.executable} {__file__} -m mtl "$@"; }}'


if __name__ == "__main__":
    sys.exit(Forked(sys.argv[1:]).wait())
