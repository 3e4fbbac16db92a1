"""Nested state: any optimizer state comes back out of a checkpoint, to the bit."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtl.checkpoint.folder import Checkpoints
from mtl.checkpoint.load import load_checkpoint
from mtl.checkpoint.nested import merge, split
from mtl.runtime.fingerprint import fingerprint


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are the same in types, keys, their order, and bits; a tuple is as good as a list."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and fingerprint(one) == fingerprint(other)
    if isinstance(one, Mapping):
        return (
            isinstance(other, dict)
            and [(type(key), key) for key in one] == [(type(key), key) for key in other]
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


def kept(moments: dict[str, Any]) -> Any:
    """What comes back out of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        Checkpoints(Path(folder)).save(nn.Linear(1, 1), [], moments, {"step": 1}, ["last"])
        # What is read lies in memory of its own before the folder goes.
        return load_checkpoint(Path(folder) / "last", nn.Linear(1, 1))[1]


TYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits, in any form: without axes, without elements, columns of another, seen from the other side."""
    dtype = draw(st.sampled_from(TYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = torch.empty(0, dtype=dtype).element_size()
    content = bytearray(draw(st.binary(min_size=27 * size, max_size=27 * size)))
    memory = torch.frombuffer(content, dtype=torch.uint8)
    whole = (memory & 1).bool() if dtype == torch.bool else memory.view(dtype)
    tensor = whole[: int(torch.Size(shape).numel())].reshape(shape)
    match draw(st.sampled_from(["plain", "transposed", "column", "parameter"])):
        case "transposed" if tensor.ndim > 1:
            return tensor.transpose(0, -1)
        case "column" if tensor.ndim and tensor.shape[-1]:
            return tensor[..., 0]
        case "parameter" if dtype.is_floating_point and dtype.itemsize > 1:
            return nn.Parameter(tensor)
    return tensor


KEYS = st.text(max_size=4) | st.sampled_from(["a", "a/b", "b", "__metadata__", "tensor", "dict", "float", "1"])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    PLAIN | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(KEYS | st.integers(-3, 3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150)
@given(moments=st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, max_size=3), max_size=3))
def test_any_nested_state_comes_back_to_the_bit(moments: dict[str, Any]) -> None:
    assert same(moments, kept(moments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint16])
@pytest.mark.parametrize("length", [0, 1])
def test_the_lone_element_of_a_column_comes_back(dtype: torch.dtype, length: int) -> None:
    column = torch.arange(4).to(dtype).reshape(2, 2)[:length, 1]
    assert column.is_contiguous() and column.stride() == (2,)
    assert same({"a": {"b": column}}, kept({"a": {"b": column}}))


def test_odd_texts_do_not_get_in_each_others_way() -> None:
    one, two, three = torch.ones(1), torch.zeros(2), torch.zeros(2)
    moments = {"a/b": {"c": one}, "a": {"b/c": two, "b": {"c": one, 1: three, "1": three[:1]}}, "\ud800": {"x": two}}
    assert same(moments, kept(moments))


def test_the_states_of_random_numbers_and_of_a_stepped_optimizer_come_back() -> None:
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(layer.parameters(), amsgrad=True)
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    moments = {"famo": {"0": optimizer.state_dict()}, "random": {"torch": torch.get_rng_state()}}
    found = kept(moments)
    assert same(moments, found) and list(found["famo"]["0"]["state"]) == [0, 1]
    optimizer.load_state_dict(found["famo"]["0"])
    torch.set_rng_state(found["random"]["torch"])


def test_names_of_tensors_say_where_they_were() -> None:
    apart, rest = split({"adam": {"w": {"exp_avg": torch.ones(1), "steps": [torch.ones(1), 2.5]}}})
    assert [*apart] == ["adam/w/exp_avg", "adam/w/steps/0"]
    assert same(
        merge(apart, json.loads(json.dumps(rest))),
        {"adam": {"w": {"exp_avg": torch.ones(1), "steps": [torch.ones(1), 2.5]}}},
    )


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({1, 2}, r"k/w/odd: expected tensors and plain data, got a set"),
        (nn.Linear(1, 1), r"k/w/odd: .* got a Linear"),
        ([torch.eye(2).to_sparse()], r"k/w/odd/0: expected a dense tensor, got a sparse or quantized one"),
        ({(1, 2): 3}, r"k/w/odd: expected keys that are text or integers, got \(1, 2\)"),
        ({True: 3}, r"k/w/odd: expected keys .* got True"),
    ],
)
def test_what_cannot_be_kept_is_named(odd: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"optimizer state at {message}"):
        split({"k": {"w": {"odd": odd}}})


@pytest.mark.parametrize(
    "rest",
    [
        {"tensor": "x"},
        {"tensor": "w", "type": "load", "shape": [1]},
        {"tensor": "w", "type": "none", "shape": [1]},
        {"tensor": "w", "type": "float64", "shape": [7]},
        {"items": [[[], 1]]},
        {"items": [1]},
        {"dict": 3},
        {"float": "x"},
        {"else": 1},
    ],
)
def test_what_does_not_belong_together_is_refused(rest: Any) -> None:
    with pytest.raises(ValueError):
        merge({"w": torch.zeros(8, dtype=torch.uint8)}, {"dict": {"k": rest}})
