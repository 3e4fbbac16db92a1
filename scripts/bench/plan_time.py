"""What resolving a freeze and asking the scheduler cost.

    python scripts/bench/plan_time.py [--rounds N]

Prints the median time to resolve some lists of patterns against a model of about 1,000 tensors (on the meta device),
and the scheduler's time for the two reports that a step makes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import timm
import torch
from torch import nn

from mtl.freeze import plan_freeze
from mtl.phases.conditions import AnyOf, Plateau, Reached, Spent
from mtl.phases.phase_length import PhaseLength
from mtl.phases.scheduler import TaskScheduler

PATTERNS = [
    ["trunk"],
    ["trunk@first:50%", "heads", "!heads.1", "type:LayerNorm"],
    ["re:trunk.*weight", "~blocks.1", "**.bias", "!heads[0]"],
]
_NUM_STEPS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    with torch.device("meta"):
        vits = [timm.create_model("vit_large_patch16_224", num_classes=0) for _ in range(3)]
        heads = nn.ModuleList([*vits[1:], timm.create_model("resnet50", num_classes=0)])
        model = nn.ModuleDict({"trunk": vits[0], "heads": heads})
    tensors = len(list(model.parameters()))
    for patterns in PATTERNS:
        times = []
        for _ in range(options.rounds):
            started = time.perf_counter()
            plan_freeze(model, patterns)
            times.append(time.perf_counter() - started)
        sys.stdout.write(f"{tensors} tensors, {patterns}: {statistics.median(times) * 1e3:.1f} ms\n")
    until = AnyOf((Plateau("val/score", 2), Reached("val/depth/abs_rel", 0.1, "lower"), Spent(3600, "seconds")))
    scheduler = TaskScheduler([PhaseLength("bench", until=until, max_steps=10 * _NUM_STEPS)])
    started = time.perf_counter()
    for _ in range(_NUM_STEPS):
        scheduler.step_done()
        scheduler.time_passed(1e-6)
    seconds = (time.perf_counter() - started) / _NUM_STEPS
    sys.stdout.write(f"scheduler: {seconds * 1e6:.2f} microseconds a step\n")


if __name__ == "__main__":
    main()
