"""Every balancing method in every setting: equal to a reference, or refused with a reason.

A reference has the tasks' gradients from `torch.autograd.grad`, one loss at a time, and knows nothing of steps,
scalers, batches and processes. Whether a method makes of the gradients what its paper says is another test's affair.

The table of docs/balancing.md is rewritten by:

MTL_WRITE_DOCS=1 python -m pytest tests/training/test_balance_matrix.py -k table
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crashes import Crash, assert_same, crash_in_step
from distributed_runs import command, finish, surroundings
from mtl.config import ConfigError, SettingError, load_config
from mtl.config.optim import BalanceConfig
from mtl.data import Batch
from mtl.model.trunk import Features, features_from
from mtl.optim.balance.balance import Balance
from mtl.optim.balance.build import build_balance, is_by_gradients, scalarizers
from mtl.optim.balance.gradient_balance import Shared
from mtl.optim.balance.gradient_method import TaskGradients
from mtl.optim.balance.gradient_methods import method_names
from mtl.optim.balance.scalarizers import Sum
from mtl.optim.balance.subset import Subset
from mtl.runtime.rng import torch_seeded
from mtl.training.loop import Trainer
from mtl.training.resume import resumed_config
from mtl.training.run import train
from mtl.training.setup import assemble
from mtl.training.step_sync import StepTasks
from mtl.training.tracking.tracker import Tracker
from runs import TINY, read_metrics, read_model, tiny_config, tiny_parts

PAGE = Path(__file__).parents[2] / "docs/balancing.md"
TASKS = tuple(TINY["tasks"])
WEIGHTS = [0.5, 1.5, 2.0, 0.25]
# What a method needs.
OPTIONS: dict[str, dict[str, Any]] = {
    "cosmos": {"lambda_": 0.5, "weights": WEIGHTS},
    "pbi": {"theta": 2.0, "weights": WEIGHTS},
    "stch": {"mu": 1.0},
    "cagrad": {"c": 0.5},
    "fairgrad": {"alpha": 1.0},
    "krum": {"n_byzantine": 0},
    "trimmedmean": {"trim_number": 1},
    "gradnorm": {"warmup_steps": 1, "lr": 0.2},
    "probe-then-fix": {"probe_steps": 1},
}
METHODS = sorted({"fixed", *scalarizers(), *method_names()})
BY_GRADIENTS = [method for method in METHODS if is_by_gradients(method)]
NUM_WARM_STEPS = 3
# Combine each batch of an accumulated step by itself: a scalarizer that is not linear in the losses.
BY_BATCH = {"cosmos", "famo", "geometricmean", "pbi", "si", "stch"}
NUM_BATCHES = {"modo": 2, "sdmgrad": 3}
# Small changes of a gradient, as half precision makes, may change a choice of these.
CHOOSES = {"graddrop", "krum", "trimmedmean", "pcd", "excessmtl", "sdmgrad"}
COLUMNS = ["part frozen", "accumulated", "bf16", "fp16", "partial labels", "on: features"]
COLUMNS += ["2 processes", "resumed", "fsdp2"]
NOTES = {
    "by batch": "each batch by itself, which is not the step of one large batch; a warning says so",
    "2": "with `optim.accumulate: 2`, which it needs; the two batches are those that it compares",
    "3": "with `optim.accumulate: 3`, which it needs; the three batches are those that it compares",
    "no gradients": "refused: the method looks at no gradients",
    "own": "refused: it makes a gradient of its own, which features take with `per_sample: true` only",
    "rows": "refused: it makes a gradient of those of earlier steps, which are of other images",
    "batches": "refused: it compares several batches of a step, of which features take one",
}


def balance_config(method: str, **more: Any) -> dict[str, Any]:
    if method == "fixed":
        return {"method": "fixed", "weights": dict(zip(TASKS, WEIGHTS, strict=True))} | more
    return {"method": method, "options": OPTIONS.get(method, {})} | more


def built(method: str, **more: Any) -> Balance:
    return build_balance(BalanceConfig(**balance_config(method, **more)), TASKS)


def warm(method: str, rows_of: str, width: int, **more: Any) -> Balance:
    """A method after some steps of other losses and gradients, so that its weights are not those it begins with.

    Args:
        method: Its name.
        rows_of: What the rows of later steps are gradients of.
        width: How many entries these have.
        more: Further keys of `balance`.
    """
    balance, generator = built(method, **more), torch.Generator().manual_seed(0)
    for parameter in balance.parameters():
        parameter.data += torch.linspace(-1, 1, len(TASKS))
    scales = torch.tensor([1.0, 0.1, 3.0, 0.5])
    for number in range(NUM_WARM_STEPS):
        losses = scales * (torch.rand(len(TASKS), generator=generator) + 0.5)
        if balance.by_gradients is not None:
            batches = tuple(torch.randn(len(TASKS), width, generator=generator) * scales[:, None] for _ in range(3))
            with torch_seeded(number, torch.device("cpu")):
                balance.by_gradients.combine(TaskGradients(batches[0], losses, batches, rows_of=rows_of))
            continue
        with torch_seeded(number, torch.device("cpu")):
            balance(losses)
        if balance.follows_steps:
            balance.after_step(losses * torch.tensor([0.5, 0.9, 0.99, 0.7]))
        balance.after_epoch()
    return balance


class Stand:
    """A run that is about to take a step, with any method."""

    def __init__(self, trainer: Trainer, active: Any) -> None:
        self.trainer, self.active = trainer, active
        self.setup = trainer.setup
        self.trainable = {n: p for n, p in self.setup.root.named_parameters() if p.requires_grad}
        self.trunk = [name for name in self.trainable if name.startswith("trunk.")]

    def warm(self, method: str, **more: Any) -> Balance:
        """A method that has seen some steps of this run's phase."""
        if "on" not in more:
            return warm(method, self.rows_of, sum(self.trainable[n].numel() for n in self.trunk), **more)
        features = self.trainer.features(self.batch(0), TASKS).tensors()
        return warm(method, "features", sum(f[0].numel() for f in features if f.requires_grad), **more)

    @property
    def rows_of(self) -> str:
        return Shared(names=[name.removeprefix("trunk.") for name in self.trunk]).rows_of

    def batch(self, first: int, num: int = 8) -> Batch:
        return self.setup.train.batch(torch.arange(first, first + num))

    def gradients(self, balance: Balance, window: Sequence[Batch], names: Sequence[str] = TASKS) -> dict[str, Tensor]:
        """As a step has them when the audit looks at them."""
        tasks = StepTasks(tuple(names), (), self.subset(names))
        phase = replace(self.active.phase, balance=balance)
        shares = self.trainer.sync.shares(window, {name: self.setup.tasks[name] for name in names})
        scaler = self.trainer.scaler
        for place, (batch, share) in enumerate(zip(window, shares, strict=True)):
            total, *_ = self.trainer.losses(batch, phase, tasks, share, 0, (), place == len(window) - 1)
            scaler.scale(total / len(window)).backward()  # type: ignore[no-untyped-call]
        scale = scaler.get_scale() if scaler.is_enabled() else 1.0
        found = {n: p.grad / scale for n, p in self.trainable.items() if p.grad is not None}
        self.setup.root.zero_grad()
        return found

    @staticmethod
    def subset(names: Sequence[str]) -> Subset | None:
        places = tuple(TASKS.index(name) for name in names)
        return None if len(places) == len(TASKS) else Subset(places, len(TASKS))

    def reference(
        self, balance: Balance, window: Sequence[Batch], names: Sequence[str] = TASKS, on_features: bool = False
    ) -> dict[str, Tensor]:
        """The same by hand."""
        scale = self.trainer.scaler._init_scale if self.trainer.scaler.is_enabled() else 1.0  # type: ignore[attr-defined]
        shares = self.trainer.sync.shares(window, {name: self.setup.tasks[name] for name in names})
        losses, by_task, seen = list[Tensor](), list[list[dict[str, Tensor]]](), list[list[Tensor]]()
        for batch, share in zip(window, shares, strict=True):
            with self.trainer.losses._autocast:
                features = self.trainer.features(batch, names)
            each = self.trainer.losses.each_loss(batch, names, features)
            own = _shares(each, share)
            losses.append(torch.stack(own).detach())
            by_task.append([self.by_hand(loss, scale) for loss in own])
            if on_features:
                leaves = _detached(features)
                tensors = [t for t in leaves.tensors() if t.requires_grad]
                apart = self.trainer.losses.each_loss(batch, names, leaves)
                seen.append([_summed(loss, tensors) for loss in _shares(apart, share)])
        num = len(window)
        mean = [_mean([batch[task] for batch in by_task]) for task in range(len(names))]
        rows, values = torch.stack([self.row(each) for each in mean]), torch.stack(losses).mean(0)
        subset = self.subset(names)
        seed = torch_seeded(self.setup.config.seed * 1_000_003, self.setup.device)
        if balance.by_gradients is None:
            leaves = values.clone().requires_grad_()
            with seed:
                balance(leaves, subset).backward()
            weights = heads = leaves.grad
            assert weights is not None and heads is not None
            trunk = weights @ rows
        else:
            batches = tuple(torch.stack([self.row(each) for each in batch]) for batch in by_task) if num > 1 else ()
            looked = torch.stack(seen[0]) if on_features else rows
            rows_of = "features" if on_features else self.rows_of
            with seed:
                combined = balance.by_gradients.combine(TaskGradients(looked, values, batches, subset, rows_of))
            trunk = combined.of(rows)
            heads = torch.ones(len(names)) if combined.head_weights is None else combined.head_weights
            assert combined.head_weights is None or _differ(heads, torch.ones(len(names)))
        is_sum = balance.by_gradients is None and isinstance(balance.scalarizer, Sum)
        assert is_sum or _differ(trunk, rows.sum(0)), "a step of the sum of losses would do as well"
        found = dict(zip(self.trunk, trunk.split([self.trainable[n].numel() for n in self.trunk]), strict=True))
        found = {name: part.view_as(self.trainable[name]) for name, part in found.items()}
        for name in self.trainable.keys() - {*self.trunk}:
            own_heads = [weight * each[name] for weight, each in zip(heads, mean, strict=True) if name in each]
            if own_heads:
                found[name] = torch.stack(own_heads).sum(0)
        return found

    def by_hand(self, loss: Tensor, scale: float) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss * scale, [*self.trainable.values()], retain_graph=True, allow_unused=True)
        return {n: g / scale for n, g in zip(self.trainable, found, strict=True) if g is not None}

    def row(self, gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat([gradients.get(n, torch.zeros_like(self.trainable[n])).flatten() for n in self.trunk])


def _differ(one: Tensor, other: Tensor) -> bool:
    """By more than rounding does."""
    return bool((one - other).norm() > 0.01 * other.norm())


def _shares(each: Sequence[Tensor], share: Tensor | None) -> list[Tensor]:
    return [loss if share is None else loss * share[i] for i, loss in enumerate(each)]


def _detached(features: Features) -> Features:
    return features_from([t.detach().requires_grad_(t.requires_grad) for t in features.tensors()], features.kinds)


def _summed(loss: Tensor, tensors: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    pairs = zip(found, tensors, strict=True)
    return torch.cat([(torch.zeros_like(t) if g is None else g).float().sum(0).flatten() for g, t in pairs])


def _part(gradients: dict[str, Tensor], start: str) -> Tensor:
    return torch.cat([gradient.flatten() for name, gradient in gradients.items() if name.startswith(start)])


def _mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


@contextmanager
def standing(folder: Path, **changes: Any) -> Iterator[Stand]:
    phase = {"name": "half", "freeze": ["trunk@first:50%", "heads.depth"], "steps": 2}
    settings = {"balance": "sum", "phases": [phase], "cache": {"mode": "off"}, "audit": {"policy": "collect"}} | changes
    parts = tiny_parts(folder, **settings)
    trainer = Trainer(parts, folder, Tracker(parts.config.tracking, folder, "x", {}), quiet=True)
    # So small that nothing overflows.
    trainer.scaler._init_scale = 64.0  # type: ignore[attr-defined]
    with trainer.active(trainer.setup.phases[0]) as active:
        yield Stand(trainer, active)


LAYERS = {"trunk": {"name": "test_vit"}}  # LayerNorm, in which no image sees the others of its batch


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with standing(tmp_path_factory.mktemp("whole")) as stand:
        yield stand


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with standing(tmp_path_factory.mktemp("alone"), freeze_always=["type:BatchNorm2d"], **LAYERS) as stand:
        yield stand


@pytest.fixture(scope="module", params=["bf16-BatchNorm", "bf16-LayerNorm", "fp16-BatchNorm", "fp16-LayerNorm"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stand, Stand]]:
    """In half precision, and the same in float32."""
    precision, norm = request.param.split("-")
    own = LAYERS if norm == "LayerNorm" else {}
    folder = tmp_path_factory.mktemp("half")
    (folder / "full").mkdir()
    with standing(folder, precision=precision, **own) as stand, standing(folder / "full", **own) as full:
        yield stand, full


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=rtol * size + 1e-9, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_part_of_the_trunk_and_a_head_are_frozen(whole: Stand, method: str) -> None:
    found = whole.gradients(whole.warm(method), [whole.batch(0)])
    assert_near(found, whole.reference(whole.warm(method), [whole.batch(0)]))
    assert not any(name.startswith("heads.depth.") for name in found)


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_batches_are_one_large_batch(alone: Stand, method: str) -> None:
    num = NUM_BATCHES.get(method, 2)
    window = [alone.batch(8 * number) for number in range(num)]
    found = alone.gradients(alone.warm(method), window)
    if method in NUM_BATCHES:
        assert_near(found, alone.reference(alone.warm(method), window))
        return
    large = alone.gradients(alone.warm(method), [alone.batch(0, 16)])
    assert_near(large, alone.reference(alone.warm(method), [alone.batch(0, 16)]), rtol=1e-3)
    if method in BY_BATCH:
        with pytest.raises(AssertionError):
            assert_near(found, large)
        return
    assert_near(found, large, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_that_of_the_losses_alone(half: tuple[Stand, Stand], method: str) -> None:
    stand, full = half
    found = stand.gradients(stand.warm(method), [stand.batch(0)])
    # The sum of losses has one backward, in which gradients of several tasks are added in half precision.
    rtol = 2e-3 if method in BY_GRADIENTS else 3e-2
    assert_near(found, stand.reference(stand.warm(method), [stand.batch(0)]), rtol)
    if method not in CHOOSES:
        # The tolerance: 15 % of the gradient's length, of the trunk and of the heads.
        exact = full.gradients(full.warm(method), [full.batch(0)])
        for part in ("trunk.", "heads."):
            one, other = (_part(each, part) for each in (found, exact))
            assert (one - other).norm() <= 0.15 * other.norm(), f"{part} {float((one - other).norm() / other.norm())}"


@pytest.mark.parametrize("method", METHODS)
def test_tasks_without_labels_leave_the_step(whole: Stand, method: str) -> None:
    names = ("segmentation", "normals", "object")
    found = whole.gradients(whole.warm(method), [whole.batch(0)], names)
    assert_near(found, whole.reference(whole.warm(method), [whole.batch(0)], names))


@pytest.mark.parametrize("method", BY_GRADIENTS)
def test_gradients_of_features_give_the_weights_of_those_of_parameters(whole: Stand, method: str) -> None:
    mark = cell(method, "on: features")
    if mark != "equal":
        with pytest.raises(SettingError, match=r"balance\.on"):
            built(method, on="features")
        if mark == "own":
            found = whole.gradients(built(method, on="features", per_sample=True), [whole.batch(0)])
            assert all(gradient.isfinite().all() for gradient in found.values())
        return
    features = whole.warm(method, on="features")
    found = whole.gradients(features, [whole.batch(0)])
    reference = whole.reference(whole.warm(method, on="features"), [whole.batch(0)], on_features=True)
    assert_near(found, reference, rtol=1e-3)


@pytest.mark.parametrize("method", ["mgda", "config", "graddrop"])
def test_gradients_of_features_by_sample_are_one_vector(whole: Stand, method: str) -> None:
    found = whole.gradients(built(method, on="features", per_sample=True), [whole.batch(0)])
    features = whole.trainer.features(whole.batch(0), TASKS)
    leaves = _detached(features)
    tensors = [each for each in features.tensors() if each.requires_grad]
    cut = [each for each in leaves.tensors() if each.requires_grad]
    losses = whole.trainer.losses.each_loss(whole.batch(0), TASKS, leaves)
    by_task = [torch.autograd.grad(loss, cut, retain_graph=True, allow_unused=True) for loss in losses]
    rows = torch.stack(
        [torch.cat([(torch.zeros_like(t) if g is None else g).flatten() for g, t in zip(own, tensors, strict=True)])
         for own in by_task]
    )  # fmt: skip
    method_ = built(method).by_gradients
    assert method_ is not None
    combined = method_.combine(TaskGradients(rows, torch.stack(losses).detach())).of(rows)
    parts = [p.view_as(t) for p, t in zip(combined.split([t.numel() for t in tensors]), tensors, strict=True)]
    parameters = [whole.trainable[name] for name in whole.trunk]
    expected = torch.autograd.grad(tensors, parameters, parts)
    assert_near({name: found[name] for name in whole.trunk}, dict(zip(whole.trunk, expected, strict=True)))


@pytest.mark.parametrize("method", ["mgda", "gradnorm"])
def test_a_layer_gives_the_weights_and_the_whole_trunk_is_weighed(whole: Stand, method: str) -> None:
    layer = whole.trunk[-2:]
    balance = warm(method, "", 8, on={"layer": "trunk"})
    phase = replace(whole.active.phase, looks_at=tuple(layer))
    whole.active.phase, before = phase, whole.active.phase
    try:
        found = whole.gradients(balance, [whole.batch(0)])
    finally:
        whole.active.phase = before
    losses = whole.trainer.losses.each_loss(whole.batch(0), TASKS)
    own = [whole.by_hand(loss, 1.0) for loss in losses]
    rows = torch.stack([torch.cat([each[name].flatten() for name in layer]) for each in own])
    method_ = warm(method, "", 8).by_gradients
    assert method_ is not None
    weights = method_.combine(TaskGradients(rows, torch.stack(losses).detach())).weights
    assert weights is not None and _differ(weights, torch.ones(len(TASKS)))
    expected = weights @ torch.stack([whole.row(each) for each in own])
    torch.testing.assert_close(torch.cat([found[n].flatten() for n in whole.trunk]), expected, rtol=1e-3, atol=1e-5)


def test_a_layer_that_is_frozen_or_not_there_is_refused(tmp_path: Path) -> None:
    phases = [{"name": "half", "freeze": ["trunk.conv1"], "steps": 2}]
    for layer, message in (("trunk.conv1", "which are frozen"), ("trunk.layer9", "matches nothing")):
        file = tiny_config(tmp_path, balance={"method": "mgda", "on": {"layer": layer}}, phases=phases)
        with pytest.raises(ConfigError, match=rf"tiny\.yaml:\d+: balance\.on\.layer: .*{message}"):
            assemble(load_config(file), quiet=True)


# Until weights are others than those a method begins with: two passes of three batches, a step after the first losses.
NUM_STEPS = {"dwa": 7, "gradnorm": 3}


def phases_of(methods: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """A phase for each method, with rates so small that rounding does not grow."""
    common = {"lr": 1e-4, "optimizer": "sgd", "freeze": ["trunk@first:50%"]}
    return [
        {"name": method, "balance": balance_config(method), "steps": max(steps, NUM_STEPS.get(method, 0)), **common}
        for method in methods
    ]


SMALL: dict[str, Any] = {
    "tasks": TINY["tasks"],
    "data": {**TINY["data"], "num_train": 24, "num_val": 8},
    "tracking": {"mode": "disabled", "log_every_steps": 1},
    "checkpoint": {"every_steps": 1},
    "cache": {"mode": "off"},
    "audit": {"gradients_every_steps": 0},
}


def grad_norms(run_dir: Path) -> list[float]:
    return [row["train/grad_norm"] for row in read_metrics(run_dir) if "train/grad_norm" in row]


GROUPS = [("one", 1), ("modo", 2), ("sdmgrad", 3)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("group", "accumulate"), GROUPS)
def test_two_processes_take_the_steps_of_one(
    tmp_path: Path, cache_dir: Path, group: str, accumulate: int, strategy: str
) -> None:
    methods = [method for method in METHODS if method not in NUM_BATCHES] if group == "one" else [group]
    changes = SMALL | LAYERS | {"freeze_always": ["type:BatchNorm2d"], "optim": {"accumulate": accumulate}}
    changes["phases"] = phases_of(methods, 2)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    parts = tiny_parts(tmp_path / "one", **changes)
    # Adam makes of the rounding of two losses that are nearly equal a whole step of FAMO's weights.
    start = {n: p.detach().clone() for n, p in parts.root.named_parameters() if not n.startswith("balance.")}
    one = train(parts, quiet=True).run_dir
    started = command(2, tmp_path / "two", f"distributed.strategy={strategy}", **changes)
    code, said = finish(started, surroundings(cache_dir, folder=tmp_path / "two"))
    assert code == 0, said[-4000:]
    expected, found = grad_norms(one), grad_norms(tmp_path / "two/runs/tiny")
    of_step = [phase["name"] for phase in changes["phases"] for _ in range(phase["steps"])]
    for method, a, b in zip(of_step, expected, found, strict=True):
        assert a == pytest.approx(b, rel=2e-3), method
    ours, theirs = (read_model(each / "checkpoints/last") for each in (one, tmp_path / "two/runs/tiny"))
    way, apart = (torch.cat([(ours[n] - each[n]).flatten() for n in start]) for each in (start, theirs))
    assert apart.norm() < 1e-3 * way.norm()
    assert json.loads((tmp_path / "two/runs/tiny/audit.json").read_text())["ok"]


@pytest.mark.slow
@pytest.mark.parametrize(("group", "accumulate"), GROUPS)
def test_a_run_that_is_killed_in_every_method_resumes_to_the_same_bits(
    tmp_path: Path, group: str, accumulate: int
) -> None:
    methods = [method for method in METHODS if method not in NUM_BATCHES] if group == "one" else [group]
    changes: dict[str, Any] = SMALL | {"optim": {"accumulate": accumulate}, "phases": phases_of(methods, 3)}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    expected = train(tiny_parts(tmp_path / "whole", **changes), quiet=True).run_dir
    file = tiny_config(tmp_path / "broken", **changes)
    # In the last step of each method, for which it has those before to remember.
    for number in range(len(methods)):
        with pytest.MonkeyPatch.context() as patch:
            config, source = resumed_config(load_config(file, ["resume=auto"]))
            crash_in_step(patch, changes["phases"][number]["steps"] + (number > 0))
            with pytest.raises(Crash):
                train(assemble(config, quiet=True), quiet=True, source=source)
    config, source = resumed_config(load_config(file, ["resume=auto"]))
    found = train(assemble(config, quiet=True), quiet=True, source=source).run_dir
    assert_same(found, expected)


# The table


def cell(method: str, column: str) -> str:
    """`equal`, or a key of `NOTES`; the tests above hold every cell of it."""
    by_gradients = method in BY_GRADIENTS
    if column == "accumulated":
        return "by batch" if method in BY_BATCH else str(NUM_BATCHES.get(method, "equal"))
    if column == "on: features":
        if not by_gradients:
            return "no gradients"
        kinds = {"own": ("graddrop", "trimmedmean"), "rows": ("dbmtl", "moco")}
        kinds["batches"] = (*NUM_BATCHES,)
        return next((kind for kind, methods in kinds.items() if method in methods), "equal")
    return "equal"


def table() -> str:
    numbers = {note: number for number, note in enumerate(NOTES, start=1)}
    lines = [f"| method | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for method in METHODS:
        marks = [cell(method, column) for column in COLUMNS]
        shown = ["=" if mark == "equal" else f"({numbers[mark]})" for mark in marks]
        lines.append(f"| `{method}` | {' | '.join(shown)} |")
    notes = [f"{number}. {NOTES[note][0].upper()}{NOTES[note][1:]}." for note, number in numbers.items()]
    return "\n".join([*lines, "", *notes])


def test_the_table_of_the_page_is_this_one() -> None:
    before, rest = PAGE.read_text().split("<!-- matrix -->\n")
    found, after = rest.split("<!-- end of matrix -->")
    if os.environ.get("MTL_WRITE_DOCS"):
        PAGE.write_text(f"{before}<!-- matrix -->\n{table()}\n<!-- end of matrix -->{after}")
        return
    assert found.strip() == table()
