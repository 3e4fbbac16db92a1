from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mtl.config import load_config
from mtl.phases.conditions import AllOf, AnyOf, Condition, Plateau, Reached, Spent
from mtl.phases.metrics import RunMetrics
from mtl.phases.phase_length import PhaseLength
from mtl.tasks import build_tasks

PLATEAU, REACHED, SPENT = Plateau("m", patience=2), Reached("k", 0.5), Spent(10.0, "seconds")
BETTER, RMSE = Plateau("val/score"), "val/depth/rmse"
DEPTH = "val/depth/abs_rel"  # its main metric, so that lower is known to be better
PHASE = "name: r\ntrunk: {name: test_resnet}\ntasks: {depth: {type: depth}}\nphases:\n  - {name: a, "


def length_of(keys: str) -> PhaseLength:
    """The length of a phase of these keys in YAML's flow style."""
    file = Path("run.yaml")
    file.write_text(f"{PHASE}{keys}}}\n")
    config = load_config(file)
    return PhaseLength.from_config(config.written_phases[0], RunMetrics(config, build_tasks(config)))


@pytest.mark.parametrize(
    ("keys", "length", "words"),
    [
        ("epochs: 2", PhaseLength("a", epochs=2), "2 epochs (40 steps)"),
        ("steps: 1", PhaseLength("a", steps=1), "1 step"),
        ("evaluate_only: true", PhaseLength("a", evaluate_only=True), "one evaluation"),
        (
            "until: {plateau: val/score}, max_epochs: 1",
            PhaseLength("a", until=BETTER, max_epochs=1),
            "until plateau of val/score for 1 epoch, at most 1 epoch (40 steps)",
        ),
        (
            "until: {epochs: 3}, max_steps: 40",
            PhaseLength("a", until=Spent(3, "epochs"), max_steps=40),
            "until 3 epochs, at most 40 steps",
        ),
        (
            "until: {steps: 1200}, max_epochs: 9, max_steps: 40",
            PhaseLength("a", until=Spent(1200, "steps"), max_epochs=9, max_steps=40),
            "until 1,200 steps, at most 9 epochs or 40 steps (40 steps)",
        ),
    ],
)
def test_a_length_is_what_was_written_and_says_so(keys: str, length: PhaseLength, words: str) -> None:
    assert length_of(keys) == length
    assert length.describe(num_steps=40) == words


@pytest.mark.parametrize(
    ("until", "condition", "words"),
    [
        (
            f"{{plateau: {DEPTH}, patience: 2, min_delta: 0.5}}",
            Plateau(DEPTH, 2, "lower", 0.5),
            f"plateau of {DEPTH} for 2 epochs",
        ),
        (f"{{plateau: {RMSE}, direction: lower}}", Plateau(RMSE, 1, "lower"), f"plateau of {RMSE} for 1 epoch"),
        (f"{{metric: {RMSE}, at_least: 0.25}}", Reached(RMSE, 0.25, "higher"), f"{RMSE} is at least 0.25"),
        (f"{{metric: {RMSE}, at_most: 0}}", Reached(RMSE, 0.0, "lower"), f"{RMSE} is at most 0"),
        ("{wall_time_s: 0.5}", Spent(0.5, "seconds"), "0.5 seconds"),
        ("{wall_time_s: 1}", Spent(1.0, "seconds"), "1 second"),
        (
            "{any: [{steps: 1}, {plateau: val/score}]}",
            AnyOf((Spent(1, "steps"), BETTER)),
            "(1 step or plateau of val/score for 1 epoch)",
        ),
        (
            "{all: [{epochs: 2}, {any: [{steps: 3}, {wall_time_s: 60}]}]}",
            AllOf((Spent(2, "epochs"), AnyOf((Spent(3, "steps"), Spent(60.0, "seconds"))))),
            "(2 epochs and (3 steps or 60 seconds))",
        ),
    ],
)
def test_a_condition_is_what_was_written_and_says_so(until: str, condition: Condition, words: str) -> None:
    assert length_of(f"max_epochs: 1, until: {until}").until == condition
    assert str(condition) == words


TREE = AnyOf((PLATEAU, AllOf((REACHED, AnyOf((SPENT,)))), PLATEAU))


@pytest.mark.parametrize(
    ("condition", "metrics"),
    [(SPENT, ()), (AllOf((REACHED, PLATEAU)), ("k", "m")), (TREE, ("m", "k", "m"))],
)
def test_metrics_come_in_the_order_in_which_they_stand(condition: Condition, metrics: tuple[str, ...]) -> None:
    assert condition.metrics == metrics == PhaseLength("p", until=condition, max_epochs=1).metrics


def test_any_and_all_of_the_same_conditions_are_not_the_same() -> None:
    assert AnyOf((SPENT,)) != AllOf((SPENT,))
    assert AnyOf((SPENT,)) == AnyOf((SPENT,))


@pytest.mark.parametrize(
    ("length", "num_steps"),
    [
        (PhaseLength("p", epochs=3), 15),
        (PhaseLength("p", steps=7), 7),
        (PhaseLength("p", until=SPENT, max_epochs=2), 10),
        (PhaseLength("p", until=SPENT, max_epochs=2, max_steps=9), 9),
        (PhaseLength("p", evaluate_only=True), 0),
    ],
)
def test_a_length_in_steps_is_the_nearest_limit(length: PhaseLength, num_steps: int) -> None:
    assert length.num_steps(steps_per_epoch=5) == num_steps


def test_a_phase_length_cannot_be_changed() -> None:
    phase = PhaseLength("p", epochs=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        phase.epochs = 0  # type: ignore[misc]
    assert phase == PhaseLength("p", epochs=1)
