"""Runs on several data sets: mixed batches, one set a batch, kept features, crashes, and two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from crashes import SHORT, assert_same, crash, resume, run_whole
from distributed_runs import command, finish, surroundings
from mtl.cli import main
from mtl.config import ConfigError, load_config
from mtl.data import training_batches
from mtl.training.setup import RunSetup, assemble
from pages import code_blocks
from runs import read_metrics, read_model, tiny_config, tiny_parts
from tables import picture

SETS: dict[str, Any] = {
    "rooms": {"name": "scenes", "num_train": 24, "num_val": 8},
    "shop": {"name": "multifashion", "num_train": 12, "num_val": 6},
}
DATA: dict[str, Any] = {"name": "mixed", "image_size": 32, "batch_size": 6, "sets": SETS}
TASKS: dict[str, Any] = {
    "segmentation": {"type": "segmentation", "num_classes": 13},
    "left": {"type": "classification", "num_classes": 10},
}
PHASES = [{"name": "a", "freeze": ["trunk"], "epochs": 2}, {"name": "b", "freeze": ["trunk.conv1"], "steps": 6}]


def settings(mix: Any = "uniform", **changes: Any) -> dict[str, Any]:
    own = {"data": DATA | {"mix": mix}, "tasks": TASKS, "phases": PHASES, "balance": "uw", "optim": {"ema_decay": 0.9}}
    return SHORT | own | changes


def batches_of(setup: RunSetup, phase: int = 0) -> list[Any]:
    own = setup.phases[phase]
    return list(training_batches(setup.train, own.batch_size, 0, 0, order=own.order))


def test_images_have_the_labels_of_their_data_set_and_none_of_others(tmp_path: Path) -> None:
    setup = tiny_parts(tmp_path, **settings())
    train = setup.train
    assert (len(train), len(setup.val), train.channels) == (36, 14, 3)
    batch = train.batch(torch.tensor([30, 2, 24]))
    assert (batch.labels["segmentation"][[0, 2]] == 255).all() and (batch.labels["segmentation"][1] < 13).all()
    assert batch.labels["left"].tolist() == [
        int(train.labels_to_fit("left")[6]),
        -1,
        int(train.labels_to_fit("left")[0]),
    ]
    assert batch.images.shape == (3, 32, 32, 3) and torch.equal(batch.images[0, ..., 0], batch.images[0, ..., 2])
    assert not batch.lacking
    assert train.batch(torch.tensor([1, 2])).lacking == {"left"}
    assert len(train.labels_to_fit("segmentation")) == 24
    assert train.examples(5).tolist() == [0, 1, 2, 24, 25] and len(setup.val.examples(99)) == 14


@pytest.mark.parametrize("mix", ["uniform", "round_robin"])
def test_a_crashed_run_resumes_to_the_same_bits(
    tmp_path: Path, cache_dir: Path, mix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_whole(tmp_path / "whole", cache_dir, settings(mix))
    monkeypatch.setenv("MTL_CACHE_DIR", str(cache_dir))
    (tmp_path / "crashed").mkdir()
    crash(tmp_path / "crashed", 7, **settings(mix))
    assert_same(before, resume(tmp_path / "crashed", **settings(mix)))


def test_kept_features_are_those_of_the_right_images(tmp_path: Path, cache_dir: Path) -> None:
    changes = settings("round_robin", phases=PHASES[:1])
    one = run_whole(tmp_path / "kept", cache_dir, changes | {"cache": {"mode": "ram"}})
    other = run_whole(tmp_path / "computed", cache_dir, changes | {"cache": {"mode": "off"}})
    for name, tensor in read_model(one / "checkpoints/last").items():
        torch.testing.assert_close(tensor, read_model(other / "checkpoints/last")[name], rtol=1e-4, atol=1e-6)


def test_a_step_without_labels_of_a_task_has_no_loss_of_it_and_leaves_its_head(tmp_path: Path, cache_dir: Path) -> None:
    phases = [{"name": "a", "train": ["heads"], "steps": 1, "optimizer": {"name": "sgd", "options": {"momentum": 0.9}}}]
    data = DATA | {"mix": "round_robin"}
    run_dir = run_whole(tmp_path / "run", cache_dir, settings(data=data, phases=phases))
    (row,) = [row for row in read_metrics(run_dir) if "train/loss" in row]
    assert "train/loss/segmentation" in row and "train/loss/left" not in row
    # Not even weight decay has moved the other head.
    begun = dict(tiny_parts(tmp_path, **settings(data=data, phases=phases)).model.named_parameters())
    now = read_model(run_dir / "checkpoints/last")
    moved = {name for name, tensor in begun.items() if not torch.equal(tensor, now[name])}
    assert any(name.startswith("heads.segmentation.") for name in moved)
    assert not any(name.startswith("heads.left.") for name in moved)


def test_a_phase_draws_from_the_sets_of_its_tasks_alone(tmp_path: Path) -> None:
    phases = [{"name": "a", "epochs": 1, "tasks": ["left"]}, {"name": "b", "epochs": 1}]
    setup = tiny_parts(tmp_path, **settings(phases=phases))
    assert [phase.steps_per_epoch for phase in setup.phases] == [2, 8]
    assert all((batch.indices >= 24).all() for batch in batches_of(setup))
    counts = [int((batch.indices < 24).sum()) for batch in batches_of(setup, 1)]
    assert counts == [3] * 8
    assert [phase.mix for phase in setup.plan.phases] == ["shop 1 of them", "rooms 0.5, shop 0.5 of them"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twelve images with a class; every fourth has none."""
    rows = ["image,object,split"]
    for number in range(12):
        picture(tmp_path / f"own/{number}.png", (number, 0, 9), (9, 7), "RGB")
        kind = "" if number % 4 == 0 else ("owl", "tit", "wren")[number % 3]
        rows.append(f"{number}.png,{kind},{'val' if number > 7 else 'train'}")
    (tmp_path / "own/birds.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "own/birds.csv"


def test_a_task_chooses_among_data_sets_with_the_same_label(tmp_path: Path, table: Path) -> None:
    sets = SETS | {"own": {"name": "table", "train": str(table), "split": {"by": "column"}}}
    tasks = TASKS | {"object": {"type": "classification", "data": "own"}}
    setup = tiny_parts(tmp_path, **settings(data=DATA | {"sets": sets}, tasks=tasks))
    assert setup.tasks["object"].class_names == ["owl", "tit", "wren"]
    assert setup.train.batch(torch.arange(3)).lacking == {"left", "object"}
    with pytest.raises(
        ConfigError, match=r"tasks\.object: its classes are others in rooms \(T-shirt, trouser, pullover"
    ):
        tiny_parts(
            tmp_path, **settings(data=DATA | {"sets": sets}, tasks=TASKS | {"object": {"type": "classification"}})
        )


def test_one_task_learns_from_two_sets(tmp_path: Path) -> None:
    data = DATA | {"sets": {"one": SETS["rooms"], "two": SETS["rooms"] | {"seed": 7}}}
    setup = tiny_parts(tmp_path, **settings(data=data, tasks={"depth": {"type": "depth"}}))
    assert len(setup.train.labels_to_fit("depth")) == 48
    assert not setup.train.batch(torch.tensor([0, 30])).lacking


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": TASKS | {"left": TASKS["left"] | {"data": "shopp"}}},
            r"left\.data\.0: no data set 'shopp'.*nearest: shop",
        ),
        ({"tasks": TASKS | {"left": TASKS["left"] | {"data": "rooms"}}}, r"left\.data: rooms has no label 'left'"),
        ({"tasks": {"depth": {"type": "depth"}}}, r"data\.sets\.shop: no task learns from it; it has: left, right"),
        (
            {"tasks": TASKS | {"dept": {"type": "depth"}}},
            r"tasks\.dept: mixed has no label 'dept'; .*nearest: depth",
        ),
        ({"tasks": TASKS | {"left": TASKS["left"] | {"label": "lefft"}}}, r"tasks\.left\.label: .*nearest: left"),
        ({"data": DATA | {"transform": {"val": ["flip"]}}}, r": data\.transform\.val: validation shows"),
        ({"data": DATA | {"num_train": 3}}, "expected num_train in each of the sets"),
        ({"data": DATA | {"sets": SETS | {"x": {"name": "scenes", "image_size": 9}}}}, "image_size next to the sets"),
        ({"data": DATA | {"mix": {"by": "weights", "weights": {"rooms": 1}}}}, "weights for each of rooms, shop"),
        ({"data": DATA | {"mix": "uniforn"}}, r"data\.mix\.by: .*nearest: uniform"),
        ({"data": DATA | {"sets": {"a": {"name": "sceness"}}}}, "nearest: scenes"),
        ({"data": DATA | {"sets": {"a": {"name": "mixed", "sets": SETS}}}}, r"data\.sets\.a"),
        (
            {"data": {"name": "scenes"}, "tasks": {"depth": {"type": "depth", "data": "rooms"}}},
            r"tasks\.depth\.data: chooses among the sets of data\.name: mixed",
        ),
    ],
)
def test_mistakes_are_named_at_their_keys(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = tiny_config(tmp_path, **settings(**changes))
    with pytest.raises(ConfigError, match=message) as error:
        assemble(load_config(file), quiet=True)
    assert "tiny.yaml:" in str(error.value)


def test_a_mistake_in_a_set_is_named_at_its_key(tmp_path: Path) -> None:
    sets = SETS | {"rooms": SETS["rooms"] | {"transform": {"val": ["flip"]}}}
    with pytest.raises(ConfigError, match=r"tiny\.yaml:\d+: data\.sets\.rooms\.transform\.val: validation shows"):
        tiny_parts(tmp_path, **settings(data=DATA | {"sets": sets}))


def test_data_check_reads_each_set(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = SETS | {"own": {"name": "table", "train": str(table), "split": {"by": "column"}}}
    tasks = TASKS | {"object": {"type": "classification", "data": "own"}}
    file = tiny_config(tmp_path, **settings(data=DATA | {"sets": sets}, tasks=tasks))
    assert main(["data", "check", str(file), "--picture", str(tmp_path / "seen.png")]) == 0
    said = capsys.readouterr().out
    assert "rooms: scenes, train: 24 images" in said and "own: table, val: 4 images" in said
    assert sorted(each.name for each in tmp_path.glob("seen*")) == ["seen-own.png", "seen-rooms.png", "seen-shop.png"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_any_label_moves_nothing(tmp_path: Path, cache_dir: Path, table: Path, accumulate: int) -> None:
    labels = {0: "owl", 9: "owl"}
    rows = [f"{number}.png,{labels.get(number, '')},{'val' if number > 7 else 'train'}" for number in range(12)]
    rows = ["image,object,split", *rows]
    table.write_text("\n".join(rows) + "\n")
    data = {"name": "table", "train": str(table), "split": {"by": "column"}, "image_size": 32, "batch_size": 1}
    tasks = {"object": {"type": "classification", "num_classes": 2}}
    own = {"optim": {"accumulate": accumulate}, "freeze_always": ["type:BatchNorm2d"], "audit": {"policy": "warn"}}
    phases = [{"name": "a", "freeze": ["trunk"], "epochs": 1}]
    run_dir = run_whole(tmp_path / "run", cache_dir, settings(data=data, tasks=tasks, phases=phases, **own))
    rows_with_loss = [row for row in read_metrics(run_dir) if "train/loss" in row and "train/lr" in row]
    steps = [row for row in read_metrics(run_dir) if "train/lr" in row]
    assert len(steps) == 8 // accumulate and len(rows_with_loss) == 1


def test_a_method_that_compares_the_tasks_of_a_step_needs_several(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tiny\.yaml:\d+: data\.mix.*: a batch has labels of one task only, and balance famo"
    ):
        tiny_parts(tmp_path, **settings("round_robin", balance="famo"))
    tiny_parts(tmp_path, **settings("uniform", balance="famo"))


def test_the_configuration_in_the_documentation_trains(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, chosen = code_blocks("docs/mixed_data.md", "yaml")
    assert yaml.safe_load(chosen)["tasks"]["object"]["data"] == ["shop"]
    (tmp_path / "two.yaml").write_text(whole)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTL_CACHE_DIR", str(cache_dir))
    numbers = {"num_train": 64, "num_val": 32}
    short = [f"data.sets.{name}.{key}={value}" for name in ("rooms", "shop") for key, value in numbers.items()]
    assert main(["train", "two.yaml", *short]) == 0
    assert "audit: clean" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mix", "balance", "strategy"),
    [
        ("round_robin", "uw", "ddp"),
        ("round_robin", "mgda", "ddp"),
        ("round_robin", "dwa", "ddp"),
        ("proportional", "famo", "ddp"),
        ("round_robin", "dbmtl", "fsdp2"),
        ("proportional", "mgda", "fsdp2"),
        ("proportional", "graddrop", "fsdp2"),
    ],
)
def test_two_processes_train_what_one_does(
    tmp_path: Path, cache_dir: Path, mix: str, balance: str, strategy: str
) -> None:
    """In turn, each step lacks the labels of one task; in mixed batches of two images, often one rank does."""
    phases = [
        {"name": "a", "freeze": ["trunk"], "epochs": 1},
        {"name": "b", "freeze": ["trunk.patch_embed"], "steps": 6},
    ]
    own = {"data": DATA | {"mix": mix, "batch_size": 2 if mix == "proportional" else 6}, "trunk": {"name": "test_vit"}}
    changes = settings(phases=phases, balance=balance, freeze_always=["type:BatchNorm2d"], **own)
    one = run_whole(tmp_path / "one", cache_dir, changes)
    (tmp_path / "two").mkdir()
    started = command(2, tmp_path / "two", f"distributed.strategy={strategy}", **changes)
    code, said = finish(started, surroundings(cache_dir, folder=tmp_path / "two"))
    assert code == 0, said[-4000:]
    two = tmp_path / "two/runs/tiny"
    rows = [[row for row in read_metrics(run) if "train/loss" in row] for run in (one, two)]
    for left, right in zip(*rows, strict=True):
        assert left.keys() == right.keys()
        losses = [name for name in left if name.startswith("train/loss")]
        assert [left[name] for name in losses] == pytest.approx([right[name] for name in losses], rel=2e-4)
    assert difference(read_model(one / "checkpoints/last"), read_model(two / "checkpoints/last")) < 1e-4


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def test_a_teacher_gives_labels_of_the_images_of_every_set(tmp_path: Path, cache_dir: Path) -> None:
    """A phase of the teacher's task alone draws from all sets; one of a set's task only from that."""
    tasks = TASKS | {"like": {"type": "distill", "teacher": {"name": "test_vit", "weights": "none"}}}
    phases = [{"name": "a", "epochs": 1, "tasks": ["like"]}, {"name": "b", "epochs": 1, "tasks": ["left"]}]
    changes = settings("proportional", tasks=tasks, phases=phases)
    setup = tiny_parts(tmp_path, **changes)
    assert [phase.order.num_images for phase in setup.phases] == [36, 12]
    rows = [row for row in read_metrics(run_whole(tmp_path / "run", cache_dir, changes)) if "train/loss" in row]
    assert all("train/loss/like" in row for row in rows[:6])
