"""A folder that one process has to itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mtl.runtime.lock import locked

# A process with a folder, which has a fork, as data workers are.
HOLDER = """
import os, sys
from pathlib import Path
from mtl.runtime.lock import locked
with locked(Path(sys.argv[1])):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, b".")
        sys.stdin.read()
        os._exit(0)
    os.read(reader, 1)
    print(pid, flush=True)
    signal = __import__("signal")
    signal.pause()
"""


def test_a_folder_is_one_process_alone_and_free_after_the_block(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path):
        pytest.fail("two have it")
    with locked(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), locked(tmp_path / "missing"):
        pass


def test_a_fork_that_outlives_its_killed_parent_does_not_keep_the_folder(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None
        fork = int(holder.stdout.readline())
        with pytest.raises(BlockingIOError), locked(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(fork, 0)  # it is still there
        with locked(tmp_path):
            pass
