"""Precision and size in combination: clean audits, exact steps, and the same bits however a run is broken off."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from crashes import assert_same, crashed, go_on
from mixes import VALUES, every_pair, in_words, settings
from mtl.run import train
from runs import read_metrics, tiny_parts

ROWS = every_pair(VALUES)


@pytest.fixture(autouse=True)
def _without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def test_every_pair_of_values_meets_and_few_runs_do() -> None:
    for one, other in combinations(VALUES, 2):
        met = {(row[one], row[other]) for row in ROWS}
        assert len(met) == len(VALUES[one]) * len(VALUES[other])
    assert len(ROWS) <= 14


def check_a_broken_run(folder: Path, number: int) -> None:
    """A run of a combination is clean, and ends with the same bits if it is broken off somewhere and goes on."""
    changes = settings(ROWS[number])
    for name in ("whole", "broken"):
        (folder / name).mkdir()
    whole = train(tiny_parts(folder / "whole", **changes), quiet=True).run_dir
    audit = json.loads((whole / "audit.json").read_text())
    assert audit["ok"] and [phase["completed"] for phase in audit["phases"]] == [True, True, True]
    rows = read_metrics(whole)
    steps = max(row["step"] for row in rows)
    at = random.Random(number).randint(1, steps)
    crashed(folder / "broken", at, **changes)
    assert_same(go_on(folder / "broken", **changes), whole)


@pytest.mark.parametrize("number", [0, 1], ids=[in_words(row) for row in ROWS[:2]])
def test_a_combination_is_clean_and_goes_on_to_the_same_bits(tmp_path: Path, number: int) -> None:
    check_a_broken_run(tmp_path, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2, len(ROWS)), ids=[in_words(row) for row in ROWS[2:]])
def test_every_pair_of_settings_is_clean_and_goes_on_to_the_same_bits(tmp_path: Path, number: int) -> None:
    check_a_broken_run(tmp_path, number)
