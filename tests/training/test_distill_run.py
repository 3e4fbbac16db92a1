"""Runs with a teacher: it never trains, its embeddings are what is learned, and a run resumes with the same teacher."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mtl.model.teachers
import mtl.training.loop
from crashes import SHORT, assert_same, crash, resume, run_whole
from distributed_runs import EQUAL, command, finish, surroundings
from mtl.audit import AuditError, GradientAudit
from mtl.cli import main
from mtl.config import ConfigError, load_config
from mtl.data import MemorySplit
from mtl.model.teachers import Teacher
from mtl.phases.plan import make_plan
from mtl.phases.plan.text import full_plan
from mtl.phases.setup import build_meta_setup
from mtl.training.run import train
from mtl.training.setup import RunSetup, assemble
from runs import TINY, read_metrics, read_model, tiny_config, tiny_parts
from test_distributed_run import assert_close, largest_difference

LIKE: dict[str, Any] = {"type": "distill", "teacher": {"name": "test_efficientnet", "weights": "none"}}
TASKS: dict[str, Any] = {"object": TINY["tasks"]["object"], "like": LIKE}
PHASES: list[dict[str, Any]] = [
    {"name": "heads", "freeze": ["trunk"], "epochs": 2, "cache": "ram", "lr": 2e-3},
    {"name": "alone", "tasks": ["object"], "epochs": 1, "lr": 1e-3},
    {"name": "all", "epochs": 1, "lr": 1e-3},
]
RUN: dict[str, Any] = {"tasks": TASKS, "phases": PHASES}
VIEWS: dict[str, Any] = {"data": {**TINY["data"], "augment": {"brightness": 0.2}}}


def teachers_in(run_dir: Path) -> dict[str, bytes]:
    found = read_model(run_dir / "checkpoints/last").items()
    return {name: tensor.numpy().tobytes() for name, tensor in found if name.startswith("teachers.")}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> tuple[RunSetup, dict[str, bytes]]:
    """The parts of a run that is over, and its teacher as it was before that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        parts = tiny_parts(tmp_path_factory.mktemp("run"), **RUN, optim={"ema_decay": 0.9, "accumulate": 2})
        state = {
            f"teachers.like.{name}": t.numpy().tobytes() for name, t in parts.teachers["like"].state_dict().items()
        }
        train(parts, quiet=True)
        return parts, state


# Frozen by contract


def test_a_teacher_keeps_every_bit_and_gets_no_gradient(parts: tuple[RunSetup, dict[str, bytes]]) -> None:
    setup, before = parts
    assert teachers_in(setup.config.run_dir) == before
    teacher = setup.teachers["like"]
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    setup.root.train()
    assert not any(module.training for module in teacher.modules())
    assert setup.model.heads["like"].training


def test_a_teacher_is_frozen_in_every_phase_in_no_optimizer_and_in_no_sum_of_gradients(
    parts: tuple[RunSetup, dict[str, bytes]],
) -> None:
    setup, before = parts
    tensors = set(dict(setup.teachers["like"].named_parameters()))
    for phase in setup.phases:
        names = phase.freeze.plan.names
        assert {f"teachers.like.{name}" for name in tensors} <= set(names.frozen)
        assert before.keys() <= {*names.frozen, *names.frozen_buffers}
        assert not any(name.startswith("teachers") for name in (*names.trainable, *names.free_buffers))
        assert not any(name.startswith("teachers") for name in phase.freeze.unreached)
        held = {id(parameter) for group in phase.groups for parameter in group["params"]}
        assert held.isdisjoint(id(parameter) for parameter in setup.teachers["like"].parameters())
    for phase in setup.plan.phases:
        assert "teachers" in phase.frozen.modules and phase.reduced_bytes == phase.trainable.bytes
    assert full_plan(setup.plan).count("teachers") == 2 * len(setup.phases), "frozen, and in eval mode"


def test_the_audit_covers_a_teacher_and_finds_nothing_to_warn_of(parts: tuple[RunSetup, dict[str, bytes]]) -> None:
    setup, before = parts
    audit = json.loads((setup.config.run_dir / "audit.json").read_text())
    assert audit["ok"] and [len(phase["hazards"]) for phase in audit["phases"]] == [0, 0, 0]
    for phase in audit["phases"]:
        assert before.keys() <= phase["frozen"]["fingerprints"].keys()
    assert main(["audit", str(setup.config.run_dir)]) == 0


