"""Which tensors share bytes: tied, viewed, sliced, aliased; against sets of addresses written out one by one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtl.runtime.tensors import overlapping

NUM_BYTES = 48
DTYPES = [torch.uint8, torch.int16, torch.float32, torch.float64]
Cut = Callable[[Tensor], Tensor]


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the two overlap, asked both ways."""
    found = overlapping([a], [b])
    assert found == overlapping([b], [a])
    assert found in ([], [(0, 0)])
    return bool(found)


def matrix(device: str) -> Tensor:
    """Four rows of six numbers."""
    return torch.zeros(4, 6, device=device)


CUTS: list[tuple[str, Cut, Cut, bool]] = [
    ("itself", lambda m: m, lambda m: m, True),
    ("a view of it all", lambda m: m, lambda m: m.view(24), True),
    ("a transposed view", lambda m: m, lambda m: m.t(), True),
    ("a row", lambda m: m, lambda m: m[1], True),
    ("one number", lambda m: m[2], lambda m: m[2, 5], True),
    ("another row's number", lambda m: m[2], lambda m: m[3, 0], False),
    ("neighbouring rows", lambda m: m[:2], lambda m: m[2:], False),
    ("rows that meet", lambda m: m[:3], lambda m: m[2:], True),
    ("neighbouring columns", lambda m: m[:, :3], lambda m: m[:, 3:], False),
    ("columns that meet", lambda m: m[:, :4], lambda m: m[:, 3:], True),
    ("even and odd columns", lambda m: m[:, ::2], lambda m: m[:, 1::2], False),
    ("a column and a row", lambda m: m[:, 2], lambda m: m[1], True),
    ("a column and a row next to it", lambda m: m[1:, 2], lambda m: m[0], False),
    ("a column within a span but not its bytes", lambda m: m[:, 0], lambda m: m[1, 1:5], False),
    ("a number expanded", lambda m: m[0, 0].expand(3, 3), lambda m: m[0], True),
    ("a number expanded, next to", lambda m: m[0, 0].expand(3, 3), lambda m: m[0, 1:], False),
    ("nothing", lambda m: m, lambda m: m[1:1], False),
    ("the same bytes as bytes", lambda m: m[1], lambda m: m.view(torch.uint8)[1], True),
    ("a last byte", lambda m: m[1], lambda m: m.view(torch.uint8)[1, 23:], True),
    ("a byte before", lambda m: m[1], lambda m: m.view(torch.uint8)[0, 23:], False),
    ("wider numbers", lambda m: m[:, 1], lambda m: m.view(torch.float64)[:, 0], True),
    ("wider numbers next to", lambda m: m[:, 2], lambda m: m.view(torch.float64)[:, 0], False),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("first", "second", "expected"), [row[1:] for row in CUTS], ids=[row[0] for row in CUTS])
def test_two_cuts_of_one_matrix_overlap_as_in_this_table(device: str, first: Cut, second: Cut, expected: bool) -> None:
    whole = matrix(device)
    assert overlap(first(whole), second(whole)) is expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_of_their_own_do_not_overlap(device: str) -> None:
    tensors = [matrix(device) for _ in range(4)]
    assert overlapping(tensors[:2], tensors[2:]) == []


def test_a_tensor_without_an_address_overlaps_none_that_has_one() -> None:
    assert not overlap(torch.zeros(4), torch.zeros(4, device="meta"))


def test_a_meta_matrix_in_the_context_of_a_meta_device_is_looked_into_as_well() -> None:
    with torch.device("meta"):
        whole = torch.zeros(4, 6)
        assert not overlap(whole[:, 0], whole[:, 1])
        assert overlap(whole[:, :2], whole[:, 1:])


def test_a_tied_weight_is_found_by_its_places() -> None:
    a, b, c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    c.weight = b.weight
    assert overlapping([a.weight, a.bias, b.weight], [c.bias, c.weight]) == [(2, 1)]


def test_a_parameter_and_what_was_detached_or_taken_from_it_overlap() -> None:
    parameter = nn.Parameter(torch.zeros(3, 3))
    assert overlap(parameter, parameter.detach())
    assert overlap(parameter, parameter.data[1:])
    assert not overlap(parameter, parameter.detach().clone())


