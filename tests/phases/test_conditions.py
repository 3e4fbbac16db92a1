from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from mtl.phases.conditions import AllOf, AnyOf, Condition, PhaseLength, Plateau, Reached, Spent, groups_of, leaves_of

PLATEAU, REACHED, SPENT = Plateau("m", patience=2), Reached("k", 0.5), Spent(10.0, "seconds")


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 1},
        {"steps": 1},
        {"evaluate_only": True},
        {"until": PLATEAU, "max_epochs": 1},
        {"until": REACHED, "max_steps": 1},
        {"until": SPENT, "max_epochs": 1, "max_steps": 1},
        {"until": Spent(0.5, "seconds"), "max_epochs": 1},
        {"until": AnyOf((AllOf((PLATEAU,)), SPENT)), "max_epochs": 1},
    ],
    ids=str,
)
def test_one_length_of_at_least_one_is_taken_as_it_is_given(fields: dict[str, Any]) -> None:
    nothing_else = {"epochs": None, "steps": None, "until": None, "max_epochs": None, "max_steps": None}
    expected = {"name": "p", "evaluate_only": False} | nothing_else | fields
    phase = PhaseLength("p", **fields)
    assert {name: getattr(phase, name) for name in expected} == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_epochs": 3},
        {"epochs": 1, "steps": 1},
        {"epochs": 0, "steps": 0},  # a count of 0 is given, too
        {"epochs": 1, "evaluate_only": True},
        {"steps": 1, "until": PLATEAU, "max_epochs": 3},
        {"until": PLATEAU, "max_epochs": 3, "evaluate_only": True},
        {"epochs": 1, "steps": 1, "until": PLATEAU, "max_epochs": 3, "evaluate_only": True},
    ],
    ids=str,
)
def test_anything_but_one_length_is_an_error(fields: dict[str, Any]) -> None:
    message = "phase 'odd': expected exactly one of epochs, steps, until, evaluate_only"
    with pytest.raises(ValueError, match=f"^{message}$"):
        PhaseLength("odd", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"until": PLATEAU},
        {"epochs": 1, "max_epochs": 3},
        {"epochs": 1, "max_steps": 3},
        {"steps": 1, "max_steps": 3},
        {"evaluate_only": True, "max_epochs": 3},
        {"evaluate_only": True, "max_steps": 0},
    ],
    ids=str,
)
def test_a_limit_without_an_until_and_an_until_without_a_limit_are_errors(fields: dict[str, Any]) -> None:
    message = "phase 'odd': expected max_epochs or max_steps exactly if there is an until"
    with pytest.raises(ValueError, match=f"^{message}$"):
        PhaseLength("odd", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 0},
        {"epochs": -1},
        {"steps": 0},
        {"steps": -3},
        {"until": PLATEAU, "max_epochs": 0},
        {"until": PLATEAU, "max_steps": 0},
        {"until": PLATEAU, "max_epochs": 3, "max_steps": 0},
        {"until": Plateau("m", patience=0), "max_epochs": 3},
        {"until": AnyOf((SPENT, AllOf((REACHED, Plateau("m", patience=-1))))), "max_epochs": 3},
        {"until": AnyOf(()), "max_epochs": 3},
        {"until": AllOf(()), "max_epochs": 3},
        {"until": AllOf((PLATEAU, AnyOf((SPENT, AllOf(()))))), "max_epochs": 3},
    ],
    ids=str,
)
def test_a_count_below_one_and_an_empty_group_are_errors(fields: dict[str, Any]) -> None:
    message = "phase 'odd': expected counts of at least 1 and conditions in any and all"
    with pytest.raises(ValueError, match=f"^{message}$"):
        PhaseLength("odd", **fields)


@pytest.mark.parametrize("spent", [Spent(0, "epochs"), Spent(-1, "steps"), Spent(0.0, "seconds")], ids=str)
def test_a_condition_that_holds_before_anything_happened_is_an_error(spent: Spent) -> None:
    with pytest.raises(ValueError, match=re.escape("phase 'odd': ")):
        PhaseLength("odd", until=AnyOf((REACHED, spent)), max_epochs=3)


TREE = AnyOf((PLATEAU, AllOf((REACHED, AnyOf((SPENT,)))), PLATEAU))


@pytest.mark.parametrize(
    ("condition", "leaves", "groups"),
    [
        (None, [], []),
        (SPENT, [SPENT], []),
        (AllOf((REACHED, PLATEAU)), [REACHED, PLATEAU], [AllOf((REACHED, PLATEAU))]),
        (TREE, [PLATEAU, REACHED, SPENT, PLATEAU], [TREE, AllOf((REACHED, AnyOf((SPENT,)))), AnyOf((SPENT,))]),
    ],
)
def test_leaves_and_groups_come_in_the_order_in_which_they_stand(
    condition: Condition | None, leaves: list[Condition], groups: list[Condition]
) -> None:
    assert list(leaves_of(condition)) == leaves
    assert list(groups_of(condition)) == groups


def test_a_phase_length_cannot_be_changed() -> None:
    phase = PhaseLength("p", epochs=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        phase.epochs = 0  # type: ignore[misc]
    assert phase == PhaseLength("p", epochs=1)
