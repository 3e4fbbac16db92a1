"""What `test_fsdp_run` runs in several processes: `mtl train`, looked at from its optimizer steps.

The folder's `order.json` says with which arguments, at which step the last process kills itself, or at which of its
writings of shards which process does so, or is left with room for small files only.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import mtl.checkpoint.folder
import mtl.training.run
from mtl.checkpoint.sharded import write_shards
from mtl.cli import main
from mtl.distributed.world import World
from mtl.runtime.tensors import local
from mtl.training.loop import Trainer

WORLD = World.from_environment()
# Tests import this file only to find it.
FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
ORDER: dict[str, Any] = {}
FOUND: dict[str, Any] = {"frozen with a gradient": [], "trained without": [], "here": 0, "all": 0}
TRAINERS: list[Trainer] = []
WRITINGS: list[int] = []


class Seen(Trainer):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        TRAINERS.append(self)
        parameters = list(self.setup.model.parameters())
        FOUND["here"] = sum(local(parameter).untyped_storage().nbytes() for parameter in parameters)
        FOUND["all"] = sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def before(optimizer: Optimizer, *_: Any) -> None:
    # Some are tried out before there is a trainer.
    if not TRAINERS:
        return
    if TRAINERS[0].state.step + 1 == ORDER.get("die_at") and WORLD.rank == WORLD.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in TRAINERS[0].setup.root.named_parameters():
        if parameter.grad is not None and id(parameter) not in held:
            FOUND["frozen with a gradient"].append(name)
        if parameter.grad is None and id(parameter) in held:
            FOUND["trained without"].append(name)


def write(*arguments: Any) -> None:
    WRITINGS.append(1)
    if ORDER.get("die_writing") == [WORLD.rank, len(WRITINGS)]:
        os.kill(os.getpid(), signal.SIGKILL)
    if ORDER.get("full_at") == [WORLD.rank, len(WRITINGS)]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    write_shards(*arguments)


if __name__ == "__main__":
    ORDER |= json.loads((FOLDER / "order.json").read_text())
    mtl.training.run.Trainer = Seen
    register_optimizer_step_pre_hook(before)
    mtl.checkpoint.folder.write_shards = write
    code = main(["train", *ORDER["arguments"]])
    (FOLDER / f"{WORLD.rank}.json").write_text(json.dumps(FOUND))
    sys.stdout.flush()
    # At an ordinary exit, after the group was destroyed, some runs were aborted by a thread of gloo.
    os._exit(code)