def test_the_real_and_imaginary_parts_do_not_overlap_but_both_overlap_the_whole() -> None:
    whole = torch.zeros(5, dtype=torch.complex64)
    assert not overlap(whole.real, whole.imag)
    assert overlap(whole, whole.real)
    assert overlap(whole, whole.imag)


def test_arrays_over_one_buffer_overlap_although_their_storages_differ() -> None:
    buffer = np.zeros(8, dtype=np.float32)
    whole, middle, end = torch.from_numpy(buffer), torch.from_numpy(buffer[2:5]), torch.from_numpy(buffer[5:])
    assert whole.untyped_storage()._cdata != middle.untyped_storage()._cdata
    assert overlap(whole, middle)
    assert overlap(whole, end)
    assert not overlap(middle, end)
    assert overlap(torch.from_numpy(buffer), torch.from_numpy(buffer.view(np.int16)))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_an_empty_tensor_overlaps_nothing_not_even_itself(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape)
    assert not overlap(empty, empty)
    assert overlapping([empty], [torch.zeros(3)]) == []


def test_nothing_given_is_nothing_found() -> None:
    tensor = torch.zeros(2)
    assert overlapping([], []) == overlapping([tensor], []) == overlapping([], [tensor]) == []


def test_pairs_are_sorted_and_complete() -> None:
    whole = torch.zeros(6)
    first = [whole[4:], whole, torch.zeros(3), whole[:2]]
    second = [whole[1:5], torch.zeros(1), whole[5:]]
    assert overlapping(first, second) == [(0, 0), (0, 2), (1, 0), (1, 2), (3, 0)]


def test_a_channels_last_weight_overlaps_its_own_slices_only() -> None:
    weight = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
    assert overlap(weight, weight.detach())
    assert overlap(weight[:, :2], weight[:, 1:])
    assert not overlap(weight[:, :1], weight[:, 1:])


# --- against the addresses of all bytes

# A tensor as numbers: which of two buffers, its type, sizes, strides, offset.
Shape = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...], int]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    dtype = draw(st.sampled_from(DTYPES))
    room = NUM_BYTES // dtype.itemsize - 1
    sizes, strides = [], []
    last = 0
    for _ in range(draw(st.integers(0, 3))):
        size = draw(st.sampled_from([1, 2, 3, 2, 3, 0]))
        most = 7 if size <= 1 else min(7, (room - last) // (size - 1))
        stride = draw(st.integers(0, most))
        last += max(0, size - 1) * stride
        sizes.append(size)
        strides.append(stride)
    return draw(st.integers(0, 1)), dtype, tuple(sizes), tuple(strides), draw(st.integers(0, room - last))


def made(shape: Shape, buffers: list[Tensor]) -> Tensor:
    which, dtype, sizes, strides, offset = shape
    return buffers[which].view(dtype).as_strided(sizes, strides, offset)


def addresses(shape: Shape) -> set[tuple[int, int]]:
    """Every byte as which buffer and where in it."""
    which, dtype, sizes, strides, offset = shape
    size = dtype.itemsize
    found = set()
    for index in product(*map(range, sizes)):
        begin = (offset + sum(i * stride for i, stride in zip(index, strides, strict=True))) * size
        found |= {(which, begin + byte) for byte in range(size)}
    return found


@pytest.mark.parametrize("device", ["cpu", "meta"])
@given(first=st.lists(shapes(), max_size=5), second=st.lists(shapes(), max_size=5))
@settings(max_examples=200, derandomize=True)
def test_pairs_are_those_whose_sets_of_addresses_meet(device: str, first: list[Shape], second: list[Shape]) -> None:
    buffers = [torch.zeros(NUM_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    found = overlapping([made(shape, buffers) for shape in first], [made(shape, buffers) for shape in second])
    assert found == [
        (one, other)
        for one, a in enumerate(first)
        for other, b in enumerate(second)
        if not addresses(a).isdisjoint(addresses(b))
    ]
