"""The audit as a callback of Lightning, in real `fit` runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from audit_loops import freeze_by_hand, silent, trainable
from mtl.audit import AuditError, Report
from mtl.audit.lightning import AuditCallback
from mtl.patterns import PatternError

pytestmark = [
    # A frozen trunk held in eval is what is meant here.
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training"),
    # Tiny datasets on two cores need no workers.
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
    # Lightning 2.6 asks torch 2.14 for a class that torch has renamed.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

NUM_BATCHES = 4
TRUNK_PARAMETERS = {"trunk.0.weight", "trunk.1.weight", "trunk.1.bias"}
STATISTICS = {"trunk.1.running_mean", "trunk.1.running_var", "trunk.1.num_batches_tracked"}


class Lit(LightningModule):
    """trunk = Linear, BatchNorm; head = Linear, with an optimizer of what is trained."""

    def __init__(self, frozen: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 1)
        if frozen:
            freeze_by_hand(self.trunk)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self.head(self.trunk(batch[0])) - 1).square().mean()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor]) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        return SGD(trainable(self), lr=0.05, momentum=0.9)


class Manual(Lit):
    """Two optimizers, stepped by hand: the head's weight in every batch, its bias in every second one."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        weight, bias = self.optimizers()
        self.manual_backward(self.loss(batch))
        weight.step()
        weight.zero_grad()
        if index % 2:
            bias.step()
            bias.zero_grad()

    def configure_optimizers(self) -> Any:
        return SGD([self.head.weight], lr=0.05), SGD([self.head.bias], lr=0.05)


class InEveryParameter(Lit):
    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=0.05)


class WithoutTheBias(Lit):
    def configure_optimizers(self) -> Optimizer:
        return SGD([self.head.weight], lr=0.05)


class Failing(Lit):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if index == 2:
            raise KeyError("no such batch")
        return self.loss(batch)


