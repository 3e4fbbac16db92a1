"""Names in short: a module in place of everything registered on it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.runtime.text import condense, shorten

EVERY = ["stem.weight", "blocks.1.fc.weight", "blocks.1.fc.bias", "blocks.10.fc.weight", "head.weight", "scale"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["stem.weight"], ["stem"]),
        (["scale"], ["scale"]),
        (["blocks.1.fc.weight"], ["blocks.1.fc.weight"]),
        (["blocks.1.fc.bias", "blocks.1.fc.weight"], ["blocks.1"]),
        (["blocks.1.fc.weight", "blocks.10.fc.weight"], ["blocks.1.fc.weight", "blocks.10"]),
        (["blocks.1.fc.weight", "blocks.1.fc.bias", "blocks.10.fc.weight"], ["blocks"]),
        (["head.weight", "stem.weight", "head.weight"], ["head", "stem"]),
        (EVERY, ["stem", "blocks", "head", "scale"]),
    ],
)
def test_the_names_in_short_are_this_table(names: list[str], expected: list[str]) -> None:
    assert condense(names, EVERY) == expected


def test_a_module_whose_name_another_begins_with_is_another_module() -> None:
    every = ["layer.weight", "layer1.weight", "layer1.bias"]
    assert condense(["layer.weight", "layer1.bias"], every) == ["layer", "layer1.bias"]


def test_names_of_modules_are_condensed_as_well() -> None:
    every = ["trunk", "trunk.a", "trunk.a.norm", "trunk.b", "head"]
    assert condense(["trunk.a", "trunk.a.norm", "head"], every) == ["trunk.a", "head"]
    assert condense(["trunk.a.norm", "trunk.b"], every) == ["trunk.a.norm", "trunk.b"]


def test_a_module_without_what_is_in_it_is_listed_by_its_own_name() -> None:
    # As a module is that owns a frozen buffer and is held in eval for it, while its children train.
    assert condense(["trunk.block"], ["trunk", "trunk.block", "trunk.block.conv"]) == ["trunk.block"]


# --- properties


def covers(entry: str, name: str) -> bool:
    return name == entry or name.startswith(f"{entry}.")


@st.composite
def names_of_tensors(draw: st.DrawFn) -> list[str]:
    """Names of which none is a module around another, some with the same letters at the start."""
    path = st.lists(st.sampled_from(["a", "b", "ab", "a1"]), min_size=1, max_size=4).map(".".join)
    found = draw(st.lists(path, unique=True, min_size=1, max_size=14))
    return [name for name in found if not any(other != name and covers(name, other) for other in found)]


@given(every=names_of_tensors(), data=st.data())
@settings(max_examples=300, derandomize=True)
def test_exactly_the_names_are_covered_each_once_by_the_largest_modules(every: list[str], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(every), unique=True))
    short = condense(wanted, every)
    assert {name for name in every if any(covers(entry, name) for entry in short)} == set(wanted)
    assert all(sum(covers(entry, name) for entry in short) == 1 for name in wanted)
    assert not any(covers(one, other) for one in short for other in short if one is not other)
    for entry in short:
        above = entry.rpartition(".")[0]
        assert not above or any(covers(above, name) for name in every if name not in wanted)


@given(every=names_of_tensors())
@settings(max_examples=100, derandomize=True)
def test_all_names_are_the_outermost_modules(every: list[str]) -> None:
    assert condense(every, every) == list(dict.fromkeys(name.split(".")[0] for name in every))


@pytest.mark.parametrize(
    ("items", "most", "expected"),
    [
        ([], 2, ""),
        (["a"], 2, "a"),
        (["a", "b"], 2, "a, b"),
        (["a", "b", "c"], 2, "a, b and 1 more"),
        (["a", "b", "c", "d"], 1, "a and 3 more"),
    ],
)
def test_a_list_in_a_line_is_this_table(items: list[str], most: int, expected: str) -> None:
    assert shorten(items, most) == expected
