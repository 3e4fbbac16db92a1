"""Correct loops, in which the audit stays silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from audit_loops import (
    Normed,
    Tiny,
    X,
    freeze_by_hand,
    run,
    silent,
    train,
    trainable,
)
from mtl.audit import GradientAudit

# --- correct loops: silence


@pytest.mark.parametrize("make_model", [Tiny, Normed])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
        lambda parameters: AdamW(parameters, lr=0.01, foreach=True),
        lambda parameters: AdamW(parameters, lr=0.01, fused=True),
    ],
    ids=["SGD with momentum", "AdamW foreach", "AdamW fused"],
)
def test_training_next_to_a_frozen_trunk_is_silent(
    make_model: Callable[[], Any], make_optimizer: Callable[..., Optimizer]
) -> None:
    # Normed: BatchNorm and Dropout, held in eval in the trunk and active in the head.
    model = make_model()
    freeze_by_hand(model.trunk)
    optimizer = make_optimizer(trainable(model))
    audit = GradientAudit(model, ["trunk"], [optimizer])
    with audit.phase("frozen"):
        train(audit, model, [optimizer], 5)
    silent(audit.report, 5)


@pytest.mark.parametrize("buffer", [torch.zeros(4, 3)[:, 1][:1], torch.zeros(4, 3).t()[:0]], ids=["lone", "empty"])
def test_a_frozen_buffer_whose_few_elements_have_strides_of_their_own_is_read(buffer: torch.Tensor) -> None:
    model = Tiny()
    model.trunk.register_buffer("part_of_another", buffer)
    freeze_by_hand(model.trunk)
    optimizer = SGD(trainable(model), lr=0.05)
    audit = GradientAudit(model, ["trunk"], [optimizer])
    with audit.phase("frozen"):
        train(audit, model, [optimizer], 5)
    silent(audit.report, 5)


def test_training_through_a_frozen_head_is_silent() -> None:
    model = Normed()
    freeze_by_hand(model.head)
    optimizer = AdamW(trainable(model), lr=0.01)
    audit = GradientAudit(model, ["head"], [optimizer])
    with audit.phase("frozen"):
        train(audit, model, [optimizer], 5)
    silent(audit.report, 5)


def test_gradient_accumulation_is_silent() -> None:
    model = Normed()
    freeze_by_hand(model.trunk)
    optimizer = AdamW(trainable(model), lr=0.01)
    audit = GradientAudit(model, ["trunk"], [optimizer])
    with audit.phase("frozen"):
        for _ in range(3):
            for _ in range(4):
                (model(X).square().mean() / 4).backward()
                audit.after_backward()
            optimizer.step()
            audit.after_step()
            optimizer.zero_grad()
    silent(audit.report, 3)


def test_tied_weights_frozen_by_both_names_are_silent() -> None:
    model = Tiny()
    model.other = nn.Linear(2, 2, bias=False)
    model.other.weight = model.trunk.weight
    report = run(model, freeze=["trunk", "other"])
    silent(report, 3)
    assert [*report.phases[0].fingerprints] == ["trunk.weight", "other.weight"]


def test_tied_weights_that_train_are_silent() -> None:
    model = Tiny()
    model.other = nn.Linear(2, 1)
    model.other.weight = model.head.weight
    model.other.bias = model.head.bias
    silent(run(model), 3)


def test_nan_in_a_frozen_tensor_is_silent() -> None:
    model = Tiny()
    # As in a padding row that is never looked up.
    model.trunk.table = nn.Parameter(torch.tensor([[1.0, 2.0], [torch.nan, -torch.nan]]), requires_grad=False)
    model.trunk.register_buffer("limit", torch.tensor(torch.nan))
    silent(run(model), 3)


def test_a_warm_up_from_a_rate_of_zero_is_silent() -> None:
    model = Tiny()
    optimizer = AdamW(trainable(model), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
    assert optimizer.param_groups[0]["lr"] == 0.0
    audit = GradientAudit(model, ["trunk"], [optimizer])
    with audit.phase("frozen"):
        train(audit, model, [optimizer], 4, after_step=dict.fromkeys(range(1, 5), schedule.step))
    silent(audit.report, 4)


def test_a_frozen_tensor_written_with_its_own_bytes_is_silent() -> None:
    model = Tiny()
    weight = model.trunk.weight

    def rewrite() -> None:
        version = weight._version
        model.load_state_dict({**model.state_dict(), "trunk.weight": weight.detach().clone()})
        assert weight._version > version

    silent(run(model, after_step={1: rewrite, 2: rewrite}), 3)


def test_a_frozen_tensor_moved_to_another_place_in_memory_is_silent() -> None:
    model = Tiny()
    weight = model.trunk.weight

    def move() -> None:
        address = weight.data_ptr()
        weight.data = weight.data.clone()
        assert weight.data_ptr() != address

    silent(run(model, after_step={2: move}), 3)


def test_a_tensor_that_was_made_in_inference_mode_is_silent_too() -> None:
    model = Tiny()
    with torch.inference_mode():
        # As a frozen module's own cache of positions or masks, filled while validating.
        model.trunk.register_buffer("positions", torch.arange(3.0), persistent=False)
    silent(run(model), 3)


def test_validation_in_the_middle_is_silent() -> None:
    model = Normed()
    freeze_by_hand(model.trunk)

    def validate() -> None:
        model.eval()
        with torch.no_grad():
            model(X)
        model.head.train()

    silent(run(model, after_step={1: validate, 2: validate}), 3)


def test_two_phases_with_different_freezes_are_silent() -> None:
    model = Normed()
    audit = GradientAudit(model)
    for name in ("trunk", "head"):
        model.requires_grad_(True).train()
        freeze_by_hand(getattr(model, name))
        optimizer = SGD(trainable(model), lr=0.1, momentum=0.9)
        with audit.phase(f"frozen {name}", freeze=[name], optimizers=[optimizer]):
            train(audit, model, [optimizer], 4)
    silent(audit.report, 4)
    first, second = audit.report.phases
    assert (first.freeze, second.freeze) == (["trunk"], ["head"])
    assert next(iter(first.fingerprints)) == "trunk.0.weight"
    assert next(iter(second.fingerprints)) == "head.1.weight"


def test_a_phase_that_freezes_nothing_watches_nothing_and_is_silent() -> None:
    model = Normed()
    report = run(model, freeze=[])
    assert report.ok
    record = report.phases[0]
    assert (record.fingerprints, record.num_steps, record.num_trained) == ({}, 3, 6)


def test_a_phase_that_freezes_everything_is_silent() -> None:
    model = Normed()
    freeze_by_hand(model)
    audit = GradientAudit(model, ["**"])
    with audit.phase("frozen"):
        train(audit, model, [])
    assert audit.report.ok
    assert audit.report.phases[0].num_steps == 3
    assert audit.report.phases[0].num_trainable == 0
    assert len(audit.report.phases[0].fingerprints) == 12


def test_an_optimizer_added_by_watch_is_silent_if_right_and_named_if_wrong() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"], policy="collect")
    with audit.phase("right"):
        optimizer = SGD(trainable(model), lr=0.1)
        audit.watch(optimizer)
        train(audit, model, [optimizer])
    silent(audit.report, 3)
    with audit.phase("wrong"):
        audit.watch(SGD([model.trunk.weight], lr=0.1))
        train(audit, model, [optimizer])
    assert [(each.kind, each.name, each.phase, each.step) for each in audit.report.hazards] == [
        ("in_optimizer", "trunk.weight", "wrong", 1)
    ]


def test_optimizers_given_to_a_phase_stay_for_the_next() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"], policy="collect")
    with audit.phase("first", optimizers=[SGD(model.parameters(), lr=0.1)]):
        pass
    with audit.phase("second"):
        pass
    assert [(each.kind, each.name, each.phase, each.step) for each in audit.report.hazards] == [
        ("in_optimizer", "trunk.weight", "first", 0),
        ("in_optimizer", "trunk.weight", "second", 0),
    ]
