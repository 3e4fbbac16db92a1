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
        | {("train_mode", "trunk.1")}
    )
    assert audit.report.phases[0].completed
    assert audit.report.phases[0].num_steps == NUM_BATCHES


def test_a_batch_norm_that_the_trainer_woke_is_named(make_trainer: Any) -> None:
    audit = AuditCallback("trunk", policy="collect")
    make_trainer(audit, Woken()).train()
    assert kinds(audit.report) == of_all("buffer_changed", STATISTICS) | {("train_mode", "trunk.1")}


def test_an_optimizer_of_all_parameters_is_named(make_trainer: Any) -> None:
    audit, model = AuditCallback("trunk", policy="collect"), Held()
    make_trainer(audit, model, optimizer=SGD(model.parameters(), lr=0.05)).train()
    assert kinds(audit.report) == of_all("in_optimizer", TRUNK_PARAMETERS)


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


def test_an_error_at_the_beginning_leaves_train_and_the_report_tells_of_it(make_trainer: Any) -> None:
    audit, model = AuditCallback("trunk"), Held()
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
