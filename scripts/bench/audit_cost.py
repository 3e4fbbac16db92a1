"""What the audit costs in a plain loop: steps with it and without, in turn, in one process.

"on / off" is the median over pairs of neighbouring steps, with the spread of that median (1.25 median absolute
deviations / sqrt(pairs)), and "CPU" the same of processor time, which other work on the machine disturbs less; "inside"
is the time spent in the audit's own calls, as a share of the median step without.

python scripts/bench/audit_cost.py            # resnet18 at 64 px, batch 64, and vit_tiny at 224 px, batch 16
python scripts/bench/audit_cost.py --small    # models of many small tensors: 1,000 at some 10 ms a step, and 50 + 800
python scripts/bench/audit_cost.py --deep     # trunks of more than 1,000 tensors, frozen wholly, half, and not at all
python scripts/bench/audit_cost.py --rounds 40
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import timm
import torch
from torch import nn
from torch.optim import AdamW

from mtl.audit import GradientAudit
from mtl.freeze import enforce, plan_freeze, trainable_parameters

SETTINGS = [("resnet18", 64, 64), ("vit_tiny_patch16_224", 224, 16)]
# 1,205 and 1,954 parameters and buffers; the smallest images and batches that they take, so that steps are short.
DEEP = [("densenet201", 32, 4), ("hrnet_w18", 32, 4)]
FREEZES = {"trunk frozen": ["trunk"], "first half frozen": ["trunk@first:50%"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="steps with and steps without, in turn")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--small", action="store_true", help="models of many small tensors instead")
    kinds.add_argument("--deep", action="store_true", help="trunks of more than 1,000 tensors instead")
    options = parser.parse_args()
    rounds: int = options.rounds
    columns = f"{'off, ms':>10}{'on / off':>10}{'spread':>8}{'CPU':>8}{'inside':>9}{'copies, MB':>12}"
    sys.stdout.write(f"{'setting':32}{'freeze':20}{columns}\n")
    for name, what, make in _small() if options.small else _large(options.deep):
        off, on, inside, copies = measure(*make(), rounds)
        (ratios, by_cpu), step = zip(*map(_ratios, off, on), strict=True), median(each for each, _ in off)
        ratio = median(ratios)
        spread = 1.25 * 1.48 * median(abs(each - ratio) for each in ratios) / len(ratios) ** 0.5
        sys.stdout.write(
            f"{name:32}{what:20}{step:10.1f}{ratio:10.3f}{spread:8.3f}{median(by_cpu):8.3f}"
            f"{median(inside) / step:9.2%}{copies:12.1f}\n"
        )
        sys.stdout.flush()


# Milliseconds of a step: by the clock, and on processors.
Step = tuple[float, float]


def _ratios(off: Step, on: Step) -> tuple[float, float]:
    return on[0] / off[0], on[1] / off[1]


# A model, its input, its target classes, and the patterns of its freeze.
Made = tuple[nn.ModuleDict, torch.Tensor, torch.Tensor, list[str]]


def _large(deep: bool) -> Iterator[tuple[str, str, Callable[[], Made]]]:
    for name, size, batch in DEEP if deep else SETTINGS:
        for what, patterns in (FREEZES | {"nothing frozen": []} if deep else FREEZES).items():
            yield f"{name} {size} px {batch}", what, partial(_timm, name, size, batch, patterns)


def _timm(name: str, size: int, batch: int, patterns: list[str]) -> Made:
    trunk = timm.create_model(name, num_classes=0)
    model = nn.ModuleDict({"trunk": trunk, "head": nn.Linear(trunk.num_features, 10)})
    return model, torch.randn(batch, 3, size, size), torch.randint(10, (batch,)), patterns


def _small() -> Iterator[tuple[str, str, Callable[[], Made]]]:
    for num_frozen, num_trained in ((125, 125), (240, 10), (10, 240)):
        what = f"{4 * num_frozen} of {4 * (num_frozen + num_trained)}"
        yield "blocks with BatchNorm, width 64", what, partial(_blocks, num_frozen, num_trained, 64, 48, norm=True)
    yield "linear layers, width 8", "800 of 850", partial(_blocks, 400, 25, 8, 8, norm=False)


def _blocks(num_frozen: int, num_trained: int, width: int, batch: int, norm: bool) -> Made:
    """A trunk of frozen layers below a head of some that train; four tensors in each with a norm, else two."""

    def layers(count: int) -> nn.Sequential:
        made = [
            nn.Sequential(nn.Linear(width, width), *([nn.BatchNorm1d(width)] if norm else [])) for _ in range(count)
        ]
        return nn.Sequential(*made)

    model = nn.ModuleDict({"trunk": layers(num_frozen), "head": layers(num_trained)})
    return model, torch.randn(batch, width), torch.randint(width, (batch,)), ["trunk"]


def measure(
    model: nn.ModuleDict, x: torch.Tensor, y: torch.Tensor, patterns: list[str], rounds: int
) -> tuple[list[Step], list[Step], list[float], float]:
    """Each step without and with the audit, milliseconds of its own calls, and the megabytes of its copies."""
    torch.manual_seed(0)
    plan = plan_freeze(model, patterns)
    enforce(model, plan)
    optimizer = AdamW(trainable_parameters(model, plan).values(), lr=1e-4)
    audit = GradientAudit(model, patterns, [optimizer])
    times: dict[bool, list[Step]] = {True: [], False: []}
    inside: list[float] = []
    with audit.phase("frozen") as record:
        # The first steps of both kinds warm up; the audit's first one also sees every gradient for the first time.
        for number in range(2 * rounds + 4):
            is_on = number % 2 == 0
            started, started_cpu = time.perf_counter(), time.process_time()
            nn.functional.cross_entropy(model["head"](model["trunk"](x)), y).backward()
            marks = [time.perf_counter()]
            if is_on:
                audit.after_backward()
            marks.append(time.perf_counter())
            optimizer.step()
            marks.append(time.perf_counter())
            if is_on:
                audit.after_step()
            marks.append(time.perf_counter())
            optimizer.zero_grad()
            if number >= 4:
                step = (1e3 * (time.perf_counter() - started), 1e3 * (time.process_time() - started_cpu))
                times[is_on].append(step)
                inside += [1e3 * (marks[1] - marks[0] + marks[3] - marks[2])] if is_on else []
        tensors = model.state_dict()
        copies = sum(tensors[each].numel() * tensors[each].element_size() for each in record.fingerprints) / 1e6
    return times[False], times[True], inside, copies


if __name__ == "__main__":
    main()
