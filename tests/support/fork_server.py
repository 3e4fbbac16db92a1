"""A process that has imported what runs import, and becomes, in a fork, each program that a test starts.

    python fork_server.py SOCKET

An import of torch, timm and torchjd costs seconds of a processor, which every `python -m mtl` of a test would pay, and
torchrun once more for each process. Forks are made before anything is computed. `forks.py` is the other side.

A request is one message: {"arguments": as for `python`, "cwd", "env", "new_session"}, with the descriptors of standard
input, output and error. Answers are lines: the process id once the program begins, then its exit code when it ends.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

IMPORTED = (
    # First: mtl defers it, and DDP, FSDP2 and AdamW come to import it, each fork for itself.
    "torch._dynamo",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "PIL.PngImagePlugin",
    "numpy.random",
    "mtl.cli.train",
    "mtl.results.report.write",
    "mtl.results.summary",
    "mtl.phases.plan.text",
    "mtl.training.run",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.run",
)
TORCHRUN = ["-m", "torch.distributed.run"]
NAME = "fork_server"


class Request:
    def __init__(self, connection: socket.socket) -> None:
        content, self.streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
        asked: dict[str, Any] = json.loads(content)
        self.arguments: list[str] = asked["arguments"]
        self.cwd: str = asked["cwd"]
        self.env: dict[str, str] = asked["env"]
        self.new_session: bool = asked["new_session"]

    def begin(self) -> None:
        """Makes this process the one that was asked for."""
        if self.new_session:
            os.setsid()
        for number, descriptor in enumerate(self.streams):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(self.cwd)
        os.environ.clear()
        os.environ.update(self.env)
        random.seed()
        # wandb makes a temporary folder when it is imported, and removes it when it ends: each fork has its own.
        for finalizer in [*weakref.finalize._registry]:  # type: ignore[attr-defined]
            finalizer.atexit = False
        made = import_module("wandb.sdk.data_types._private").MEDIA_TMP
        made.__init__("wandb-media")  # type: ignore[misc]
        for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            by_line = number == 2 or self.arguments[0] == "-u"
            stream = open(number, mode, 1 if by_line else -1, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)

    def run(self) -> None:
        """Runs the program as `python` would: -c CODE, -m MODULE or FILE."""
        first, *rest = [argument for argument in self.arguments if argument != "-u"]
        sys.path[0] = str(Path(first).parent) if first not in ("-c", "-m") else ""
        sys.path[1:1] = [each for each in self.env.get("PYTHONPATH", "").split(os.pathsep) if each]
        sys.argv = [first, *rest]
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            return
        if first == "-c":
            code, name = rest.pop(0), "<string>"
            sys.argv = ["-c", *rest]
        else:
            code, name = Path(first).read_text(encoding="utf-8"), first
        module = types.ModuleType("__main__")
        module.__file__ = name
        sys.modules["__main__"] = module
        exec(compile(code, name, "exec"), module.__dict__)


@contextmanager
def woken_by_children(selector: selectors.BaseSelector) -> Iterator[None]:
    """A child's end makes the selector ready."""
    reads, writes = socket.socketpair()
    reads.setblocking(False)
    writes.setblocking(False)
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
    selector.register(reads, selectors.EVENT_READ, "child")
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, before)
        reads.close()
        writes.close()


def serve(listener: socket.socket, until: int) -> Request | None:
    """Forks for each request until a descriptor is closed; returns None then, and in a fork what it is to run."""
    running: dict[int, socket.socket] = {}
    over: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector, woken_by_children(selector):
        selector.register(listener, selectors.EVENT_READ, "request")
        selector.register(until, selectors.EVENT_READ, "end")
        while True:
            for key, _ in selector.select():
                if key.data == "end":
                    return None
                if key.data == "child":
                    with suppress(BlockingIOError):
                        key.fileobj.recv(1 << 10)  # type: ignore[union-attr]
                    for child in ended(running):
                        over[child] = running.pop(child)
                        selector.register(over[child], selectors.EVENT_READ, child)
                    continue
                if isinstance(key.data, int):  # who waited for it knows that it has ended
                    selector.unregister(key.fileobj)
                    over.pop(key.data).close()
                    os.waitpid(key.data, 0)
                    continue
                connection, _ = listener.accept()
                request = Request(connection)
                child = os.fork()
                if child == 0:
                    for each in (listener, *running.values(), *over.values()):
                        each.close()
                    os.close(until)
                    request.begin()
                    connection.sendall(f"{os.getpid()}\n".encode())
                    connection.close()
                    return request
                for descriptor in request.streams:
                    os.close(descriptor)
                running[child] = connection


def ended(running: dict[int, socket.socket]) -> list[int]:
    """The programs that have ended, after their exit codes were sent to who waits for them.

    They stay zombies until the other side closes: it may signal a process that it does not know to have ended yet.
    """
    found_over = []
    for child, connection in running.items():
        found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            continue
        code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        with suppress(OSError):  # nobody waits
            connection.sendall(f"{code}\n".encode())
        found_over.append(child)
    return found_over


def serve_torchrun() -> Request | None:
    """Gives this process, which becomes torchrun, a server that forks its workers; see `serve` for what it returns."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    from forks import Forked

    place = Path(tempfile.mkdtemp(prefix="forks-")) / "socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place))
    listener.listen()
    until, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(held)
        # torchrun's own signals are not its.
        os.setsid()
        be_named()
        request = serve(listener, until)
        if request is None:
            place.unlink()
            place.parent.rmdir()
            os._exit(0)
        return request
    listener.close()
    os.close(until)

    def popen(handler: Any, arguments: tuple[str, ...], environment: dict[str, str]) -> Forked:
        streams = (handler._stdout, handler._stderr)
        return Forked(arguments[1:], *streams, env=environment, new_session=True, server=place)

    def end_server() -> None:
        os.close(held)
        os.waitpid(child, 0)

    SubprocessHandler._popen = popen
    atexit.register(end_server)
    return None


def be_named(name: str = NAME) -> None:
    """What ps and `processes.workers` call this process."""
    Path("/proc/self/comm").write_text(name, encoding="utf-8")


def end(request: Request) -> NoReturn:
    """Runs the program, and ends this process as Python would, but for the modules: tearing them down takes seconds."""
    code: Any = 0
    try:
        request.run()
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001  as Python does
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int | None):
        sys.stderr.write(f"{code}\n")
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


def main(place: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        for name in IMPORTED:
            import_module(name)
        # A collection in a fork would write to, and so copy, all the memory that they share.
        gc.collect()
        gc.freeze()
        be_named()
        listener.bind(place)
        listener.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        request = serve(listener, os.dup(0))
    if request is None:
        atexit._run_exitfuncs()
        os._exit(0)
    if [*request.arguments[:2]] == TORCHRUN:
        request = serve_torchrun() or request
    be_named("python")
    end(request)


if __name__ == "__main__":
    main(sys.argv[1])
