"""Learning-rate schedules: as tables written out by hand, and against torch's own schedulers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, lr_scheduler

from mtl.config.optim import (
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    LrScheduleConfig,
    OneCycleConfig,
    OptimizerConfig,
    PlateauConfig,
    SlantedTriangleConfig,
    StepConfig,
)
from mtl.optim.lr_schedule import LrSchedule, factor_at
from mtl.optim.optimizers import build_optimizer
from mtl.runtime.best import Direction

CHECKED = settings(max_examples=100, derandomize=True)
NAN = math.nan
HIGH, LOW = (1 + math.sqrt(0.5)) / 2, (1 - math.sqrt(0.5)) / 2
CONSTANT, COSINE = ConstantConfig(name="constant"), CosineConfig(name="cosine")
LINEAR, ONE_CYCLE = LinearConfig(name="linear"), OneCycleConfig(name="one-cycle")
STEP, PLATEAU = StepConfig(name="step", every_epochs=1), PlateauConfig(name="plateau")
TRIANGLE = SlantedTriangleConfig(name="slanted-triangle")
ALL: list[LrScheduleConfig] = [CONSTANT, COSINE, LINEAR, ONE_CYCLE, STEP, PLATEAU, TRIANGLE]
FALLING: list[LrScheduleConfig] = [COSINE, LINEAR, ONE_CYCLE]
BY_NAME: dict[str, Any] = {"ids": lambda value: getattr(value, "name", str(value))}


def optimizer_of(*peaks: float) -> SGD:
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks])


def rates(config: LrScheduleConfig, num_steps: int, steps_per_epoch: int = 1, num_more: int = 0) -> list[float]:
    """The rate at each step from 0 to `num_steps` (the last one is never trained with) and beyond; the peak is 1."""
    optimizer = optimizer_of(1.0)
    schedule = LrSchedule(config, optimizer, num_steps, steps_per_epoch)
    found = []
    for _ in range(num_steps + 1 + num_more):
        found.append(optimizer.param_groups[0]["lr"])
        assert max(schedule.rates) == found[-1]
        optimizer.step()
        schedule.step()
    return found


def rates_of_torch(optimizer: SGD, scheduler: Any, num_steps: int) -> list[float]:
    found = []
    for _ in range(num_steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


# --- tables


@pytest.mark.parametrize(
    ("config", "num_steps", "expected"),
    [
        (CONSTANT, 3, [1.0, 1.0, 1.0, 1.0]),
        (ConstantConfig(name="constant", warmup_steps=3), 5, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        (COSINE, 4, [1.0, HIGH, 0.5, LOW, 0.0]),
        (COSINE, 3, [1.0, 0.75, 0.25, 0.0]),
        (COSINE, 1, [1.0, 0.0]),
        (CosineConfig(name="cosine", warmup_steps=1), 5, [0.5, 1.0, HIGH, 0.5, LOW, 0.0]),
        (CosineConfig(name="cosine", warmup_steps=3), 4, [0.25, 0.5, 0.75, 1.0, 0.0]),
        (LINEAR, 4, [1.0, 0.75, 0.5, 0.25, 0.0]),
        (LINEAR, 1, [1.0, 0.0]),
        (LinearConfig(name="linear", warmup_steps=3), 7, [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]),
        (PlateauConfig(name="plateau", warmup_steps=1), 3, [0.5, 1.0, 1.0, 1.0]),
        # Up over 30 %, that is 2 steps and 6; halfway up and down the cosine is in the middle.
        (ONE_CYCLE, 6, [0.04, 0.52, 1.0, HIGH, 0.5, LOW, 0.0]),
        (ONE_CYCLE, 2, [0.04, 1.0, 0.0]),
        (ONE_CYCLE, 3, [0.04, 1.0, 0.5, 0.0]),
        # Up over a tenth, rounded down, but one step at least; from a 32nd and back to it.
        (TRIANGLE, 1, [1 / 32, 1 / 32]),
        (TRIANGLE, 2, [1 / 32, 1.0, 1 / 32]),
        (TRIANGLE, 5, [1 / 32, 1.0, 1 - 31 / 128, 1 - 62 / 128, 1 - 93 / 128, 1 / 32]),
        (SlantedTriangleConfig(name="slanted-triangle", cut_frac=0.5, ratio=2), 4, [0.5, 0.75, 1.0, 0.75, 0.5]),
        (SlantedTriangleConfig(name="slanted-triangle", cut_frac=0.25, ratio=4), 4, [0.25, 1.0, 0.75, 0.5, 0.25]),
    ],
    **BY_NAME,
)
def test_the_share_of_the_peak_at_each_step_is_this_table(
    config: LrScheduleConfig, num_steps: int, expected: list[float]
) -> None:
    assert rates(config, num_steps) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("config", "steps_per_epoch", "expected"),
    [
        (StepConfig(name="step", every_epochs=1, factor=0.5), 2, [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]),
        (StepConfig(name="step", every_epochs=2, factor=0.5), 1, [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]),
        (StepConfig(name="step", every_epochs=2), 3, [1, 1, 1, 1, 1, 1, 0.1]),
        (StepConfig(name="step", every_epochs=1, factor=0.5, warmup_steps=1), 3, [0.5, 1, 1, 0.5, 0.5, 0.5, 0.25]),
    ],
)
def test_steps_fall_where_epochs_end_as_in_this_table(
    config: StepConfig, steps_per_epoch: int, expected: list[float]
) -> None:
    assert rates(config, 6, steps_per_epoch) == pytest.approx(expected, abs=1e-12)


def test_one_cycle_climbs_over_its_first_three_tenths_and_falls_from_then_on() -> None:
    factors = rates(ONE_CYCLE, 20)
    assert [factors[step] for step in (0, 3, 6, 13, 20)] == pytest.approx([0.04, 0.52, 1.0, 0.5, 0.0], abs=1e-12)
    assert factors[:7] == sorted(factors[:7])
    assert factors[6:] == sorted(factors[6:], reverse=True)


@pytest.mark.parametrize("num_steps", [10, 20, 60, 1000])
def test_the_slanted_triangle_is_the_formula_of_the_paper(num_steps: int) -> None:
    """Equation 3 of ULMFiT, line by line, with its numbers; T is a multiple of 1 / cut_frac."""
    cut_frac, ratio = 0.1, 32
    cut = math.floor(num_steps * cut_frac)
    expected = []
    for t in range(num_steps + 1):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        expected.append((1 + p * (ratio - 1)) / ratio)
    assert rates(TRIANGLE, num_steps) == pytest.approx(expected, abs=1e-12)


@given(num_steps=st.integers(1, 300), cut_frac=st.floats(0.01, 0.99), ratio=st.floats(1.01, 1000))
@CHECKED
def test_the_slanted_triangle_rises_to_its_peak_and_falls_to_where_it_began(
    num_steps: int, cut_frac: float, ratio: float
) -> None:
    config = SlantedTriangleConfig(name="slanted-triangle", cut_frac=cut_frac, ratio=ratio)
    factors = rates(config, num_steps, num_more=3)
    peak = max(1, math.floor(num_steps * cut_frac))
    assert min(factors) == pytest.approx(factors[0]) == pytest.approx(1 / ratio)
    assert factors[num_steps:] == pytest.approx([1 / ratio] * 4)
    if num_steps > 1:
        assert factors[peak] == pytest.approx(1.0) and max(factors) <= 1 + 1e-12
        assert factors[: peak + 1] == sorted(factors[: peak + 1])
        assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_every_group_follows_the_course_from_its_own_peak() -> None:
    optimizer = optimizer_of(0.1, 0.4, 0.2)
    schedule = LrSchedule(COSINE, optimizer, 4, 1)
    found = []
    for _ in range(4):
        found.append([group["lr"] for group in optimizer.param_groups])
        assert max(schedule.rates) == found[-1][1]
        optimizer.step()
        schedule.step()
    expected = [[peak * factor for peak in (0.1, 0.4, 0.2)] for factor in (1.0, HIGH, 0.5, LOW)]
    assert found == [pytest.approx(row, abs=1e-12) for row in expected]


@pytest.mark.parametrize("config", FALLING, **BY_NAME)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 20])
def test_the_rate_is_zero_at_the_end_and_does_not_rise_again(config: LrScheduleConfig, num_steps: int) -> None:
    after = rates(config, num_steps, num_more=2 * num_steps)[num_steps:]
    assert after == pytest.approx([0.0] * (2 * num_steps + 1), abs=1e-12)


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_what_does_not_fall_to_zero_does_not_rise_after_the_end(warmup_steps: int) -> None:
    constant = ConstantConfig(name="constant", warmup_steps=warmup_steps)
    assert rates(constant, 4, num_more=4)[4:] == [1.0] * 5
    steps = rates(StepConfig(name="step", every_epochs=2, warmup_steps=warmup_steps), 4, num_more=4)[4:]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize("name", ["cosine", "linear", "step", "one-cycle"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_no_step_of_a_course_that_falls_is_trained_at_a_rate_of_zero(name: str, num_steps: int) -> None:
    for warmup_steps in range(num_steps if name != "one-cycle" else 1):
        courses: dict[str, LrScheduleConfig] = {
            "cosine": CosineConfig(name="cosine", warmup_steps=warmup_steps),
            "linear": LinearConfig(name="linear", warmup_steps=warmup_steps),
            "step": StepConfig(name="step", every_epochs=1, warmup_steps=warmup_steps),
            "one-cycle": ONE_CYCLE,
        }
        trained = rates(courses[name], num_steps)[:num_steps]
        assert all(1e-8 < rate <= 1 for rate in trained)


@given(config=st.sampled_from(ALL), num_steps=st.integers(1, 200), data=st.data())
@CHECKED
def test_the_share_of_the_peak_lies_between_nothing_and_all(
    config: LrScheduleConfig, num_steps: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, 2 * num_steps))
    factor = factor_at(config, step, num_steps, data.draw(st.integers(1, 20)))
    assert 0 <= factor <= 1
    # A tenth of a tenth and so on is nothing at last, after some hundred epochs.
    assert factor > 0 or step >= num_steps or config is STEP


# --- against torch


@pytest.mark.parametrize("num_steps", [1, 2, 5, 64])
def test_cosine_is_that_of_torch(num_steps: int) -> None:
    optimizer = optimizer_of(1.0)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps)
    assert rates(COSINE, num_steps) == pytest.approx(rates_of_torch(optimizer, scheduler, num_steps), abs=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 64])
def test_linear_is_that_of_torch(num_steps: int) -> None:
    optimizer = optimizer_of(1.0)
    scheduler = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=num_steps)
    assert rates(LINEAR, num_steps) == pytest.approx(rates_of_torch(optimizer, scheduler, num_steps), abs=1e-12)


@pytest.mark.parametrize("warmup_steps", [1, 2, 5, 20])
def test_the_warm_up_is_the_linear_one_of_torch(warmup_steps: int) -> None:
    optimizer = optimizer_of(1.0)
    scheduler = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    ours = rates(ConstantConfig(name="constant", warmup_steps=warmup_steps), 30)
    assert ours == pytest.approx(rates_of_torch(optimizer, scheduler, 30), abs=1e-12)


@pytest.mark.parametrize(("every_epochs", "steps_per_epoch", "factor"), [(1, 1, 0.1), (2, 3, 0.5), (3, 2, 0.9)])
def test_step_is_that_of_torch(every_epochs: int, steps_per_epoch: int, factor: float) -> None:
    optimizer = optimizer_of(1.0)
    scheduler = lr_scheduler.StepLR(optimizer, every_epochs * steps_per_epoch, factor)
    ours = rates(StepConfig(name="step", every_epochs=every_epochs, factor=factor), 30, steps_per_epoch)
    assert ours == pytest.approx(rates_of_torch(optimizer, scheduler, 30), abs=1e-12)


@given(
    # Few values, so that there are many ties.
    metrics=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.5, -0.1, NAN]), max_size=30)
    | st.lists(st.floats(-2, 2), max_size=30),
    patience=st.integers(1, 4),
    min_delta=st.sampled_from([0.0, 0.05, 0.1]),
    direction=st.sampled_from(["higher", "lower"]),
)
@settings(max_examples=300, derandomize=True)
def test_plateau_is_that_of_torch(metrics: list[float], patience: int, min_delta: float, direction: Direction) -> None:
    ours, theirs = optimizer_of(1.0, 0.3), optimizer_of(1.0, 0.3)
    config = PlateauConfig(name="plateau", metric="val/m", patience=patience, min_delta=min_delta, factor=0.5)
    schedule = LrSchedule(config, ours, 100, 1, direction)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        theirs,
        mode="max" if direction == "higher" else "min",
        factor=0.5,
        patience=patience - 1,
        threshold=min_delta,
        threshold_mode="abs",
        eps=0.0,
    )
    for metric in metrics:
        ours.step()
        schedule.step()
        schedule.epoch_done({"val/m": metric, "val/score": 0.0})
        scheduler.step(metric)
        pairs = zip(ours.param_groups, theirs.param_groups, strict=True)
        assert all(abs(our["lr"] - their["lr"]) <= 1e-12 for our, their in pairs)


# --- plateau


@pytest.mark.parametrize(
    ("direction", "metrics", "expected"),
    [
        ("higher", [1, 2, 3, 4, 5], [1, 1, 1, 1, 1]),
        ("lower", [1, 2, 3, 4, 5], [1, 1, 0.5, 0.5, 0.25]),
        ("higher", [1, 1, 1, 1, 1], [1, 1, 0.5, 0.5, 0.25]),
        ("higher", [1, 0, 2, 1, 3, 2, 2], [1, 1, 1, 1, 1, 1, 0.5]),
        ("higher", [NAN, NAN, NAN, NAN], [1, 0.5, 0.5, 0.25]),
        ("higher", [1, NAN, NAN, 2, NAN, 3], [1, 1, 0.5, 0.5, 0.5, 0.5]),
        ("lower", [1, NAN, NAN], [1, 1, 0.5]),
    ],
)
def test_plateau_falls_after_two_epochs_without_a_new_best_as_in_this_table(
    direction: Direction, metrics: list[float], expected: list[float]
) -> None:
    optimizer = optimizer_of(1.0)
    schedule = LrSchedule(PlateauConfig(name="plateau", patience=2, factor=0.5), optimizer, 100, 1, direction)
    found = []
    for metric in metrics:
        schedule.epoch_done({"val/score": metric})
        found.append(optimizer.param_groups[0]["lr"])
    assert found == expected


def test_a_fall_comes_on_top_of_the_warm_up_and_stays() -> None:
    optimizer = optimizer_of(1.0)
    config = PlateauConfig(name="plateau", warmup_steps=3, patience=1, factor=0.5)
    schedule = LrSchedule(config, optimizer, 100, 1)
    found = []
    for metric in (1.0, 0.0, 2.0, 3.0, 4.0):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        schedule.epoch_done({"val/score": metric})
    assert found == [0.25, 0.5, 0.375, 0.5, 0.5]


@pytest.mark.parametrize("config", [each for each in ALL if each is not PLATEAU], **BY_NAME)
def test_no_other_course_heeds_metrics(config: LrScheduleConfig) -> None:
    optimizer = optimizer_of(1.0)
    schedule = LrSchedule(config, optimizer, 8, 2)
    before = optimizer.param_groups[0]["lr"]
    for _ in range(5):
        schedule.epoch_done({})
    assert optimizer.param_groups[0]["lr"] == before


# --- state


@given(
    config=st.sampled_from(
        [*ALL, PlateauConfig(name="plateau", patience=1, warmup_steps=3), CosineConfig(name="cosine", warmup_steps=4)]
    ),
    metrics=st.lists(st.sampled_from([0.0, 0.5, 1.0, NAN]), min_size=6, max_size=6),
    at=st.integers(0, 12),
    through_json=st.booleans(),
)
@CHECKED
def test_a_course_resumed_at_any_step_has_the_same_future(
    config: LrScheduleConfig, metrics: list[float], at: int, through_json: bool
) -> None:
    def advance(schedule: LrSchedule, optimizer: SGD, steps: range) -> list[list[float]]:
        found = []
        for step in steps:
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
            if step % 2:
                schedule.epoch_done({"val/score": metrics[step // 2]})
        return found

    optimizer, later = optimizer_of(1.0, 0.3), optimizer_of(1.0, 0.3)
    schedule = LrSchedule(config, optimizer, 12, 2)
    advance(schedule, optimizer, range(at))
    state = schedule.state_dict()
    resumed = LrSchedule(config, later, 12, 2)
    resumed.load_state_dict(json.loads(json.dumps(state, allow_nan=False)) if through_json else state)
    rest = range(at, 12)
    assert [group["lr"] for group in later.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert advance(resumed, later, rest) == advance(schedule, optimizer, rest)
    assert resumed.state_dict() == schedule.state_dict()


def test_a_state_is_plain_data_of_what_was_done() -> None:
    optimizer = optimizer_of(1.0)
    schedule = LrSchedule(PlateauConfig(name="plateau", patience=2, factor=0.5), optimizer, 9, 1)
    for metric in (0.5, 0.25, 0.25, 0.25):
        optimizer.step()
        schedule.step()
        schedule.epoch_done({"val/score": metric})
    assert schedule.state_dict() == {"step": 4, "scale": 0.5, "best": {"value": 0.5, "num_since": 1}}


@pytest.mark.parametrize("before", ALL, **BY_NAME)
@pytest.mark.parametrize("config", ALL, **BY_NAME)
def test_every_phase_begins_at_the_start_of_its_own_course(before: LrScheduleConfig, config: LrScheduleConfig) -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr, "weight_decay": 0.0} for lr in (0.5, 0.25)]
    first = build_optimizer(OptimizerConfig(name="sgd"), groups)
    schedule = LrSchedule(before, first, 6, 2)
    for _ in range(6):
        first.step()
        schedule.step()
        schedule.epoch_done({"val/score": 0.0})
    if before is not CONSTANT:
        assert first.param_groups[0]["lr"] < 0.25
    second = build_optimizer(OptimizerConfig(name="sgd"), groups)
    LrSchedule(config, second, 6, 2)
    start = {"one-cycle": 0.04, "slanted-triangle": 1 / 32}.get(config.name, 1.0)
    assert [group["lr"] for group in second.param_groups] == pytest.approx([0.5 * start, 0.25 * start], abs=1e-12)
