"""A step of a balancing method here, in TorchJD's own backward, and in loops by hand; in one process, in turn.

python scripts/bench/balance_cost.py                    # resnet18, 64 pixels, three tasks, frozen to nothing
python scripts/bench/balance_cost.py --tasks 16 --rounds 3 --only sum upgrad 'mgda on features'

LibMTL's loop is written after its `_compute_grad` and its PCGrad, GradVac, IMTL-G and MGDA: one backward a task into
`.grad`, copied into a row of a matrix, and but for MGDA vectors as long as the trunk for every pair of tasks.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torchjd.aggregation import IMTLG, MGDA, Aggregator, GradVac, PCGrad, UPGrad
from torchjd.autojac import jac_to_grad, mtl_backward

from mtl.config import load_config
from mtl.training.loop import Trainer
from mtl.training.setup import assemble
from mtl.training.tracking.tracker import Tracker

METHODS: dict[str, Callable[[], Aggregator]] = {
    "pcgrad": PCGrad,
    "mgda": MGDA,
    "upgrad": UPGrad,
    "imtlg": IMTLG,
    "gradvac": GradVac,
}


def config(folder: Path, num_tasks: int, balance: object) -> Path:
    tasks = {f"object{n}": {"type": "classification", "num_classes": 10, "label": "object"} for n in range(num_tasks)}
    content = {
        "name": "x",
        "runs_dir": str(folder),
        "trunk": {"name": "resnet18"},
        "data": {"name": "scenes", "image_size": 64, "batch_size": 32, "num_train": 64, "num_val": 32},
        "tasks": tasks,
        "balance": balance,
        "optim": {"optimizer": "sgd", "lr": 1e-4, "lr_schedule": "constant"},
        "tracking": {"mode": "disabled"},
        # A run that only its loops by hand step would break the contract that something trains.
        "audit": {"gradients_every_steps": 0, "policy": "collect"},
        "cache": {"mode": "off"},
        "phases": [{"name": "all", "epochs": 50}],
    }
    file = folder / "x.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


class Run:
    """A run about to step; `step` takes one as `mtl train` does."""

    def __init__(self, folder: Path, num_tasks: int, balance: object, stack: ExitStack) -> None:
        self.setup = assemble(load_config(config(folder, num_tasks, balance)), quiet=True)
        trainer = Trainer(self.setup, folder, Tracker(self.setup.config.tracking, folder, "x", {}), quiet=True)
        self.trainer, self.active = trainer, stack.enter_context(trainer.active(self.setup.phases[0]))
        self.active.log = trainer.log.steps_of(self.setup.phases[0], 1, None, has_scaler=False)
        self.batch = self.setup.train.batch(torch.arange(32))
        self.trunk = [p for p in self.setup.model.trunk.parameters() if p.requires_grad]
        self.heads = [p for p in self.setup.model.heads.parameters() if p.requires_grad]
        self.sgd = torch.optim.SGD([*self.trunk, *self.heads], lr=1e-4)

    def step(self) -> None:
        optim = self.active.optim
        assert optim is not None
        self.trainer.train_step(self.active, optim, [self.batch])
        self.trainer.state.step += 1

    def losses(self) -> tuple[list[Tensor], list[Tensor]]:
        model = self.setup.model
        features = model.encode(self.batch.images)
        outputs = model.decode(features, self.batch.size)
        return features.tensors(), [
            task.loss(outputs[name], self.batch.labels[name]) for name, task in self.setup.tasks.items()
        ]

    def by_hand(self) -> None:
        torch.stack(self.losses()[1]).sum().backward()
        self.sgd.step()
        self.sgd.zero_grad()

    def by_torchjd(self, aggregator: Aggregator) -> None:
        features, losses = self.losses()
        mtl_backward(losses, features=features)
        jac_to_grad(self.trunk, aggregator)
        self.sgd.step()
        self.sgd.zero_grad()

    def by_libmtl(self, method: str) -> None:
        _, losses = self.losses()
        rows = torch.zeros(len(losses), sum(p.numel() for p in self.trunk))
        for number, loss in enumerate(losses):
            loss.backward(retain_graph=number < len(losses) - 1)
            rows[number] = torch.cat([p.grad.flatten() for p in self.trunk if p.grad is not None])
            for parameter in self.trunk:
                parameter.grad = None
        total = {"pcgrad": _pcgrad, "gradvac": _gradvac, "imtlg": _imtlg, "mgda": _mgda}[method](rows)
        for parameter, part in zip(self.trunk, total.split([p.numel() for p in self.trunk]), strict=True):
            parameter.grad = part.view_as(parameter)
        self.sgd.step()
        self.sgd.zero_grad()


def _pcgrad(rows: Tensor) -> Tensor:
    found = rows.clone()
    for one in range(len(rows)):
        order = list(range(len(rows)))
        random.shuffle(order)
        for other in order:
            product = found[one] @ rows[other]
            if product < 0:
                found[one] -= product * rows[other] / (rows[other].norm() ** 2 + 1e-8)
    return found.sum(0)


def _gradvac(rows: Tensor) -> Tensor:
    found, goal, beta = rows.clone(), torch.zeros(len(rows), len(rows)), 0.5
    for one in range(len(rows)):
        order = [each for each in range(len(rows)) if each != one]
        random.shuffle(order)
        for other in order:
            cosine = found[one] @ rows[other] / (found[one].norm() * rows[other].norm() + 1e-8)
            if cosine < goal[one, other]:
                a, b = goal[one, other], cosine
                size = found[one].norm() * (a * (1 - b**2).sqrt() - b * (1 - a**2).sqrt())
                found[one] += size / (rows[other].norm() * (1 - a**2).sqrt() + 1e-8) * rows[other]
            goal[one, other] = (1 - beta) * goal[one, other] + beta * cosine
    return found.sum(0)


def _mgda(rows: Tensor) -> Tensor:
    products, weights = (rows @ rows.T).double(), torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    for _ in range(250):
        slopes = products @ weights
        best = int(slopes.argmin())
        one, both, other = weights @ slopes, slopes[best], products[best, best]
        share = ((one - both) / (one + other - 2 * both)).clamp(0, 1) if one + other > 2 * both else torch.zeros(())
        moved = weights * (1 - share)
        moved[best] += share
        if (moved - weights).abs().sum() < 1e-3:
            break
        weights = moved
    return weights.float() @ rows


def _imtlg(rows: Tensor) -> Tensor:
    units = rows / rows.norm(dim=1, keepdim=True)
    gaps, turns = rows[0] - rows[1:], units[0] - units[1:]
    weights = (rows[0] @ turns.T) @ torch.linalg.pinv(gaps @ turns.T)
    return torch.cat([1 - weights.sum()[None], weights]) @ rows


def measure(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of a step of each, in turn."""
    for step in variants.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(own) for name, own in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", help="of these variants, such as sum upgrad")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:

        def run(balance: object) -> Run:
            folder = Path(tempfile.mkdtemp(dir=name))
            return Run(folder, options.tasks, balance, stack)

        plain = run("sum")
        ours = {method: run(method) for method in METHODS}
        features = run({"method": "mgda", "on": "features"})
        variants: dict[str, Callable[[], None]] = {"by hand, sum": plain.by_hand, "sum": plain.step}
        for method, make in METHODS.items():
            variants[method] = ours[method].step
            variants[f"TorchJD {method}"] = lambda make=make: plain.by_torchjd(make())  # type: ignore[misc]
        for method in ("pcgrad", "gradvac", "imtlg", "mgda"):
            variants[f"LibMTL {method}"] = lambda method=method: plain.by_libmtl(method)  # type: ignore[misc]
        variants["mgda on features"] = features.step
        if options.only:
            variants = {name: step for name, step in variants.items() if name in ("by hand, sum", *options.only)}
        found = measure(variants, options.rounds)
        base = found["by hand, sum"]
        for variant, value in found.items():
            sys.stdout.write(f"{variant:20} {value:8.1f} ms   {value / base:.2f} of the loop by hand\n")
        stack.close()


if __name__ == "__main__":
    main()
