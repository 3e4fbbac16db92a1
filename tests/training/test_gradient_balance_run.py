"""Runs whose tasks' gradients are balanced: 1 and 2 processes, resume, frozen trunks, kept features, and refusals."""

from __future__ import annotations

import json
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import mtl.training.loop
from crashes import Crash, assert_same, crash_in_step
from distributed_runs import command, finish, surroundings
from mtl.audit.offline.run import audit_run
from mtl.config import ConfigError, load_config
from mtl.distributed.world import World
from mtl.optim.balance.gradient_weights import GradientWeighting
from mtl.optim.balance.subset import Subset
from mtl.phases.plan import make_plan
from mtl.phases.setup import build_meta_setup, build_model_setup
from mtl.training.nonfinite import NotFiniteError
from mtl.training.resume import resumed_config
from mtl.training.run import train
from mtl.training.setup import _check_processes, assemble
from mtl.training.step import StepLosses
from runs import TINY, read_metrics, read_model, tiny_config, tiny_parts
from test_distributed_run import assert_close, largest_difference
from test_nonfinite import plant

HALF = ["trunk@first:50%"]
PHASES: list[dict[str, Any]] = [
    {"name": "heads", "freeze": ["trunk"], "epochs": 1, "cache": "ram", "balance": "mgda"},
    {"name": "half", "freeze": HALF, "epochs": 2, "cache": "ram", "balance": "gradvac"},
    {"name": "all", "steps": 4, "lr": 1e-3, "balance": {"method": "pcd", "options": {"beta": 0.5}}},
    {"name": "last", "steps": 3, "lr": 1e-3, "balance": "mgda"},
]
# No BatchNorm that trains, so that a step does not depend on how its batch is spread.
EQUAL: dict[str, Any] = {
    "trunk": {"name": "test_vit"},
    "tasks": TINY["tasks"],
    "data": {**TINY["data"], "num_train": 20},
    "optim": {"clip_norm": 1.0},
    "freeze_always": ["type:BatchNorm2d"],
    "tracking": {"mode": "disabled", "log_every_steps": 1},
    "checkpoint": {"every_steps": 1},
    "phases": PHASES,
}


