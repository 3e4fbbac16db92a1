"""What the processes of test_checkpoint_kills.py do: they save, are killed, and look at what is left."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtl.checkpoint.files import CheckpointError
from mtl.checkpoint.folder import Checkpoints
from mtl.checkpoint.load import load_checkpoint, load_newest, newest_first

FROZEN = ["trunk.weight", "trunk.bias"]


def model(step: int, width: int) -> nn.Module:
    """Every tensor says its step; what is frozen changes with every third one."""
    module = nn.ModuleDict({"trunk": nn.Linear(width, width), "head": nn.Linear(width, 8)})
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(step // 3 if name in FROZEN else step)
    return module


def save(checkpoints: Checkpoints, step: int, width: int, in_thread: bool = False) -> None:
    moments = {"sgd": {"head.weight": {"momentum_buffer": torch.full((8, width), float(step))}}}
    names = ["last", "best"] if step % 4 == 1 else ["last"]
    checkpoints.save(model(step, width), FROZEN, moments, {"step": step}, names, in_thread=in_thread)
    checkpoints.wait()


def look(folder: Path, width: int) -> int:
    """The step of the newest checkpoint, 0 if there is none; -1 if anything is not as it was saved, or is left over."""
    module = model(-1, width)
    try:
        # Each of them, not the newest alone: those that were being removed too.
        for path in newest_first(folder):
            load_checkpoint(path, module)
        _, state, moments, refused = load_newest(folder, module)
    except CheckpointError as error:
        return 0 if "has no checkpoints" in str(error) else -1
    step: int = state["step"]
    found = module.state_dict()
    same = all(torch.equal(tensor, found[name]) for name, tensor in model(step, width).state_dict().items())
    same &= bool((moments["sgd"]["head.weight"]["momentum_buffer"] == step).all())
    for _ in range(2):
        save(Checkpoints(folder), step + 1, width)
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    linked = {path.stat().st_ino for path in folder.glob("step-*/frozen.safetensors")}
    left += [path.name for path in (folder / "frozen").iterdir() if path.stat().st_ino not in linked]
    dangling = [path.name for path in folder.iterdir() if path.is_symlink() and not path.exists()]
    return step if same and not (refused or left or dangling) else -1


def run_child(work: Callable[[int], None], delay_s: float | None = None) -> tuple[bool, int]:
    """Whether a child came to its end before it was killed, and the last step that it said it had saved."""
    said, says = os.pipe()
    child = os.fork()
    if child == 0:
        work(says)
        os._exit(0)
    os.close(says)
    if delay_s is not None:
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    with open(said, "rb") as stream:  # noqa: PTH123  a descriptor
        steps = stream.read()
    return os.WIFEXITED(status), steps[-1] if steps else 0


def kill_at_every_file_operation(folder: Path, in_thread: int) -> list[list[Any]]:
    """Killed before its first file operation, its second, ...; saves steps 2, 3, 4 and 4 again after step 1."""
    found: list[list[Any]] = []
    while not found or not found[-1][0]:
        place, operations = folder / str(len(found)), len(found)
        save(Checkpoints(place), 1, 4)

        def work(says: int, place: Path = place, operations: int = operations) -> None:
            def count(event: str, _: tuple[Any, ...]) -> None:
                nonlocal operations
                if event.startswith(("os.", "open", "shutil.")):
                    operations -= 1
                    if operations == -1:
                        os.kill(os.getpid(), signal.SIGKILL)

            checkpoints = Checkpoints(place)
            sys.addaudithook(count)
            for step in (2, 3, 4, 4):
                save(checkpoints, step, 4, bool(in_thread))
                os.write(says, bytes([step]))
            operations = -1

        survived, saved = run_child(work)
        found.append([survived, max(saved, 1), look(place, 4)])
    return found


def kill_at_random(folder: Path, trials: int) -> list[list[Any]]:
    """A process that saves without end, killed at any time, and the next one, which resumes where it was."""
    chance = random.Random(0)
    found = []
    begin = time.perf_counter()
    save(Checkpoints(folder), 1, 512)
    duration = time.perf_counter() - begin
    for _ in range(trials):
        first = 1 + look(folder, 512)

        def work(says: int, first: int = first) -> None:
            checkpoints = Checkpoints(folder)
            for step in range(1, 250):
                save(checkpoints, first + step // 2, 512)
                os.write(says, bytes([step]))

        _, saved = run_child(work, chance.uniform(0, 6 * duration))
        found.append([False, first + saved // 2 if saved else first, look(folder, 512)])
    return found


if __name__ == "__main__":
    verb, place, *numbers = sys.argv[1:]
    print(json.dumps(globals()[verb](Path(place), *map(int, numbers))))  # noqa: T201
