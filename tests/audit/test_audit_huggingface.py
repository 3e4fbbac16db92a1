"""The audit as a callback of the Hugging Face Trainer, in real `train` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from audit_loops import freeze_by_hand, silent, trainable
from mtl.audit import AuditError, Report
from mtl.audit.huggingface import AuditCallback

NUM_BATCHES = 4
TRUNK_PARAMETERS = {"trunk.0.weight", "trunk.1.weight", "trunk.1.bias"}
STATISTICS = {"trunk.1.running_mean", "trunk.1.running_var", "trunk.1.num_batches_tracked"}


class Woken(nn.Module):
    """trunk = Linear, BatchNorm; head = Linear. The Trainer's `model.train()` wakes the trunk's BatchNorm."""

    def __init__(self, frozen: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 1)
        if frozen:
            freeze_by_hand(self.trunk)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        guess = self.head(self.trunk(x))
        return {"loss": (guess - labels).square().mean(), "logits": guess}


class Held(Woken):
    """The same, with a trunk that stays in eval."""

    def train(self, mode: bool = True) -> Held:
        super().train(mode)
        self.trunk.eval()
        return self


class Failing(Held):
    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.num_calls = getattr(self, "num_calls", 0) + 1
        if self.num_calls == 3:
            raise KeyError("no such batch")
        return super().forward(x, labels)


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, num_batches: int) -> None:
        self.x = torch.randn(3 * num_batches, 2, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": torch.ones(1)}


class Writer(TrainerCallback):
    """Writes a frozen weight past its version counter, at the end of that step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step == self.step:
            kwargs["model"].trunk[0].weight.data += 1


@pytest.fixture
def make_trainer(tmp_path: Path) -> Any:
    def make(
        audit: AuditCallback,
        model: nn.Module,
        *others: TrainerCallback,
        optimizer: Optimizer | None = None,
        after: bool = True,
        **options: Any,
    ) -> Trainer:
        optimizer = optimizer or SGD(trainable(model), lr=0.05, momentum=0.9)
        quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
        # Pinned memory is for GPUs, and warns where there is none.
        cpu = {"use_cpu": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 3}
        given = {"num_train_epochs": 1, "lr_scheduler_type": "constant", **options}
        return Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(tmp_path), **{**quiet, **cpu, **given}),
            train_dataset=Rows(NUM_BATCHES),
            eval_dataset=Rows(2),
            optimizers=(optimizer, None),
            callbacks=[audit, *others] if after else [*others, audit],
        )

    return make


def kinds(report: Report) -> set[tuple[str, str]]:
    return {(violation.kind, violation.name) for violation in report.violations}


def hazards_in(report: Report) -> set[tuple[str, str]]:
    return {(hazard.kind, hazard.name) for hazard in report.hazards}


def of_all(kind: str, names: set[str]) -> set[tuple[str, str]]:
    return {(kind, name) for name in names}