class Seen:
    """The weights of every step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.weights: list[list[float]] = []
        real = GradientWeighting.__call__

        def call(weighting: GradientWeighting, gramian: torch.Tensor, subset: Subset | None = None) -> torch.Tensor:
            weights = real(weighting, gramian, subset)
            # Each method is tried once on gradients that are orthogonal.
            if not torch.equal(gramian, torch.eye(len(gramian)).to(gramian)):
                self.weights.append(weights.tolist())
            return weights

        patch.setattr(GradientWeighting, "__call__", call)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        return train(tiny_parts(tmp_path_factory.mktemp("one"), **EQUAL), quiet=True).run_dir


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_send_a_trunk_more_for_each_task(
    tmp_path: Path, one: Path, cache_dir: Path
) -> None:
    code, said = finish(command(2, tmp_path, **EQUAL), surroundings(cache_dir, folder=tmp_path))
    assert code == 0, said[-4000:]
    run_dir = tmp_path / "runs/tiny"
    assert_close(run_dir, one)
    assert largest_difference(*(read_model(each / "checkpoints/last") for each in (run_dir, one))) < 1e-4
    assert audit_run(run_dir).findings == []
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert [phase["trunk"] > 0 for phase in ranks[0]] == [False, True, True, True]
    for phase in ranks[0]:
        assert phase["sent"] == phase["steps"] * phase["trainable"]
        assert phase["by_task"] == phase["steps"] * 4 * phase["trunk"]
    plan = make_plan(build_meta_setup(load_config(tmp_path / "tiny.yaml")), world_size=2)
    assert [phase.reduced_bytes for phase in plan.phases] == [
        (phase["sent"] + phase["by_task"]) // phase["steps"] for phase in ranks[0]
    ]


@pytest.mark.slow
def test_two_processes_combine_whole_gradients_as_one_does(tmp_path: Path, cache_dir: Path) -> None:
    phases = [{"name": method, "steps": 3, "lr": 1e-3, "balance": method} for method in ("config", "graddrop")]
    changes = EQUAL | {"phases": phases}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = train(tiny_parts(tmp_path / "one", **changes), quiet=True).run_dir
    code, said = finish(command(2, tmp_path / "two", **changes), surroundings(cache_dir, folder=tmp_path / "two"))
    assert code == 0, said[-4000:]
    assert_close(tmp_path / "two/runs/tiny", one)
    assert audit_run(tmp_path / "two/runs/tiny").findings == []


@pytest.mark.parametrize("number", [pytest.param(5, id="gradvac", marks=pytest.mark.slow), pytest.param(12, id="pcd")])
def test_a_run_that_is_broken_off_resumes_to_the_same_bits(
    tmp_path: Path, one: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_in_step(patch, number)
        with pytest.raises(Crash):
            train(tiny_parts(tmp_path, **EQUAL), quiet=True)
    state = json.loads((tmp_path / "runs/tiny/checkpoints/last/state.json").read_text())
    assert state["step"] == number - 1
    config = load_config(tiny_config(tmp_path, **EQUAL), ["resume=auto"])
    config, source = resumed_config(config)
    assert source is not None
    train(assemble(config, quiet=True), quiet=True, source=source)
    assert_same(tmp_path / "runs/tiny", one)


@pytest.mark.slow
def test_blocks_of_one_size_that_train_in_turns_share_no_memory(tmp_path: Path) -> None:
    """As if the second phase had a method of its own, also if the run is killed in it and resumed."""
    own = {"method": "dbmtl", "options": {"beta": 0.9}}
    expected, *both = (tmp_path / name for name in ("own", "shared", "broken"))
    for folder, second in ((expected, own), *((folder, {"method": "dbmtl"}) for folder in both)):
        folder.mkdir()
        blocks = [(0, "dbmtl"), (1, second)]
        phases = [{"name": f"{n}", "train": [f"trunk.blocks.{n}"], "steps": 3, "balance": b} for n, b in blocks]
        changes = EQUAL | {"phases": phases, "trunk": {"name": "test_vit", "options": {"depth": 2}}}
        if folder.name == "broken":
            file = tiny_config(folder, **changes)
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
                crash_in_step(patch, 5)
                train(assemble(load_config(file), quiet=True), quiet=True)
            config, source = resumed_config(load_config(file, ["resume=auto"]))
            train(assemble(config, quiet=True), quiet=True, source=source)
        else:
            train(tiny_parts(folder, **changes), quiet=True)
    for folder in both:
        weights, theirs = (read_model(each / "runs/tiny/checkpoints/last") for each in (folder, expected))
        assert weights.keys() == theirs.keys() and all(torch.equal(weights[n], theirs[n]) for n in weights), folder


def test_a_frozen_trunk_leaves_nothing_to_balance_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, heads = Seen(monkeypatch), {"phases": [{"name": "heads", "freeze": ["trunk"], "epochs": 2}]}
    with caplog.at_level(logging.INFO, "mtl"):
        got = train(tiny_parts(tmp_path, "balance=mgda", **heads), quiet=True)
    said = "heads: gradients are not balanced: no task reaches trainable parameters of the trunk; losses are summed"
    assert [record.getMessage() for record in caplog.records].count(said) == 1
    assert seen.weights == [] and got.report.ok
    plain = train(tiny_parts(tmp_path, "balance=sum", "name=sum", **heads), quiet=True)
    assert read_losses(got.run_dir) == read_losses(plain.run_dir)


def test_a_task_alone_on_what_is_trained_of_the_trunk_is_not_balanced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    phases = [
        {"name": "alone", "tasks": ["depth"], "steps": 1},
        {"name": "norm", "train": ["trunk.norm", "heads"], "steps": 1},
        {"name": "all", "steps": 1},
    ]
    parts = tiny_parts(tmp_path, "balance=mgda", trunk={"name": "test_vit"}, phases=phases)
    alone, norm, every = parts.phases
    # Dense heads read maps from before the last norm.
    assert (alone.sharing, norm.sharing, every.sharing) == (("depth",), ("object",), tuple(TINY["tasks"]))
    assert [phase.balances_gradients for phase in parts.phases] == [False, False, True]
    with caplog.at_level(logging.INFO, "mtl"):
        assert train(parts, quiet=True).report.ok
    said = "alone: gradients are not balanced: only depth reaches trainable parameters of the trunk; losses are summed"
    assert said in caplog.messages


def read_losses(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key.startswith(("train/loss", "val/"))}
        for row in read_metrics(run_dir)
    ]


@pytest.mark.parametrize(
    "change",
    [
        "phases.half.cache=off",
        pytest.param("trunk.checkpointing=true", marks=pytest.mark.slow),
        pytest.param("audit.gradients_every_steps=1", marks=pytest.mark.slow),
    ],
)
def test_what_changes_no_bit_of_a_run_changes_none_of_one_with_balanced_gradients(tmp_path: Path, change: str) -> None:
    phases = [{"name": "half", "freeze": HALF, "epochs": 2, "cache": "ram", "balance": "imtlg"}]
    settings = {"trunk": {"name": "test_efficientnet"}, "phases": phases}
    runs = [
        train(tiny_parts(tmp_path, f"name=run-{number}", *change_of, **settings), quiet=True)
        for number, change_of in enumerate([(), (change,)])
    ]
    assert all(run.report.ok for run in runs)
    one, other = (read_model(run.run_dir / "checkpoints/last") for run in runs)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_weights_follow_the_gradients_and_differ_from_task_to_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    train(tiny_parts(tmp_path, "balance=mgda", phases=[{"name": "all", "steps": 4}]), quiet=True)
    assert len(seen.weights) == 4
    for weights in seen.weights:
        assert sum(weights) == pytest.approx(1) and min(weights) >= 0 and len({*weights}) == 4


@pytest.mark.parametrize("on", [[], ["balance.on=features"]], ids=["parameters", "features"])
def test_no_graph_of_a_step_is_there_in_the_forward_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: list[str]
) -> None:
    losses: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    real = StepLosses.each_loss

    def each_loss(objective: StepLosses, *arguments: Any) -> list[torch.Tensor]:
        alive.append(sum(each() is not None for each in losses))
        found = real(objective, *arguments)
        losses.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr(StepLosses, "each_loss", each_loss)
    train(tiny_parts(tmp_path, "balance.method=mgda", *on, phases=[{"name": "all", "steps": 4}]), quiet=True)
    assert alive == [0] * 4


@pytest.mark.parametrize("on", ["features", {"layer": "trunk.layer4"}])
def test_gradients_are_analysed_through_features_as_well(
    tmp_path: Path, on: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In the first step, whose weights are those that every run begins with."""
    found = []
    for name, balance in (("sum", {"method": "sum"}), ("cut", {"method": "mgda", "on": on})):
        phases = [{"name": "all", "freeze": HALF, "steps": 2, "balance": balance}]
        run_dir = train(tiny_parts(tmp_path, f"name={name}", phases=phases), quiet=True).run_dir
        rows = [row for row in read_metrics(run_dir) if "grad/conflict_share" in row]
        found.append({key: value for key, value in rows[0].items() if key.startswith("grad/")})
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[1]["grad/norm/depth"] > 0
    assert not [record for record in caplog.records if "no task's loss reaches" in record.getMessage()]


