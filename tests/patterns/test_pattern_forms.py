"""Slices, depth groups, classes, regular expressions and counted patterns, as tables on one small tree."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtl.patterns import Counted, PatternError, partition, select
from mtl.patterns.module_tree import describe


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.norm = nn.BatchNorm1d(2)
        self.act = nn.ReLU()
        self.fc = nn.Linear(2, 2)


class Trunk(nn.Module):
    """A bare token, a stem, three blocks in a list, a last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(2))
        self.stem = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.norm = nn.SyncBatchNorm(2)


ROOT = nn.ModuleDict({"trunk": Trunk(), "heads": nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})})
TREE = describe(ROOT)
NAMES = [name for name, _ in ROOT.named_parameters()]
BUFFERS = [name for name, _ in ROOT.named_buffers()]
BLOCK = ["scale", "norm.weight", "norm.bias", "fc.weight", "fc.bias"]


def block(number: int) -> list[str]:
    return [f"trunk.blocks.{number}.{name}" for name in BLOCK]


STEM = ["trunk.stem.0.weight", "trunk.stem.2.weight"]
NORM = ["trunk.norm.weight", "trunk.norm.bias"]
HEADS = ["heads.a.weight", "heads.a.bias", "heads.b.weight", "heads.b.bias"]

TABLE = {
    # children by position
    "trunk[0]": STEM,
    "trunk[-1]": NORM,
    "trunk[:2]": [*STEM, *block(0), *block(1), *block(2)],
    "trunk[1:]": [*block(0), *block(1), *block(2), *NORM],
    "trunk.blocks[1]": block(1),
    "trunk.blocks[::2]": [*block(0), *block(2)],
    "trunk.blocks[-2:].norm": [f"trunk.blocks.{i}.norm.{n}" for i in (1, 2) for n in ("weight", "bias")],
    "trunk.blocks[0].fc.bias": ["trunk.blocks.0.fc.bias"],
    "trunk.blocks[:2].*.weight": [f"trunk.blocks.{i}.{n}.weight" for i in (0, 1) for n in ("norm", "fc")],
    "trunk.stem[:2]": STEM[:1],
    "[1]": HEADS,
    "heads[0]": HEADS[:2],
    "trunk[1][0]": block(0),
    "*[0]": [*STEM, *HEADS[:2]],
    # depth groups of a module without timm's own: the token goes with the stem
    "trunk@first:1": ["trunk.token", "trunk.stem.0.weight"],
    "trunk@first:3": ["trunk.token", *STEM, *block(0)],
    "trunk@last:1": NORM,
    "trunk@last:2": [*block(2), *NORM],
    "trunk@first:50%": ["trunk.token", *STEM, *block(0)],
    "trunk@first:1%": ["trunk.token", "trunk.stem.0.weight"],
    "trunk@first:100%": [name for name in NAMES if name.startswith("trunk.")],
    # classes, subclasses too
    "type:Linear": [
        *STEM,
        *[f"trunk.blocks.{i}.fc.{n}" for i in range(3) for n in ("weight", "bias")],
        *HEADS,
    ],
    "type:BatchNorm1d": [f"trunk.blocks.{i}.norm.{n}" for i in range(3) for n in ("weight", "bias")],
    "type:_BatchNorm": [
        *[f"trunk.blocks.{i}.norm.{n}" for i in range(3) for n in ("weight", "bias")],
        *NORM,
    ],
    "type:Block": [*block(0), *block(1), *block(2)],
    # regular expressions match whole names
    r"re:heads\.[ab]\.bias": ["heads.a.bias", "heads.b.bias"],
    r"re:.*\.(scale|token)": ["trunk.token", *[f"trunk.blocks.{i}.scale" for i in range(3)]],
}


@pytest.mark.parametrize("pattern", TABLE)
def test_a_form_selects_exactly_these_names(pattern: str) -> None:
    assert sorted(select([pattern], NAMES, TREE).names) == sorted(TABLE[pattern])
    rest = select(["**", f"!{pattern}"], NAMES, TREE).names
    assert sorted([*rest, *TABLE[pattern]]) == sorted(NAMES), "and taken back, leaves exactly the others"


def test_a_class_pattern_takes_the_buffers_of_its_modules_too() -> None:
    split = partition(["type:BatchNorm1d"], NAMES, BUFFERS, TREE)
    assert split.frozen_buffers == tuple(name for name in BUFFERS if name.startswith("trunk.blocks."))


@pytest.mark.parametrize("patterns", [["trunk@first:3"], ["trunk", "!trunk@last:3"], ["**", "!heads", "!trunk@last:3"]])
def test_depth_groups_take_the_buffers_next_to_their_parameters_and_take_them_back(patterns: list[str]) -> None:
    split = partition(patterns, NAMES, BUFFERS, TREE)
    assert split.frozen_buffers == tuple(name for name in BUFFERS if name.startswith("trunk.blocks.0."))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("trunk[9]", r"pattern 'trunk\[9\]' matches nothing \('trunk' has 3 children: stem, blocks, norm"),
        ("trunk.stem[1]", r"pattern 'trunk.stem\[1\]' matches nothing"),
        ("trunk[]", r"cannot be read at \[\]: expected \[2\], \[-1\] or \[0:2\]"),
        ("trunk[a]", r"cannot be read at \[a\]"),
        ("trunk[0:1:2:3]", r"cannot be read at \[0:1:2:3\]"),
        ("trunk[::0]", r"cannot be read at \[::0\]"),
        ("trunk[", "cannot be read at"),
        ("trunk@first", r"cannot be read: expected module@first:2, @last:1 or @first:50%"),
        ("trunk@middle:1", "cannot be read: expected module@first:2"),
        ("trunk@first:7", r"asks for 7 of the 6 depth groups of 'trunk'"),
        ("trunk@first:0", r"asks for 0 of the 6 depth groups of 'trunk'"),
        ("trunk@first:101%", r"asks for 101% of the 6 depth groups of 'trunk'"),
        ("trunc@first:1", r"matches nothing: no module 'trunc' has parameters"),
        ("type:Conv2d", r"matches nothing: no module is a 'Conv2d'"),
        ("type:Liner", r"no module is a 'Liner'; nearest: Linear"),
        ("re:(", r"is not a regular expression"),
        ("re:heads", r"pattern 're:heads' matches nothing"),
    ],
)
def test_a_form_that_selects_nothing_or_cannot_be_read_says_why(pattern: str, message: str) -> None:
    with pytest.raises(PatternError, match=message) as caught:
        select(["heads", pattern], NAMES, TREE)
    assert caught.value.index == 1


def test_a_counted_pattern_matches_exactly_so_many_names() -> None:
    assert select([Counted("heads.a", 2)], NAMES, TREE).names == ("heads.a.weight", "heads.a.bias")
    with pytest.raises(PatternError, match=r"pattern 'heads' must match 3 names, but matches 4") as caught:
        select(["trunk", Counted("heads", 3)], NAMES, TREE)
    assert caught.value.index == 1
