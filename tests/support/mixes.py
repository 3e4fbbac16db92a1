"""Settings of a run in combination: few runs, in which every pair of values meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

from runs import TINY, TWO

# Five batches an epoch, so that windows of 2 and 3 end short; or six, of an odd size and with images left over.
_DATA = {"five": {"num_train": 20, "batch_size": 4}, "six": {"num_train": 20, "batch_size": 3}}
VALUES: dict[str, tuple[Any, ...]] = {
    "precision": ("fp32", "bf16", "fp16"),
    "accumulate": (1, 2, 3),
    "balance": ("fixed", "uw", "famo"),
    "clip_norm": (None, 1.0),
    "checkpointing": (False, True),
    "ema_decay": (None, 0.9),
    "cache": ("off", "ram"),
    "data": ("five", "six"),
    "not_finite": ("raise", "skip"),
}
PHASES: list[dict[str, Any]] = [
    {"name": "frozen", "freeze": ["trunk"], "epochs": 2},
    {"name": "half", "freeze": ["trunk@first:50%"], "epochs": 1, "lr_schedule": "cosine"},
    {"name": "all", "freeze": ["heads.object"], "steps": 4},
]


def every_pair(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations in which any two values of two keys meet at least once; the same ones each time.

    Source: one row at a time, each the one of all combinations that meets most pairs not met before (greedy, as AETG:
    Cohen et al., IEEE TSE 23(7), 1997; we look at all combinations, since there are few).
    """
    keys = list(values)
    every = [dict(zip(keys, row, strict=True)) for row in product(*values.values())]

    def pairs(row: Mapping[str, Any]) -> set[tuple[str, Any, str, Any]]:
        return {(one, row[one], other, row[other]) for one, other in combinations(keys, 2)}

    met = {id(row): pairs(row) for row in every}
    left = set().union(*met.values())
    found = []
    while left:
        best = max(every, key=lambda row: len(met[id(row)] & left))
        left -= met[id(best)]
        found.append(best)
    return found


def settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """A combination as top-level keys of the tiny configuration."""
    fixed = {"method": "fixed", "weights": {name: 1.0 + number for number, name in enumerate(TWO)}}
    return {
        "tasks": TWO,
        "precision": row["precision"],
        "not_finite": row["not_finite"],
        "trunk": {
            "name": "test_resnet",
            "options": {"drop_path_rate": 0.2},
            "checkpointing": row["checkpointing"],
        },
        "cache": {"mode": row["cache"]},
        "balance": fixed if row["balance"] == "fixed" else {"method": row["balance"]},
        "data": TINY["data"] | _DATA[row["data"]] | {"num_val": 8},
        "optim": {key: row[key] for key in ("accumulate", "clip_norm", "ema_decay") if row[key] is not None},
        "checkpoint": {"every_steps": 2},
        "phases": PHASES,
    }


def in_words(row: Mapping[str, Any]) -> str:
    return " ".join(f"{value}" for value in row.values())
