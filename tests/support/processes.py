"""Scripts that tests run in several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import fork_server
from forks import Forked

Process = subprocess.Popen[str] | Forked
# After so long, a process hangs: no test waits for it, and none fails since a machine is slow. Longer than a rank waits
# for another one (`mtl.distributed.world.TIMEOUT_S`): its error says where.
HANGS_S = 720


def run_in_two_processes(script: str, folder: Path) -> None:
    """Runs a script under torchrun, on this machine's loopback; it is given the folder."""
    run_in_processes(script, folder, 2)


def run_in_processes(script: str, folder: Path, number: int, in_forks: bool = True) -> None:
    """As `run_in_two_processes`, in any number of them.

    Args:
        script: What each runs.
        folder: Its argument.
        number: How many processes.
        in_forks: Whether they are forks of one that has imported nearly everything, which a user's processes are not.

    Raises:
        CalledProcessError: They did not end well; its output is what they said last.
    """
    file = folder / "script.py"
    file.write_text(script)
    command = torchrun(number, str(file), str(folder))
    if not in_forks:
        command[1:1] = ["-X", "utf8"]
    with started(command) as process:
        _, said = process.communicate(timeout=HANGS_S)
    if process.returncode:
        sys.stderr.write(said[-4000:])
        raise subprocess.CalledProcessError(process.returncode, command, said[-4000:])


def torchrun(number: int, *program: str, options: Sequence[str] = ()) -> list[str]:
    """The command that starts a program in several processes on this machine's loopback."""
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={number}"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", *options]
    return [sys.executable, *launch, *program]


@contextmanager
def started(command: Sequence[str], **environment: str) -> Iterator[Process]:
    """A torchrun or another program that is running; when the block ends, it and its processes have ended.

    Without options of Python's own, such as `-X importtime`, they are forks of a process that has imported torch.
    """
    # A script that was copied elsewhere finds the modules next to this one as well.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    surroundings = {**os.environ, **own, **environment}
    pipe = subprocess.PIPE
    process: Process
    if command[0] == sys.executable and command[1] != "-X":
        process = Forked(command[1:], pipe, pipe, env=surroundings)
    else:
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=surroundings)
    try:
        yield process
    finally:
        kill_all(process)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def workers(process: Process) -> list[int]:
    """The processes that a process has started, and those that they have: torchrun's are in sessions of their own."""
    return [number for number in descendants(process) if not is_fork_server(number)]


def is_fork_server(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/comm").read_text() == f"{fork_server.NAME}\n"
    except OSError:
        return False


def descendants(process: Process) -> list[int]:
    found, known = [], [process.pid]
    while known:
        children = []
        # Whichever of its threads started them.
        with suppress(OSError):  # the process has ended meanwhile
            for file in Path(f"/proc/{known.pop()}/task").glob("*/children"):
                with suppress(OSError):  # the thread has
                    children += [int(number) for number in file.read_text().split()]
        found += children
        known += children
    return found


def kill_all(process: Process) -> None:
    """Kills a process that we started, then those that it started."""
    if process.poll() is not None:
        return
    children = descendants(process)
    process.kill()
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    process.wait()


def wait_until(condition: Callable[[], bool], seconds: float = HANGS_S) -> None:
    """Waits for something that another process does.

    Raises:
        TimeoutError: It did not come.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing came in {seconds} s")
        time.sleep(0.01)
