"""Kept features: the same bits as computed ones, served only while the audit holds, and where they lie."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from device_sync import device_stays_busy, no_device_sync
from mtl.audit import AuditError
from mtl.phases.reuse import num_passes
from mtl.training.loop import Trainer
from mtl.training.phase import ActivePhase
from mtl.training.run import train
from mtl.training.setup import RunSetup
from mtl.training.tracking.tracker import Tracker
from once import made_once
from runs import exact_metrics, read_metrics, read_model, small_parts

PHASES: list[dict[str, Any]] = [
    {"name": "warm", "freeze": ["trunk"], "epochs": 3, "lr": 2e-3},
    {"name": "half", "freeze": ["trunk@first:50%"], "epochs": 2, "lr": 1e-3},
]


# Images that the trunk sees while it is decided whether to keep its features: less than ten batches of 8.
DECISION = 80


def trainer_of(parts: RunSetup, folder: Path) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(parts, folder, Tracker(parts.config.tracking, folder, "x", {}), quiet=True)


def trained(folder: Path, *overrides: str, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What a run logs but its speed, and its last weights."""
    folder.mkdir()
    parts = small_parts(folder, *overrides, **{"phases": PHASES} | changes)
    return content(train(parts, quiet=True).run_dir)


def content(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    rows = exact_metrics(run_dir)
    return rows, read_model(run_dir / "checkpoints/last")


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(one[name].numpy().tobytes() == other[name].numpy().tobytes() for name in one)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The run directory of a run of the first phase, whose features are on disk."""

    def make(folder: Path) -> Path:
        settings = ("cache.mode=disk", f"cache.dir={folder / 'features'}")
        return train(small_parts(folder, *settings, phases=PHASES[:1]), quiet=True).run_dir

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        return made_once(tmp_path_factory, "features-first", make)


@pytest.fixture
def features(first: Path, tmp_path: Path) -> Path:
    """A copy of the features that it keeps."""
    return Path(shutil.copytree(first.parents[1] / "features", tmp_path / "features"))


def entries_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize(
    "trunk",
    ["test_resnet", *(pytest.param(each, marks=pytest.mark.slow) for each in ("test_vit", "test_efficientnet"))],
)
def test_a_run_that_keeps_features_ends_with_the_bits_of_one_that_computes_them(
    trunk: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtl")
    changes = {"trunk": {"name": trunk}, "optim": {"ema_decay": 0.9, "accumulate": 2}}
    kept = trained(tmp_path / "kept", "cache.mode=ram", **changes)
    assert [message for message in caplog.messages if "computed once" in message].__len__() == 2
    computed = trained(tmp_path / "computed", "cache=off", **changes)
    on_disk = trained(tmp_path / "disk", "cache.mode=disk", f"cache.dir={tmp_path / 'features'}", **changes)
    assert kept[0] == computed[0] == on_disk[0]
    assert_same_bits(kept[1], computed[1])
    assert_same_bits(kept[1], on_disk[1])


def count_forwards(module: nn.Module) -> list[int]:
    """A list that grows by the number of images at each forward."""
    seen: list[int] = []

    def note(called: nn.Module, args: tuple[Tensor, ...], _: object) -> None:
        # A copy of the model, in which something is tried out, has this hook, too.
        if called is module:
            seen.append(len(args[0]))

    module.register_forward_hook(note)
    return seen


def test_a_frozen_trunk_sees_each_image_once(tmp_path: Path) -> None:
    phases = [{**PHASES[0], "epochs": 4}]
    parts = small_parts(tmp_path, "cache.mode=ram", phases=phases)
    seen = count_forwards(parts.model.trunk.conv1)
    train(parts, quiet=True)
    # 40 training images in batches of 8, 20 for validation in three batches of 8, and some for the decision.
    assert sum(seen) < 40 + 24 + DECISION
    plain = small_parts(tmp_path, "cache=off", "name=plain", phases=phases)
    seen = count_forwards(plain.model.trunk.conv1)
    train(plain, quiet=True)
    assert sum(seen) == 4 * (40 + 20)


def flip_a_bit(weight: nn.Parameter) -> None:
    """As a numpy alias would: without any sign."""
    weight.detach().numpy().view("uint8").reshape(-1)[0] ^= 1


def first_epoch(trainer: Trainer, then: Callable[[], None]) -> None:
    """Runs a phase in which something happens after its first epoch, before anything else does."""
    train_epoch, epochs = trainer.train_epoch, list[int]()

    def and_then(active: ActivePhase) -> None:
        if len(epochs) == 1:
            then()
        epochs.append(len(epochs))
        train_epoch(active)

    trainer.train_epoch = and_then  # type: ignore[method-assign]
    trainer.run_phase(trainer.setup.phases[0])


def written(weight: nn.Parameter) -> None:
    """By torch, which counts writes."""
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("write", [written, flip_a_bit])
def test_a_byte_that_changes_between_epochs_raises_before_anything_is_judged(
    index: int, write: Callable[[nn.Parameter], None], tmp_path: Path
) -> None:
    """And before anything that is kept is served, if the write left a sign."""
    parts = small_parts(tmp_path, "cache.mode=ram", phases=[PHASES[index], {**PHASES[0], "name": "other"}])
    trainer = trainer_of(parts, tmp_path / "run")
    served, validated = list[bool](), list[bool]()

    class Watched(type(trainer.features)):  # type: ignore[misc]
        def __call__(self, *args: Any) -> Any:
            served.append(True)
            return super().__call__(*args)

        def several(self, *args: Any) -> Any:
            served.append(True)
            return super().several(*args)

    class Judge(type(trainer.validate)):  # type: ignore[misc]
        def __call__(self, *args: Any) -> Any:
            validated.append(True)
            return super().__call__(*args)

    trainer.features.__class__, trainer.validate.__class__ = Watched, Judge
    before: list[int] = []

    def plant() -> None:
        before.append(len(served))
        write(parts.model.trunk.conv1[0].weight)

    with pytest.raises(AuditError, match=r"trunk\.conv1\.0\.weight: param_changed"):
        first_epoch(trainer, plant)
    if write is written:
        assert before == [len(served)], "not one batch was served after the change"
    assert len(validated) == 1, "only the epoch before it was judged, and saved"
    assert [file.name for file in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000005"]


def test_under_a_policy_that_continues_what_is_stale_is_not_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = small_parts(tmp_path, "cache.mode=ram", "audit.policy=collect", phases=PHASES[:1])
    trainer = trainer_of(parts, tmp_path / "run")
    batch = parts.val.batch(torch.arange(4))
    differences: list[float] = []

    def plant() -> None:
        with torch.no_grad():
            parts.model.trunk.conv1[0].weight.detach().numpy()[...] *= 2
            old = trainer.features(batch).pooled
            trainer.audit.verify()
            new, right = trainer.features(batch).pooled, parts.model.encode(batch.images).pooled
        assert old is not None and new is not None and right is not None
        differences.extend([float((new - right).abs().max()), float((old - right).abs().max())])

    first_epoch(trainer, plant)
    assert differences[0] == 0 < differences[1]
    assert any("no longer kept, since the audit found the contract broken" in message for message in caplog.messages)
    assert not trainer.audit.report.ok


def test_a_second_run_reads_from_disk_what_the_first_has_computed(tmp_path: Path, first: Path, features: Path) -> None:
    parts = small_parts(tmp_path, "cache.mode=disk", f"cache.dir={features}", "name=second", phases=PHASES[:1])
    seen = count_forwards(parts.model.trunk.conv1)
    second = train(parts, quiet=True)
    assert sum(seen) < DECISION
    assert content(first)[0] == content(second.run_dir)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"data": {"name": "scenes", "image_size": 32, "batch_size": 8, "num_train": 40, "num_val": 20, "seed": 1}},
        {"trunk": {"name": "test_resnet", "options": {"output_stride": 16}}},
    ],
)
def test_other_weights_images_or_settings_are_other_features(
    changes: dict[str, Any], tmp_path: Path, features: Path
) -> None:
    assert len(entries_in(features)) == 2
    phases = [{**PHASES[0], "epochs": 2}]
    train(small_parts(tmp_path, "cache.mode=disk", f"cache.dir={features}", phases=phases, **changes), quiet=True)
    assert len(entries_in(features)) == 4


def test_a_damaged_entry_on_disk_is_computed_again_and_the_run_is_the_same(
    tmp_path: Path, first: Path, features: Path
) -> None:
    large = [file for file in features.rglob("*") if file.is_file() and file.stat().st_size > 10_000]
    assert large
    for file in large:
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size // 2)
            byte = stream.read(1)
            stream.seek(-1, 1)
            stream.write(bytes([byte[0] ^ 1]))
    rows, weights = trained(tmp_path / "second", "cache.mode=disk", f"cache.dir={features}", phases=PHASES[:1])
    assert content(first)[0] == rows
    assert_same_bits(content(first)[1], weights)


def test_a_narrower_type_takes_half_the_room_and_changes_little(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtl")
    whole, _ = trained(tmp_path / "whole", "cache.mode=ram", phases=PHASES[:1])
    half, _ = trained(tmp_path / "half", "cache.mode=ram", "cache.dtype=bfloat16", phases=PHASES[:1])
    sizes = [message.partition("memory: ")[2].split()[0] for message in caplog.messages if "computed once" in message]
    assert float(sizes[0]) == pytest.approx(2 * float(sizes[1]), rel=0.02)
    assert half != whole
    assert half[-1]["val/score"] == pytest.approx(whole[-1]["val/score"], abs=0.02)


@pytest.mark.parametrize(
    ("overrides", "phases", "words"),
    [
        (("cache=off",), PHASES[:1], None),
        ((), [{**PHASES[0], "cache": "off"}], None),
        ((), [{**PHASES[0], "epochs": 1}], "for no more than one pass over the data"),
        (("cache.mode=ram", "cache.ram_gb=1e-6"), PHASES[:1], "are more than cache.ram_gb allows (1 kB)"),
        (("cache.ram_gb=1e-6", "cache.disk_gb=1e-6"), PHASES[:1], "are more than cache.disk_gb allows (1 kB)"),
        (("cache.mode=ram",), [{"name": "all", "epochs": 2}], "no frozen module is before it"),
    ],
)
def test_where_nothing_is_kept_the_reason_is_said(
    overrides: tuple[str, ...],
    phases: list[dict[str, Any]],
    words: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mtl")
    train(small_parts(tmp_path, *overrides, phases=phases), quiet=True)
    said = [message for message in caplog.messages if message.startswith("features: ")]
    assert said == [] if words is None else len(said) == 1 and "not kept" in said[0] and words in said[0]


@pytest.mark.slow
def test_what_fits_in_no_memory_goes_to_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mtl")
    folder = tmp_path / "features"
    train(small_parts(tmp_path, "cache.ram_gb=1e-6", f"cache.dir={folder}", phases=[{**PHASES[0], "epochs": 40}]), True)
    assert any("kept on disk" in message for message in caplog.messages)
    assert len([path for path in folder.iterdir() if not path.name.startswith(".")]) == 2


def test_phases_in_turn_over_one_frozen_trunk_share_what_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtl")
    heads = [("depth", "!heads.depth"), ("object", "!heads.object")]
    phases = [{"name": n, "freeze": ["trunk", "heads", take], "tasks": [n], "epochs": 1} for n, take in heads]
    parts = small_parts(tmp_path, "cache.mode=ram", phases=[{"repeat": 2, "phases": phases}])
    seen = count_forwards(parts.model.trunk.conv1)
    train(parts, quiet=True)
    assert num_passes(parts.phases, 0) == 4
    assert num_passes(parts.phases[2:], 3) == pytest.approx(2 - 3 / 5)
    assert sum(seen) < 40 + 24 + 4 * DECISION


def test_tasks_that_would_train_nothing_have_no_loss_and_are_validated_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtl")
    polish = {"name": "polish", "freeze": ["trunk", "heads", "!heads.depth"], "epochs": 3}
    parts = small_parts(tmp_path, "cache=off", phases=[polish])
    forwards = {name: count_forwards(head.out) for name, head in parts.model.heads.items()}
    result = train(parts, quiet=True)
    assert "polish: no losses of object: everything that they would train is frozen" in (caplog.messages)
    assert parts.phases[0].tasks == ("depth",)
    assert sum(forwards["depth"]) == 3 * (40 + 20)
    assert sum(forwards["object"]) == 20
    rows = read_metrics(result.run_dir)
    assert len({row["val/object/accuracy"] for row in rows if "val/object/accuracy" in row}) == 1
    assert json.loads((result.run_dir / "audit.json").read_text())["ok"]


AUGMENTED = {"name": "scenes", "image_size": 32, "batch_size": 8, "num_train": 40, "num_val": 20}
AUGMENTED |= {"augment": {"brightness": 0.3, "contrast": 0.3}}


def test_an_epoch_that_augments_again_keeps_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtl")
    train(small_parts(tmp_path, "cache.mode=ram", data=AUGMENTED, phases=PHASES[:1]), quiet=True)
    assert any("cache.views would keep some views of each" in message for message in caplog.messages)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_kept_views_give_the_bits_of_computed_ones_and_are_each_computed_once(index: int, tmp_path: Path) -> None:
    phases = [{**PHASES[index], "epochs": 5}]
    kept = trained(tmp_path / "kept", "cache.mode=ram", "cache.views=2", data=AUGMENTED, phases=phases)
    computed = trained(tmp_path / "computed", "cache.mode=off", "cache.views=2", data=AUGMENTED, phases=phases)
    plain = trained(tmp_path / "plain", "cache.mode=off", phases=phases)
    assert kept[0] == computed[0] != plain[0]
    assert_same_bits(kept[1], computed[1])
    parts = small_parts(tmp_path, "cache.mode=ram", "cache.views=2", data=AUGMENTED, phases=phases)
    seen = count_forwards(parts.model.trunk.conv1)
    train(parts, quiet=True)
    # A hook on a skipped module is called in a replay as well.
    assert index == 1 or sum(seen) < 2 * 40 + 24 + DECISION


def test_views_take_turns_and_without_a_number_every_epoch_has_its_own(tmp_path: Path) -> None:
    parts = small_parts(tmp_path, "cache.views=3", data=AUGMENTED)
    source = trainer_of(parts, tmp_path / "run").features
    views = [source.view(epoch) for epoch in range(5)]
    assert [view and view.number for view in views] == [0, 1, 2, 0, 1]
    batch = parts.train.batch(torch.arange(4))
    seen = [parts.train.batch(torch.arange(4), view).images for view in views]
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], batch.images)
    assert parts.val.batch(torch.arange(4)).view is None
    free = trainer_of(small_parts(tmp_path, data=AUGMENTED), tmp_path / "free").features
    assert [view and view.number for view in map(free.view, range(4))] == [0, 1, 2, 3]


def test_the_last_batch_of_validation_is_computed_at_its_own_size(tmp_path: Path) -> None:
    data = {"name": "scenes", "image_size": 32, "batch_size": 8, "num_train": 8, "num_val": 9}
    kept = trained(tmp_path / "kept", "cache.mode=ram", data=data, phases=PHASES[:1])
    computed = trained(tmp_path / "computed", "cache.mode=off", data=data, phases=PHASES[:1])
    assert kept[0] == computed[0]


@pytest.mark.parametrize("options", [{"drop_rate": 0.2}, pytest.param({}, marks=pytest.mark.slow)])
def test_a_phase_of_some_tasks_draws_and_counts_what_it_would_without(options: dict[str, Any], tmp_path: Path) -> None:
    trunk = {"name": "test_efficientnet", "options": options}
    phases = [{**PHASES[1], "tasks": ["depth"], "epochs": 2}, {**PHASES[1], "name": "all", "epochs": 2}]
    changes = {"trunk": trunk, "phases": phases, "unreached": "warn"}
    kept = trained(tmp_path / "kept", "cache.mode=ram", **changes)
    computed = trained(tmp_path / "computed", "cache.mode=off", **changes)
    assert kept[0] == computed[0]
    assert_same_bits(kept[1], computed[1])


def test_averages_that_are_judged_are_not_kept_under_the_name_of_the_weights(tmp_path: Path) -> None:
    phases = [{"name": "p", "epochs": 1}, {"name": "ev", "evaluate_only": True}]
    settings = ("cache.mode=disk", f"cache.dir={tmp_path / 'features'}")
    trained(tmp_path / "one", *settings, "optim.ema_decay=0.9", phases=phases)
    kept = trained(tmp_path / "kept", *settings, phases=phases)
    computed = trained(tmp_path / "computed", "cache.mode=off", phases=phases)
    assert kept[0] == computed[0]


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1])
def test_on_a_gpu_kept_features_are_read_without_waiting_for_it(index: int, tmp_path: Path) -> None:
    parts = small_parts(tmp_path, "cache.mode=ram", "device=cuda", "precision=fp32", phases=[PHASES[index]])
    trainer, seen = trainer_of(parts, tmp_path / "run"), []

    def read() -> None:
        assert trainer.features.kept_in == "ram"
        batch = parts.train.batch(torch.arange(8)).to(parts.device)
        with torch.no_grad():
            trainer.features(batch)  # now the pinned memory is taken
            with device_stays_busy(), no_device_sync():
                seen.append(trainer.features(batch).pooled)
            seen.append(parts.model.encode(batch.images).pooled)

    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        first_epoch(trainer, read)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-2, atol=1e-3)


def test_a_run_logs_that_a_kernel_depends_on_batch_position(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mtl")
    parts = small_parts(tmp_path, "cache.mode=ram", phases=PHASES[:1])
    # As a kernel would that treats the end of a tensor in its own way.
    parts.model.trunk.conv1.register_forward_hook(lambda _m, _a, output: torch.cat([output[:-1], output[-1:] * 1.0001]))
    train(parts, quiet=True)
    assert any("not bit-exact: this kernel's result depends" in message for message in caplog.messages)