# --- correct runs: silence


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [
        ({}, 4),
        ({"gradient_accumulation_steps": 2}, 2),
        # The last batch of an epoch steps, whatever was accumulated: batches 1-3, then 4.
        ({"gradient_accumulation_steps": 3}, 2),
        ({"max_grad_norm": 0.1}, 4),
        ({"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "num_train_epochs": 2}, 4),
        ({"save_strategy": "epoch", "num_train_epochs": 2}, 8),
        (
            {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 2, "load_best_model_at_end": True},
            8,
        ),
    ],
    ids=["plain", "accumulation 2", "accumulation 3", "clipping", "evaluation", "saving", "the best reloaded"],
)
def test_a_correct_training_is_silent_and_its_optimizer_steps_are_counted(
    make_trainer: Any, options: dict[str, Any], num_steps: int
) -> None:
    audit = AuditCallback("trunk")
    trainer = make_trainer(audit, Held(), **options)
    trainer.train()
    record = audit.report.phases[0]
    assert trainer.state.global_step == num_steps
    if "load_best_model_at_end" in options:
        # What trained may be put back to what it was; the frozen part is the same in every checkpoint.
        assert (audit.report.ok, record.completed, record.num_steps) == (True, True, num_steps)
    else:
        silent(audit.report, num_steps)
    assert set(record.fingerprints) == TRUNK_PARAMETERS | STATISTICS


def test_each_training_is_a_phase_of_its_own(make_trainer: Any) -> None:
    audit = AuditCallback(["trunk"], phase="heads")
    trainer = make_trainer(audit, Held())
    trainer.train()
    trainer.train()
    assert audit.report.ok
    assert [(phase.name, phase.num_steps, phase.completed) for phase in audit.report.phases] == [
        ("heads", 4, True),
        ("heads", 4, True),
    ]


def test_evaluation_alone_opens_no_phase(make_trainer: Any) -> None:
    audit = AuditCallback("trunk")
    make_trainer(audit, Held()).evaluate()
    assert audit.report.phases == []


# --- planted faults: named


def test_a_trunk_that_was_never_frozen_is_named_by_each_of_its_signs(make_trainer: Any) -> None:
    audit = AuditCallback("trunk", policy="collect")
    make_trainer(audit, Woken(frozen=False)).train()
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


def test_a_batch_norm_that_the_trainer_woke_is_named(make_trainer: Any) -> None:
    audit = AuditCallback("trunk", policy="collect")
    make_trainer(audit, Woken()).train()
    assert kinds(audit.report) == of_all("buffer_changed", STATISTICS)
    assert hazards_in(audit.report) == {("train_mode", "trunk.1")}


def test_an_optimizer_of_all_parameters_is_named(make_trainer: Any) -> None:
    audit, model = AuditCallback("trunk", policy="collect"), Held()
    make_trainer(audit, model, optimizer=SGD(model.parameters(), lr=0.05)).train()
    assert audit.report.ok
    assert hazards_in(audit.report) == of_all("in_optimizer", TRUNK_PARAMETERS)


def test_a_part_of_the_head_that_no_optimizer_holds_is_named(make_trainer: Any) -> None:
    audit, model = AuditCallback("trunk", policy="collect"), Held()
    make_trainer(audit, model, optimizer=SGD([model.head.weight], lr=0.05)).train()
    assert kinds(audit.report) == {("not_in_optimizer", "head.bias")}


def test_a_write_after_the_last_step_is_found_at_the_end(make_trainer: Any) -> None:
    audit = AuditCallback("trunk", policy="collect")
    make_trainer(audit, Held(), Writer(step=4)).train()
    assert kinds(audit.report) == {("param_changed", "trunk.0.weight")}
    assert audit.report.violations[0].step == NUM_BATCHES


def test_a_write_is_found_before_the_evaluation_that_follows(make_trainer: Any) -> None:
    audit = AuditCallback("trunk")
    trainer = make_trainer(audit, Held(), Writer(step=2), after=False, eval_strategy="steps", eval_steps=2)
    with pytest.raises(AuditError, match=r"step 2, trunk.0.weight: param_changed"):
        trainer.train()
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(("audit_comes_last", "written"), [(True, []), (False, ["checkpoint-2"])])
def test_a_broken_freeze_is_found_before_its_checkpoint_if_the_audit_comes_last(
    make_trainer: Any, tmp_path: Path, audit_comes_last: bool, written: list[str]
) -> None:
    audit = AuditCallback("trunk")
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(audit, Held(), Writer(step=2), after=not audit_comes_last, **options)
    with pytest.raises(AuditError, match=r"step 2, trunk.0.weight: param_changed"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == written


# --- the policy `raise`, and what else ends a training


def test_an_error_at_the_beginning_leaves_train_and_the_report_names_it(make_trainer: Any) -> None:
    audit, model = AuditCallback("trunk", strict=True), Held()
    with pytest.raises(AuditError, match="in_optimizer"):
        make_trainer(audit, model, optimizer=SGD(model.parameters(), lr=0.05)).train()
    record = audit.report.phases[0]
    assert kinds(audit.report) == of_all("in_optimizer", TRUNK_PARAMETERS)
    assert (record.num_steps, record.completed) == (0, False)


def test_an_error_at_the_end_leaves_train(make_trainer: Any) -> None:
    audit = AuditCallback("trunk")
    with pytest.raises(AuditError, match=r"step 4, trunk.0.weight: param_changed"):
        make_trainer(audit, Held(), Writer(step=4)).train()
    assert not audit.report.phases[0].completed


def test_an_exception_comes_out_as_it_is_and_nothing_is_proven(make_trainer: Any) -> None:
    audit = AuditCallback("trunk")
    trainer = make_trainer(audit, Failing())
    with pytest.raises(KeyError, match="no such batch"):
        trainer.train()
    record = audit.report.phases[0]
    assert (record.num_steps, record.completed, record.violations) == (2, False, [])
    assert not audit.report.to_json()["ok"]
    trainer.train()
    assert [(phase.num_steps, phase.completed) for phase in audit.report.phases] == [(2, False), (4, True)]


# --- a freeze by epoch


class Thaw(TrainerCallback):
    """Freezes all but the last layers, from the first one that trains on by epoch, and steps what is trained."""

    def __init__(self, first_trained: dict[int, int]) -> None:
        self.first_trained = first_trained

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        first = max(epoch for epoch in self.first_trained if epoch <= int(state.epoch))
        model.requires_grad_(False)
        for part in model.trunk[self.first_trained[first] :], model.head:
            part.requires_grad_(True)
        optimizer.param_groups[0]["params"][:] = trainable(model)


class Plain(nn.Module):
    """trunk = Linear, LayerNorm, Linear; head = Linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        guess = self.head(self.trunk(x))
        return {"loss": (guess - labels).square().mean(), "logits": guess}


BY_EPOCH = {0: ["trunk"], 1: ["trunk[:2]"], 3: []}
SCHEDULE = {0: 3, 1: 2, 3: 0}


def phases(report: Report) -> list[tuple[str, int, bool]]:
    return [(phase.name, phase.num_steps, phase.completed) for phase in report.phases]


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize(("accumulate", "per_epoch"), [(1, 4), (3, 2)])
def test_thaws_that_the_freeze_by_epoch_names_are_silent_and_each_freeze_is_proven(
    make_trainer: Any, accumulate: int, per_epoch: int, after: bool
) -> None:
    audit = AuditCallback(BY_EPOCH)
    options = {"num_train_epochs": 5, "eval_strategy": "epoch", "gradient_accumulation_steps": accumulate}
    make_trainer(audit, Plain(), Thaw(SCHEDULE), after=after, **options).train()
    assert audit.report.ok
    names = ["fit[0]", "fit[1-2]", "fit[3-]"]
    assert phases(audit.report) == [(n, per_epoch * e, True) for n, e in zip(names, (1, 2, 2), strict=True)]
    assert [len(phase.fingerprints) for phase in audit.report.phases] == [6, 4, 0]


def test_a_thaw_before_its_epoch_is_a_violation_of_the_phase_it_broke(make_trainer: Any) -> None:
    audit = AuditCallback({0: ["trunk"], 2: []}, policy="collect")
    make_trainer(audit, Plain(), Thaw({0: 3, 1: 0}), num_train_epochs=3).train()
    assert {violation.phase for violation in audit.report.violations} == {"fit[0-1]"}
    assert "param_changed" in {violation.kind for violation in audit.report.violations}
    assert phases(audit.report) == [("fit[0-1]", 8, True), ("fit[2-]", 4, True)]


def test_a_function_of_the_epoch_says_what_is_frozen_and_is_asked_for_epochs_that_come_only(make_trainer: Any) -> None:
    freezes = [["trunk"], ["trunk[:2]"], ["trunk[:2]"], []]
    audit = AuditCallback(lambda epoch: freezes[epoch])
    make_trainer(audit, Plain(), Thaw(SCHEDULE), num_train_epochs=4).train()
    assert audit.report.ok
    assert phases(audit.report) == [("fit[0-]", 4, True), ("fit[1-]", 8, True), ("fit[3-]", 4, True)]


@pytest.mark.parametrize(
    ("step", "expected"), [(6, [("fit[1-2]", 6, True), ("fit[3-]", 4, True)]), (12, [("fit[3-]", 4, True)])]
)
def test_a_training_that_resumes_from_a_checkpoint_begins_with_the_freeze_of_its_epoch(
    make_trainer: Any, tmp_path: Path, step: int, expected: list[tuple[str, int, bool]]
) -> None:
    options = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 6}
    make_trainer(AuditCallback(BY_EPOCH), Plain(), Thaw(SCHEDULE), **options).train()
    audit = AuditCallback(BY_EPOCH)
    model = Plain()
    # As in the epochs 1 and 2, in which both were written.
    optimizer = SGD([*model.trunk[2:].parameters(), *model.head.parameters()], lr=0.05, momentum=0.9)
    trainer = make_trainer(audit, model, Thaw(SCHEDULE), optimizer=optimizer, **options)
    trainer.train(str(tmp_path / f"checkpoint-{step}"))
    assert audit.report.ok
    assert phases(audit.report) == expected


def test_a_freeze_without_epoch_0_is_refused_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match=r"epoch 0 needs a freeze as well .* but it begins with epoch 2"):
        AuditCallback({2: ["trunk"]})