@pytest.mark.parametrize("what", ["weight", "statistics", "gradient", "train mode"])
def test_a_teacher_that_is_touched_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    real = GradientAudit.after_backward
    found = tiny_parts(tmp_path, **RUN)
    trunk = found.teachers["like"].trunk

    def after_backward(audit: Any) -> None:
        parameter = next(trunk.parameters())
        if what == "weight":
            parameter.detach()[0, 0, 0, 0] += 1e-6
        elif what == "statistics":
            next(b for b in trunk.buffers() if b.is_floating_point())[0] += 1e-6
        elif what == "gradient":
            parameter.grad = torch.zeros_like(parameter)
        else:
            for module in trunk.modules():
                module.training = True
        real(audit)

    monkeypatch.setattr(mtl.training.loop.GradientAudit, "after_backward", after_backward)
    with pytest.raises(AuditError, match=r"teachers\.like\.trunk") as error:
        train(found, quiet=True)
    assert "a teacher never trains" in str(error.value) or what == "train mode"
    capsys.readouterr()


@pytest.mark.parametrize(
    ("phase", "index", "message"),
    [
        ({"train": ["teachers"]}, "train.0", "pattern 'teachers' would train teachers.like.trunk.conv_stem.weight"),
        ({"train": ["heads", "teachers.like.trunk.blocks"]}, "train.1", "'teachers.like.trunk.blocks' would train"),
        ({"train": ["**"]}, "train.0", "leave it out, or add !teachers after it"),
        ({"train": ["heads", "type:BatchNorm2d"]}, "train.1", "'type:BatchNorm2d' would train teachers.like.trunk."),
        ({"train": [r"re:.*\.running_mean", "heads"]}, "train.0", "running_mean, and a teacher never trains"),
        ({"freeze": ["trunk", "!teachers"]}, "freeze.1", "leave it out, or add teachers after it"),
        ({"freeze": ["**", "!~bias"]}, "freeze.1", "pattern '!~bias' would train teachers.like.trunk."),
    ],
)
def test_a_pattern_that_asks_for_a_teacher_to_train_is_refused(
    tmp_path: Path, phase: dict[str, Any], index: str, message: str
) -> None:
    file = tiny_config(tmp_path, tasks=TASKS, phases=[{"name": "a", "epochs": 1, **phase}])
    with pytest.raises(ConfigError) as error:
        build_meta_setup(load_config(file))
    (line,) = error.value.mistakes
    assert f"phases.a.{index}: " in line and message in line and "a teacher never trains" in line


@pytest.mark.parametrize(
    "freeze", [["**", "!heads"], ["teachers", "trunk"], ["type:BatchNorm2d", "!heads"], ["**", "!~bias", "teachers"]]
)
def test_patterns_that_freeze_a_teacher_or_leave_it_alone_are_taken(tmp_path: Path, freeze: list[str]) -> None:
    tasks = {**TASKS, "like": {**LIKE, "head": "mlp"}}
    freeze = [pattern for pattern in freeze if (pattern, freeze[0]) != ("!heads", "type:BatchNorm2d")]
    file = tiny_config(tmp_path, tasks=tasks, phases=[{"name": "a", "epochs": 1, "freeze": freeze}])
    (phase,) = build_meta_setup(load_config(file)).phases
    assert not any(name.startswith("teachers") for name in phase.freeze.plan.names.trainable)


def test_all_but_the_teachers_may_be_trained_by_name(tmp_path: Path) -> None:
    phase = {"name": "a", "epochs": 1, "train": ["**", "!teachers"]}
    (found,) = build_meta_setup(load_config(tiny_config(tmp_path, tasks=TASKS, phases=[phase]))).phases
    assert {name.split(".")[0] for name in found.freeze.plan.names.frozen} == {"teachers"}


# What is learned