# Losses that are not finite


@pytest.mark.parametrize("method", ["mgda", "pcgrad", "imtlg", "config", "graddrop"])
def test_a_loss_that_is_not_finite_is_what_it_always_is(tmp_path: Path, method: str) -> None:
    phases = [{"name": "a", "epochs": 1}]
    parts = tiny_parts(tmp_path, f"balance={method}", phases=phases)
    plant(parts)
    with pytest.raises(NotFiniteError, match="train/loss/normals is inf"):
        train(parts, quiet=True)
    parts = tiny_parts(tmp_path, f"balance={method}", "name=skips", "not_finite=skip", phases=phases)
    plant(parts)
    result = train(parts, quiet=True)
    assert result.report.ok
    assert read_metrics(result.run_dir)[-1]["train/skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in read_model(result.run_dir / "checkpoints/last").values())


def test_what_a_method_has_gathered_is_put_back_when_a_step_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tiny_parts(tmp_path, "balance=gradvac", "not_finite=skip", phases=[{"name": "a", "steps": 3}])
    memories: list[Any] = []
    real = mtl.training.loop.GradientAudit.after_step

    def after(audit: Any) -> None:
        memories.append(parts.phases[0].balance.state()["weighting"]["_phi_t"])
        real(audit)

    finite = iter([True, False, True])
    monkeypatch.setattr(mtl.training.loop.GradientAudit, "after_step", after)
    monkeypatch.setattr("mtl.training.loop.is_finite", lambda _: next(finite))
    monkeypatch.setattr(
        "mtl.training.tracking.steps.StepLog.what_is_wrong", lambda *_: NotFiniteError("x", 0.0, 2, "a", [])
    )
    train(parts, quiet=True)
    assert torch.equal(memories[0], memories[1]) and not torch.equal(memories[1], memories[2])


# What is refused, and what is said


@pytest.mark.parametrize(
    ("balance", "accumulate", "message"),
    [
        ({"method": "mgda", "on": "features"}, 2, r"balance\.on=features compares .* expected 1, got 2"),
        ({"method": "mgda", "on": {"layer": "trunk"}}, 2, r"balance\.on=a layer compares .* expected 1, got 2"),
        ("modo", 1, "balance modo compares 2 independent batches in a step; expected 2, got 1"),
        ("sdmgrad", 2, "balance sdmgrad compares 3 independent batches in a step; expected 3, got 2"),
    ],
)
def test_accumulation_that_a_method_cannot_have_is_refused(
    tmp_path: Path, balance: Any, accumulate: int, message: str
) -> None:
    file = tiny_config(tmp_path, balance=balance, optim={"accumulate": accumulate})
    with pytest.raises(ConfigError, match=rf"(tiny\.yaml:\d+|default): optim\.accumulate: {message}"):
        build_meta_setup(load_config(file))


@pytest.mark.parametrize(
    ("method", "is_said"), [("geometricmean", True), ("famo", True), ("uw", False), ("dwa", False)]
)
def test_losses_that_do_not_add_up_over_the_batches_of_a_step_are_warned_of(
    tmp_path: Path, method: str, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    phases = [{"name": "a", "freeze": ["trunk"], "steps": 2}]
    train(tiny_parts(tmp_path, f"balance={method}", "optim.accumulate=2", phases=phases), quiet=True)
    said = [r.getMessage() for r in caplog.records if "combines each of a step's 2 batches by itself" in r.getMessage()]
    assert len(said) == is_said


def test_the_plan_counts_a_backward_for_each_task(tmp_path: Path) -> None:
    phases = [
        {"name": "sum", "steps": 1, "balance": "sum"},
        {"name": "mgda", "steps": 1, "balance": "mgda"},
        {"name": "frozen", "freeze": ["trunk"], "steps": 1, "balance": "mgda"},
        {"name": "frozen-sum", "freeze": ["trunk"], "steps": 1, "balance": "sum"},
    ]
    config = load_config(tiny_config(tmp_path, phases=phases))
    plain, by_task, frozen, frozen_sum = make_plan(build_meta_setup(config)).phases
    trunk = sum(p.nbytes for p in build_meta_setup(config).model.trunk.parameters())
    assert by_task.reduced_bytes == plain.reduced_bytes + 4 * trunk
    assert by_task.memory.gradients == plain.memory.gradients + 4 * trunk
    # The heads, which cost more than this trunk does, are gone back through once.
    assert 1.5 < by_task.flops.backward / plain.flops.backward < 4
    assert (frozen.reduced_bytes, frozen.flops) == (frozen_sum.reduced_bytes, frozen_sum.flops)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_run_balances_the_same(tmp_path: Path) -> None:
    phases = [{"name": "all", "freeze": HALF, "steps": 3}]
    runs = [
        train(tiny_parts(tmp_path, "balance=mgda", f"compile={so}", f"name=compile-{so}", phases=phases), quiet=True)
        for so in ("true", "false")
    ]
    assert runs[0].report.ok
    compiled, plain = (read_losses(run.run_dir)[:3] for run in runs)
    for got, expected in zip(compiled, plain, strict=True):
        assert got == pytest.approx(expected, rel=1e-3)


def test_features_of_each_image_are_compared_in_one_process(tmp_path: Path) -> None:
    phases = [{"name": "a", "epochs": 1, "balance": {"method": "mgda", "on": "features", "per_sample": True}}]
    setup = build_model_setup(load_config(tiny_config(tmp_path, phases=phases)))
    with pytest.raises(ConfigError, match=r"phases\.(0|a)\.balance\.per_sample: each process has features of other"):
        _check_processes(setup, World(0, 2, 0))