class Writer(Callback):
    """Writes a frozen weight past its version counter, in the batch of that number."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:  # noqa: ARG002
        if index == self.batch:
            module.trunk[0].weight.data += 1


@pytest.fixture(autouse=True)
def in_a_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def loader(num_batches: int = NUM_BATCHES) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(3 * num_batches, 2, generator=generator)), batch_size=3)


def fit(audit: AuditCallback, model: LightningModule, *others: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"enable_checkpointing": False, "max_epochs": 1, "accelerator": "cpu", "devices": 1}
    trainer = Trainer(callbacks=[audit, *others], **{**quiet, **defaults, "limit_val_batches": 0, **options})
    trainer.fit(model, loader(), loader(2))
    return trainer


def kinds(report: Report) -> set[tuple[str, str]]:
    return {(violation.kind, violation.name) for violation in report.violations}


def hazards_in(report: Report) -> set[tuple[str, str]]:
    return {(hazard.kind, hazard.name) for hazard in report.hazards}


def of_all(kind: str, names: set[str]) -> set[tuple[str, str]]:
    return {(kind, name) for name in names}


# --- correct runs: silence


@pytest.mark.parametrize(
    ("make_model", "options", "num_steps"),
    [
        (Lit, {}, 4),
        (Lit, {"accumulate_grad_batches": 2}, 2),
        # The last batch of an epoch steps, whatever was accumulated: batches 1-3, then 4.
        (Lit, {"accumulate_grad_batches": 3}, 2),
        (Lit, {"gradient_clip_val": 0.1}, 4),
        (Lit, {"limit_val_batches": 1.0, "val_check_interval": 2, "max_epochs": 2}, 8),
        (Manual, {}, 6),
    ],
    ids=["plain", "accumulation 2", "accumulation 3", "clipping", "validation", "manual, two optimizers"],
)
def test_a_correct_fit_is_silent_and_its_optimizer_steps_are_counted(
    make_model: Callable[[], Lit], options: dict[str, Any], num_steps: int
) -> None:
    audit = AuditCallback("trunk")
    trainer = fit(audit, make_model(), **options)
    silent(audit.report, num_steps)
    assert trainer.global_step == num_steps
    assert set(audit.report.phases[0].fingerprints) == TRUNK_PARAMETERS | STATISTICS
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)


def test_each_fit_is_a_phase_of_its_own() -> None:
    audit, model = AuditCallback(["trunk"], phase="heads"), Lit()
    fit(audit, model)
    fit(audit, model, max_epochs=2)
    assert audit.report.ok
    assert [(phase.name, phase.num_steps, phase.completed) for phase in audit.report.phases] == [
        ("heads", 4, True),
        ("heads", 8, True),
    ]


def test_validation_alone_opens_no_phase() -> None:
    audit = AuditCallback("trunk")
    Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", callbacks=[audit]).validate(
        Lit(), loader(), verbose=False
    )
    assert audit.report.phases == []


# --- planted faults: named


def test_a_trunk_that_was_never_frozen_is_named_by_each_of_its_signs() -> None:
    audit = AuditCallback("trunk", policy="collect")
    fit(audit, Lit(frozen=False))
    assert kinds(audit.report) == (
        of_all("requires_grad", TRUNK_PARAMETERS)
        | of_all("grad_present", TRUNK_PARAMETERS)
        | of_all("in_optimizer", TRUNK_PARAMETERS)
        | of_all("param_changed", TRUNK_PARAMETERS)
        | of_all("buffer_changed", STATISTICS)
    )
    assert ("train_mode", "trunk.1") in hazards_in(audit.report)
    assert audit.report.phases[0].completed
    assert audit.report.phases[0].num_steps == NUM_BATCHES


def test_a_batch_norm_in_train_mode_is_named() -> None:
    audit, model = AuditCallback("trunk", policy="collect"), Lit()
    model.trunk.train()
    fit(audit, model)
    assert kinds(audit.report) == of_all("buffer_changed", STATISTICS)
    assert hazards_in(audit.report) == {("train_mode", "trunk.1")}


def test_an_optimizer_of_all_parameters_is_named() -> None:
    audit = AuditCallback("trunk", policy="collect")
    fit(audit, InEveryParameter())
    assert audit.report.ok
    assert hazards_in(audit.report) == of_all("in_optimizer", TRUNK_PARAMETERS)


def test_a_part_of_the_head_that_no_optimizer_holds_is_named() -> None:
    audit = AuditCallback("trunk", policy="collect")
    fit(audit, WithoutTheBias())
    assert kinds(audit.report) == {("not_in_optimizer", "head.bias")}


def test_a_write_after_the_last_step_is_found_at_the_end() -> None:
    audit = AuditCallback("trunk", policy="collect")
    fit(audit, Lit(), Writer(batch=3))
    assert kinds(audit.report) == {("param_changed", "trunk.0.weight")}
    assert audit.report.violations[0].step == NUM_BATCHES


def test_a_write_is_found_before_the_validation_that_follows() -> None:
    audit = AuditCallback("trunk")
    with pytest.raises(AuditError, match=r"step 2, trunk.0.weight: param_changed"):
        fit(audit, Lit(), Writer(batch=1), limit_val_batches=1.0, val_check_interval=2)
    assert not audit.report.phases[0].completed


def test_a_checkpoint_of_a_broken_freeze_is_not_written(tmp_path: Path) -> None:
    class Saver(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    audit = AuditCallback("trunk")
    with pytest.raises(AuditError, match=r"step 2, trunk.0.weight: param_changed"):
        fit(audit, Lit(), Writer(batch=1), Saver())
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["1.ckpt"]


# --- the policy `raise`, and what else ends a fit


def test_an_error_at_the_beginning_leaves_fit_and_the_report_names_it() -> None:
    audit = AuditCallback("trunk", strict=True)
    with pytest.raises(AuditError, match="in_optimizer"):
        fit(audit, InEveryParameter())
    record = audit.report.phases[0]
    assert kinds(audit.report) == of_all("in_optimizer", TRUNK_PARAMETERS)
    assert (record.num_steps, record.completed) == (0, False)


def test_an_error_at_the_end_leaves_fit() -> None:
    audit = AuditCallback("trunk")
    with pytest.raises(AuditError, match=r"step 4, trunk.0.weight: param_changed"):
        fit(audit, Lit(), Writer(batch=3))
    assert not audit.report.phases[0].completed


def test_an_exception_comes_out_as_it_is_and_nothing_is_proven() -> None:
    audit, model = AuditCallback("trunk"), Failing()
    with pytest.raises(KeyError, match="no such batch"):
        fit(audit, model)
    record = audit.report.phases[0]
    assert (record.num_steps, record.completed, record.violations) == (2, False, [])
    assert not audit.report.to_json()["ok"]


def test_the_fit_after_an_exception_is_audited_again() -> None:
    audit = AuditCallback("trunk")
    with pytest.raises(KeyError):
        fit(audit, Failing())
    fit(audit, Lit())
    assert [(phase.num_steps, phase.completed) for phase in audit.report.phases] == [(2, False), (4, True)]


# --- a freeze by epoch


class Finetuned(LightningModule):
    """backbone = Linear, LayerNorm, Linear; head = Linear; the optimizer is built of what is trained by then."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return (self.head(self.backbone(batch[0])) - 1).square().mean()

    def validation_step(self, batch: list[Tensor]) -> None:
        self.training_step(batch)

    def configure_optimizers(self) -> Any:
        return SGD(trainable(self), lr=0.05)


