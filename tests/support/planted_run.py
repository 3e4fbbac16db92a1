"""`python -m mtl` as tests start it under torchrun: with something planted in one process, and its traffic counted.

    torchrun ... planted_run.py train CONFIG ...

What is planted is in the environment, as JSON: `MTL_TEST_PLANTED={"what": "kill", "rank": 1, "step": 5, "once": FILE}`.
Each process writes what it counted into `MTL_TEST_FOLDER`, if that is given, when a phase ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mtl.audit import GradientAudit
from mtl.cli import main
from mtl.distributed.ddp import PhaseDDP
from mtl.distributed.world import World
from traffic import count_traffic

RANK = int(os.environ["RANK"])
PLANTED: dict[str, Any] = json.loads(os.environ.get("MTL_TEST_PLANTED", "{}"))
FOLDER = os.environ.get("MTL_TEST_FOLDER")


class Counted:
    """Steps of the run, and in each phase the bytes that are averaged."""

    module: nn.Module
    steps = 0
    phases: ClassVar[list[dict[str, int]]] = []


def act() -> None:
    """Does what is planted, between the optimizer's step and the audit's look at it."""
    if PLANTED.get("rank") != RANK or PLANTED.get("step") != Counted.steps:
        return
    if "once" in PLANTED:
        try:
            Path(PLANTED["once"]).touch(exist_ok=False)
        except FileExistsError:
            return
    what = PLANTED["what"]
    if what in ("kill", "term"):
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGTERM)
    elif what == "write":
        with torch.no_grad():
            Counted.module.get_parameter(PLANTED["name"]).view(-1)[0] += 1


def count_and_act() -> None:
    """Counts steps and traffic, and acts in the step that is meant."""
    after_step, init, close, mean = GradientAudit.after_step, PhaseDDP.__init__, PhaseDDP.close, World.mean

    def counted_step(audit: GradientAudit) -> None:
        Counted.steps += 1
        Counted.phases[-1]["steps"] += 1
        act()
        after_step(audit)

    def counted_init(replica: PhaseDDP, module: Any, trainable: Any, world: Any) -> None:
        init(replica, module, trainable, world)
        Counted.module = module
        parameters = dict(module.named_parameters())
        num_bytes, of_trunk = (
            sum(parameters[name].nbytes for name in trainable if name.startswith(start)) for start in ("", "trunk.")
        )
        Counted.phases.append({"steps": 0, "trainable": num_bytes, "trunk": of_trunk, "by_task": 0})
        if FOLDER:
            replica.traffic = count_traffic(replica)

    def counted_close(replica: PhaseDDP) -> None:
        if FOLDER:
            Counted.phases[-1]["sent"] = replica.traffic.num_bytes
            Path(FOLDER, f"{RANK}.json").write_text(json.dumps(Counted.phases))
        close(replica)

    def counted_mean(world: World, tensor: Tensor) -> Tensor:
        # Losses are averaged by it as well, a few numbers of them.
        Counted.phases[-1]["by_task"] += tensor.nbytes if tensor.numel() > 100 else 0
        return mean(world, tensor)

    World.mean = counted_mean  # type: ignore[method-assign]
    GradientAudit.after_step = counted_step  # type: ignore[method-assign]
    PhaseDDP.__init__, PhaseDDP.close = counted_init, counted_close  # type: ignore[method-assign]


if __name__ == "__main__":
    if PLANTED.get("what") == "clock" and PLANTED["rank"] == RANK:
        real = time.perf_counter
        time.perf_counter = lambda: PLANTED["rate"] * real()
    count_and_act()
    sys.exit(main())