@pytest.fixture
def as_numbers(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A data set of one's own with the images of the tiny run, and the embeddings of its teacher as numbers."""
    setup = tiny_parts(tmp_path, **RUN)
    for name, split in (("train", setup.train), ("val", setup.val)):
        batch = split.batch(torch.arange(len(split)))
        save_file({"images": batch.images, "like": split.labels_to_fit("like")}, tmp_path / f"{name}.safetensors")
    (tmp_path / "given.py").write_text(
        "from pathlib import Path\nfrom safetensors.torch import load_file\nfrom torch.utils.data import Dataset\n\n"
        "class Given(Dataset):\n"
        "    def __init__(self, split):\n"
        "        self.all = load_file(Path(__file__).parent / f'{split}.safetensors')\n"
        "    def __len__(self): return len(self.all['images'])\n"
        "    def __getitem__(self, i):\n"
        "        return {'image': self.all['images'][i].permute(2, 0, 1), 'like': self.all['like'][i]}\n"
    )
    yield {"name": "given:Given", "image_size": 32, "batch_size": 8}
    sys.modules.pop("given", None)


def test_learning_from_a_teacher_is_a_regression_on_its_embeddings(tmp_path: Path, as_numbers: dict[str, Any]) -> None:
    phases = [PHASES[0], PHASES[2]]
    settings = {"phases": phases, "balance": "mean", "data": as_numbers}
    width = load_file(tmp_path / "train.safetensors")["like"].shape[1]
    tasks = {
        "taught": {"like": {**LIKE, "loss": "mse"}},
        "given": {"like": {"type": "regression", "num_outputs": width, "loss": "mse"}},
    }
    for name, own in tasks.items():
        train(tiny_parts(tmp_path, **settings, tasks=own, name=name), quiet=True)
    taught, given = (read_model(tmp_path / f"runs/{name}/checkpoints/last") for name in tasks)
    assert {name for name in taught if not name.startswith("teachers.")} == given.keys()
    # The constant is a mean that is added up in another order.
    for name, tensor in given.items():
        torch.testing.assert_close(taught[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_data_set_without_any_label_is_enough(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(
        "import torch\nfrom torch.utils.data import Dataset\n\nclass Bare(Dataset):\n"
        "    def __init__(self, split): pass\n    def __len__(self): return 12\n"
        "    def __getitem__(self, i): return {'image': torch.full((3, 40, 40), 20 * i, dtype=torch.uint8)}\n"
    )
    try:
        for memory_gb in (4.0, 0.0):
            data = {"name": "bare:Bare", "image_size": 32, "batch_size": 4, "memory_gb": memory_gb}
            tasks = {"like": LIKE}
            file = tiny_config(
                tmp_path, data=data, tasks=tasks, balance="mean", phases=PHASES[:1], name=f"m{memory_gb}"
            )
            assert main(["data", "check", str(file)]) == 0
            assert main(["train", "-q", str(file)]) == 0
    finally:
        sys.modules.pop("bare", None)
    one, other = (read_model(tmp_path / f"runs/m{gb}/checkpoints/last") for gb in (4.0, 0.0))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_metrics_of_a_run_are_those_of_its_outputs_and_the_teachers(parts: tuple[RunSetup, dict[str, bytes]]) -> None:
    setup, _ = parts
    batch = setup.val.batch(torch.arange(len(setup.val)))
    setup.model.load_state_dict(
        {
            n: t
            for n, t in read_model(setup.config.run_dir / "checkpoints/last").items()
            if n in setup.model.state_dict()
        }
    )
    with torch.no_grad():
        output = setup.model.eval()(batch.images)["like"].double()
        label = setup.teachers["like"](batch.images).double()
    expected = float((nn.functional.normalize(output) * nn.functional.normalize(label)).sum(dim=1).mean())
    logged = [row for row in read_metrics(setup.config.run_dir) if "val/like/cosine" in row][-1]
    assert logged["val/like/cosine"] == pytest.approx(expected, rel=1e-5)
    assert logged["val/like/mse"] == pytest.approx(float((output - label).square().mean()), rel=1e-5)


@pytest.mark.slow
def test_embeddings_do_not_depend_on_the_precision_of_the_run(tmp_path: Path) -> None:
    labels = []
    for precision in ("fp32", "bf16", "fp16"):
        setup = tiny_parts(tmp_path, **RUN, precision=precision, name=precision)
        labels.append(setup.train.labels_to_fit("like"))
        assert train(setup, quiet=True).report.ok
    assert torch.equal(labels[0], labels[1]) and torch.equal(labels[0], labels[2])


# Computed once


def test_a_teacher_sees_every_image_once_and_epochs_on_kept_features_read_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, read = [], []
    real, rows = Teacher.forward, MemorySplit.rows

    def counted(teacher: Teacher, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return real(teacher, images)

    def counted_rows(split: MemorySplit, indices: torch.Tensor, with_images: bool, view: Any = None) -> Any:
        read.append(len(indices) if with_images else 0)
        return rows(split, indices, with_images, view)

    monkeypatch.setattr(mtl.model.teachers.Teacher, "forward", counted)
    monkeypatch.setattr(MemorySplit, "rows", counted_rows)
    (phase,) = phases = [{"name": "a", "freeze": ["trunk"], "epochs": 1, "cache": "ram"}]
    numbers = []
    for epochs in (2, 5):
        phase["epochs"] = epochs
        seen.clear()
        setup = tiny_parts(tmp_path, tasks=TASKS, phases=phases, name=f"e{epochs}")
        real_images = sum(each for each in seen if each)
        read.clear()
        train(setup, quiet=True)
        assert sum(seen) == real_images
        numbers.append(sum(read))
    assert numbers[0] == numbers[1], "three epochs more read nothing"


def test_with_random_views_a_teacher_runs_with_each_step_of_its_task_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    real = Teacher.forward
    setup = tiny_parts(tmp_path, **RUN, **VIEWS)
    running = [""]

    def counted(teacher: Teacher, images: torch.Tensor) -> torch.Tensor:
        seen[running[0]] = seen.get(running[0], 0) + len(images)
        return real(teacher, images)

    enter = setup.train.begin_phase

    def begin(tasks: Any) -> None:
        running[0] = "+".join(tasks)
        enter(tasks)

    monkeypatch.setattr(mtl.model.teachers.Teacher, "forward", counted)
    monkeypatch.setattr(setup.train, "begin_phase", begin)
    train(setup, quiet=True)
    assert seen == {"object+like": 3 * 40}


def test_the_plan_counts_a_teacher_that_runs_with_every_step(tmp_path: Path) -> None:
    flops = [
        make_plan(build_meta_setup(load_config(tiny_config(tmp_path, **RUN, **changes)))).phases
        for changes in ({}, VIEWS)
    ]
    once, always = ([phase.flops.forward for phase in phases] for phases in flops)
    assert always[1] == once[1] and always[0] - once[0] == always[2] - once[2] > 0
    assert [phase.flops.backward for phase in flops[0]] == [phase.flops.backward for phase in flops[1]]


# Resumed


@pytest.mark.parametrize(
    "changes", [pytest.param({}, marks=pytest.mark.slow, id="kept"), pytest.param(VIEWS, id="with each step")]
)
def test_a_run_that_ends_in_a_step_resumes_to_the_same_bits(
    tmp_path: Path, cache_dir: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {"tasks": TASKS, "balance": "uw", **changes}
    whole = run_whole(tmp_path / "whole", cache_dir, {**SHORT, **settings})
    # Within the second phase, between two checkpoints.
    crash(tmp_path, 10, **settings)
    assert_same(resume(tmp_path, **settings), whole)


@pytest.fixture
def with_file(tmp_path: Path) -> dict[str, Any]:
    """Tasks whose teacher has its weights in `teacher.safetensors`."""
    setup = tiny_parts(tmp_path, **RUN)
    save_file(dict(setup.teachers["like"].trunk.state_dict()), tmp_path / "teacher.safetensors")
    teacher = {**LIKE["teacher"], "weights": str(tmp_path / "teacher.safetensors")}
    return {"tasks": {**TASKS, "like": {**LIKE, "teacher": teacher}}}


def other_weights(file: Path) -> None:
    state = load_file(file)
    state["conv_stem.weight"][0, 0, 0, 0] += 1e-6
    save_file(state, file)


@pytest.mark.parametrize("override", [[], ["resume_override=true"]])
def test_a_run_is_not_resumed_with_another_teacher(
    tmp_path: Path, with_file: dict[str, Any], override: list[str]
) -> None:
    crash(tmp_path, 4, **with_file)
    kept = tmp_path / "runs/tiny/checkpoints/last/state.json"
    before = kept.read_bytes()
    other_weights(tmp_path / "teacher.safetensors")
    with pytest.raises(ConfigError, match=r"was trained with another teacher of like: its weights have changed since"):
        resume(tmp_path, *override, **with_file)
    assert kept.read_bytes() == before


def test_a_run_is_not_begun_from_a_checkpoint_with_another_teacher(tmp_path: Path, with_file: dict[str, Any]) -> None:
    run_dir = crash(tmp_path, 4, **with_file)
    run_dir.rename(tmp_path / "first")
    with_file["tasks"]["like"]["teacher"] = {"name": "test_efficientnet_ln", "weights": "none"}
    with pytest.raises(ConfigError, match=r"tasks\.like\.teacher\.name: test_efficientnet -> test_efficientnet_ln"):
        resume(tmp_path, f"resume={tmp_path / 'first'}", **with_file)


def test_the_report_of_a_run_shows_its_own_teacher_after_that_has_changed(
    tmp_path: Path, with_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_config(tmp_path, **with_file, phases=PHASES[:1])
    assert main(["train", "-q", str(file)]) == 0
    digests = []
    real = mtl.model.teachers.load_teachers

    def loaded(teachers: Any, checkpoint: Path) -> None:
        real(teachers, checkpoint)
        digests.extend(teacher.digest() for teacher in teachers.values())

    monkeypatch.setattr("mtl.training.setup.load_teachers", loaded)
    expected = assemble(load_config(file), quiet=True).teachers["like"].digest()
    other_weights(tmp_path / "teacher.safetensors")
    (tmp_path / "runs/tiny/report.html").unlink()
    assert main(["report", str(tmp_path / "runs/tiny")]) == 0
    assert (tmp_path / "runs/tiny/report.html").is_file() and digests == [expected]


def test_a_run_learns_from_the_trunk_of_another_one_on_data_of_ones_own(
    tmp_path: Path, as_numbers: dict[str, Any]
) -> None:
    first = {"like": {"type": "regression", "num_outputs": 2, "label": "like"}}
    first["like"]["num_outputs"] = load_file(tmp_path / "train.safetensors")["like"].shape[1]
    train(tiny_parts(tmp_path, tasks=first, data=as_numbers, balance="mean", phases=PHASES[:1], name="old"), quiet=True)
    sys.modules.pop("given")
    # Nothing of the teacher's data is needed.
    (tmp_path / "given.py").unlink()
    tasks = {**TASKS, "like": {"type": "distill", "teacher": {"run": str(tmp_path / "runs/old")}}}
    assert main(["train", "-q", str(tiny_config(tmp_path, tasks=tasks, phases=PHASES))]) == 0
    best = read_model(tmp_path / "runs/old/checkpoints/best")
    found = read_model(tmp_path / "runs/tiny/checkpoints/last")
    for name, tensor in best.items():
        if name.startswith("trunk."):
            assert torch.equal(found[f"teachers.like.{name}"], tensor)
    shutil.rmtree(tmp_path / "runs/old")
    with pytest.raises(ConfigError, match=r"runs/old is not there; expected the directory of a run"):
        build_meta_setup(load_config(tmp_path / "tiny.yaml"))


# In several processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"data": {**EQUAL["data"], "augment": {"brightness": 0.2}}}], ids=["kept", "views"]
)
def test_two_processes_train_what_one_does(tmp_path: Path, cache_dir: Path, changes: dict[str, Any]) -> None:
    own = {"tasks": TASKS, "balance": "uw", **changes}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    code, said = finish(command(2, tmp_path / "two", **own), surroundings(cache_dir, folder=tmp_path / "two"))
    assert code == 0, said[-4000:]
    one = run_whole(tmp_path / "one", cache_dir, {**EQUAL, **own})
    two = tmp_path / "two/runs/tiny"
    assert_close(two, one)
    weights = [read_model(folder / "checkpoints/last") for folder in (two, one)]
    assert largest_difference(*weights) < 1e-4
    assert teachers_in(one) == teachers_in(two)
    assert json.loads((two / "audit.json").read_text())["ok"] and not list(two.glob("audit.rank-*"))
    # Of each step, the gradients of trainable parameters are sent, and nothing of the teacher.
    for phase in json.loads((tmp_path / "two/0.json").read_text()):
        assert phase["sent"] == phase["steps"] * phase["trainable"]