class Gradually(BaseFinetuning):
    """Lightning's own base of schedules: the last layer thaws in epoch 1, all of the backbone in epoch 3."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        for first_epoch, layers in ((1, pl_module.backbone[2:]), (3, pl_module.backbone[:2])):
            if epoch == first_epoch:
                self.unfreeze_and_add_param_group(layers, optimizer, lr=0.01)
            elif epoch > first_epoch:
                # A checkpoint has the group, but not that its parameters train.
                self.make_trainable(layers)


class Scheduled(Callback):
    """As FinetuningScheduler runs a schedule: at the start of an epoch it sets what is trained, and its groups."""

    def __init__(self, first_trained: dict[int, int]) -> None:
        self.first_trained = first_trained

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        pl_module.backbone.requires_grad_(False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        first = max(epoch for epoch in self.first_trained if epoch <= trainer.current_epoch)
        layers = pl_module.backbone[self.first_trained[first] :]
        pl_module.backbone.requires_grad_(False)
        pl_module.backbone.zero_grad()
        layers.requires_grad_(True)
        optimizer = trainer.optimizers[0]
        del optimizer.param_groups[1:]
        if len(layers):
            optimizer.add_param_group({"params": list(layers.parameters()), "lr": 0.01})


BY_EPOCH = {0: ["backbone"], 1: ["backbone", "!backbone.2"], 3: []}
SCHEDULE = {0: 3, 1: 2, 3: 0}


def phases(report: Report) -> list[tuple[str, int, bool]]:
    return [(phase.name, phase.num_steps, phase.completed) for phase in report.phases]


def fit_with(callbacks: list[Callback], max_epochs: int, ckpt_path: str | None = None, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "devices": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = Trainer(callbacks=callbacks, max_epochs=max_epochs, **{**quiet, **defaults, **options})
    trainer.fit(Finetuned(), loader(), loader(2), ckpt_path=ckpt_path, weights_only=False)
    return trainer


@pytest.mark.parametrize("audit_comes_first", [True, False])
@pytest.mark.parametrize("make", [Gradually, lambda: Scheduled(SCHEDULE)], ids=["BaseFinetuning", "scheduled"])
def test_thaws_that_the_freeze_by_epoch_names_are_silent_and_each_freeze_is_proven(
    make: Callable[[], Callback], audit_comes_first: bool
) -> None:
    audit = AuditCallback(BY_EPOCH)
    trainer = fit_with([audit, make()] if audit_comes_first else [make(), audit], 5, limit_val_batches=1.0)
    assert audit.report.ok
    assert phases(audit.report) == [("fit[0]", 4, True), ("fit[1-2]", 8, True), ("fit[3-]", 8, True)]
    assert [len(phase.fingerprints) for phase in audit.report.phases] == [6, 4, 0]
    assert all(phase.num_trained == phase.num_trainable > 0 for phase in audit.report.phases)
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)


@pytest.mark.parametrize("audit_comes_first", [True, False])
def test_the_thaw_of_backbone_finetuning_is_meant_in_its_epoch_and_a_violation_before(audit_comes_first: bool) -> None:
    for epoch, expected in ((2, []), (3, ["fit[0-2]"])):
        audit = AuditCallback({0: ["backbone"], epoch: []}, policy="collect")
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2)
        fit_with([audit, finetuning] if audit_comes_first else [finetuning, audit], 4)
        assert sorted({violation.phase for violation in audit.report.violations}) == expected
        names = [f"fit[0-{epoch - 1}]", f"fit[{epoch}-]"]
        assert phases(audit.report) == [(names[0], 4 * epoch, True), (names[1], 4 * (4 - epoch), True)]
    assert {v.name for v in audit.report.violations if v.kind == "param_changed"} == {
        f"backbone.{name}" for name, _ in Finetuned().backbone.named_parameters()
    }


def test_what_freezes_again_is_proven_from_then_on() -> None:
    audit = AuditCallback({0: ["backbone[:2]"], 1: [], 2: ["backbone"]})
    fit_with([Scheduled({0: 2, 1: 0, 2: 3}), audit], 4)
    assert phases(audit.report) == [("fit[0]", 4, True), ("fit[1]", 4, True), ("fit[2-]", 8, True)]
    assert audit.report.ok


def test_a_function_of_the_epoch_says_what_is_frozen_and_is_asked_for_epochs_that_come_only() -> None:
    freezes, asked = [["backbone"], ["backbone[:2]"], ["backbone[:2]"], []], []

    def freeze(epoch: int) -> list[str]:
        asked.append(epoch)
        return freezes[epoch]

    audit = AuditCallback(freeze)
    fit_with([audit, Scheduled(SCHEDULE)], 4)
    assert audit.report.ok
    assert phases(audit.report) == [("fit[0-]", 4, True), ("fit[1-]", 8, True), ("fit[3-]", 4, True)]
    assert asked == [0, 1, 2, 3]


def test_a_write_in_the_last_batch_of_a_freeze_is_found_when_its_epoch_ends() -> None:
    class Late(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:  # noqa: ARG002
            if trainer.global_step == 12:
                module.backbone[0].weight.data += 1

    audit = AuditCallback(BY_EPOCH)
    with pytest.raises(AuditError, match=r"phase 'fit\[1-2\]', steps? .*8, backbone.0.weight: param_changed"):
        fit_with([audit, Scheduled(SCHEDULE), Late()], 5)
    assert phases(audit.report) == [("fit[0]", 4, True), ("fit[1-2]", 8, False)]


@pytest.mark.parametrize(("epochs", "expected"), [(2, "fit[1-2]"), (4, "fit[3-]")])
def test_a_fit_that_resumes_from_a_checkpoint_begins_with_the_freeze_of_its_epoch(
    tmp_path: Path, epochs: int, expected: str
) -> None:
    trainer = fit_with([AuditCallback(BY_EPOCH), Gradually()], epochs)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    audit = AuditCallback(BY_EPOCH)
    fit_with([audit, Gradually()], 5, ckpt_path=str(tmp_path / "last.ckpt"))
    assert audit.report.ok
    rest = 4 * ((3 if epochs == 2 else 5) - epochs)
    assert phases(audit.report)[0] == (expected, rest, True)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ({}, r"epoch 0 needs a freeze as well \(0: \[\] freezes nothing\), but it is empty"),
        ({3: [], 5: ["trunk"]}, "epoch 0 needs a freeze as well .* but it begins with epoch 3"),
        ({0: ["trunk"], -1: []}, "an epoch is a whole number from 0 on, got -1"),
        ({0: ["trunk"], 2.5: []}, "an epoch is a whole number from 0 on, got 2.5"),
        ({"0-4": ["trunk"], "5-": []}, "freeze by first epoch, such as .*: an epoch is a whole number .* got '0-4'"),
        ({0: ["trunk"], 1: None}, r"freeze\[1\]: expected patterns, such as .* got None"),
        ({0: {"trunk"}}, r"freeze\[0\]: expected patterns"),
        (None, "freeze: expected patterns"),
    ],
)
def test_a_freeze_that_cannot_be_read_is_refused_when_the_callback_is_made(freeze: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AuditCallback(freeze)


def test_a_dead_pattern_of_a_later_epoch_is_refused_before_the_first_batch() -> None:
    audit = AuditCallback({0: ["backbone"], 4: ["backbon.0"]})
    with pytest.raises(PatternError, match=r"pattern 'backbon.0' matches nothing \(nearest: backbone.0"):
        fit_with([audit, Scheduled(SCHEDULE)], 5)
    assert audit.report.phases == []


def test_a_function_that_returns_no_patterns_is_named_with_its_epoch() -> None:
    audit = AuditCallback(lambda epoch: ["backbone"] if epoch == 0 else None)
    with pytest.raises(ValueError, match=r"freeze\(1\): expected patterns, such as .* got None"):
        fit_with([audit, Scheduled({0: 3})], 3)
