"""Fingerprints: what they must distinguish, what they must not, and what they are made of."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtl.runtime.fingerprint import fingerprint, fingerprint_of_file, root

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
quick = settings(derandomize=True, database=None, max_examples=60)


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, in the same memory."""
    return tensor.reshape(-1).view(torch.uint8)


def example(dtype: torch.dtype) -> Tensor:
    return torch.arange(12).reshape(3, 4).remainder(2 if dtype == torch.bool else 12).to(dtype)


# --- what is distinguished


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_flip_of_any_single_bit_changes_the_fingerprint_and_flipping_back_restores_it(dtype: torch.dtype) -> None:
    tensor = example(dtype)
    before = fingerprint(tensor)
    seen = {before}
    num_bits = 8 * tensor.numel() * tensor.element_size()
    for place in range(num_bits):
        raw(tensor)[place // 8] ^= 1 << place % 8
        seen.add(fingerprint(tensor))
        raw(tensor)[place // 8] ^= 1 << place % 8
    assert len(seen) == num_bits + 1
    assert fingerprint(tensor) == before


def test_the_sign_of_zero_is_detected() -> None:
    positive, negative = torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0])
    assert torch.equal(positive, negative)
    assert fingerprint(positive) != fingerprint(negative)


def test_a_permutation_is_detected() -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    permuted = [tensor, tensor.flip(0), tensor.flip(1), tensor.roll(1, 0), tensor.flatten().flip(0).reshape(4, 6)]
    assert len({fingerprint(each) for each in permuted}) == len(permuted)


def test_a_uniform_change_of_a_constant_is_detected() -> None:
    # An XOR of all elements would be 0 for each of these.
    assert len({fingerprint(torch.full((4,), value)) for value in (0.0, 1.0, -1.0, 2.0)}) == 4


def test_the_type_is_part_of_it() -> None:
    zeros = [torch.zeros(4, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.float16, torch.bfloat16)]
    assert raw(zeros[0]).tolist() == raw(zeros[1]).tolist()
    assert raw(zeros[2]).tolist() == raw(zeros[3]).tolist()
    assert len({fingerprint(tensor) for tensor in zeros}) == 4


def test_the_shape_is_part_of_it() -> None:
    shapes = [(6,), (6, 1), (1, 6), (2, 3), (3, 2)]
    assert len({fingerprint(torch.arange(6.0).reshape(shape)) for shape in shapes}) == len(shapes)


def test_a_transpose_in_the_same_memory_is_another_tensor() -> None:
    square = torch.arange(4.0).reshape(2, 2)
    assert square.T.data_ptr() == square.data_ptr()
    assert fingerprint(square.T) != fingerprint(square)


def test_empty_tensors_differ_by_type_and_shape_only() -> None:
    empty = [torch.empty(0), torch.empty(0, 3), torch.empty(3, 0), torch.empty(0, dtype=torch.int64)]
    assert len({fingerprint(tensor) for tensor in empty}) == len(empty)
    assert fingerprint(torch.empty(0, 3)) == fingerprint(torch.ones(5, 3)[:0])


def test_a_number_without_axes_has_its_own() -> None:
    values = [torch.tensor(1.0), torch.tensor(-1.0), torch.tensor([1.0]), torch.tensor(1)]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint(torch.tensor(1.0)) == fingerprint(torch.ones(()))


def test_two_nans_of_different_bytes_differ() -> None:
    quiet, other = (torch.tensor(bits, dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert quiet.isnan()
    assert other.isnan()
    assert fingerprint(quiet) != fingerprint(other)


# --- what is not distinguished


def test_nan_equals_itself() -> None:
    tensor = torch.tensor([1.0, torch.nan])
    assert not torch.equal(tensor, tensor.clone())
    assert fingerprint(tensor) == fingerprint(tensor.clone())


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 1), (1, 3, 4, 5), (2, 1, 4, 5)])
def test_the_memory_format_does_not_matter(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    assert fingerprint(tensor.to(memory_format=torch.channels_last)) == fingerprint(tensor)


def test_strides_offsets_and_expansion_do_not_matter() -> None:
    table = torch.arange(24.0).reshape(4, 6)
    assert not table[1:, ::2].is_contiguous()
    assert fingerprint(table[1:, ::2]) == fingerprint(table[1:, ::2].clone(memory_format=torch.contiguous_format))
    assert fingerprint(table.T) == fingerprint(table.T.contiguous())
    assert fingerprint(torch.ones(1).expand(3)) == fingerprint(torch.ones(3))


def test_a_parameter_has_the_fingerprint_of_its_tensor_with_or_without_gradient() -> None:
    tensor = torch.arange(3.0)
    parameter = nn.Parameter(tensor.clone())
    assert fingerprint(parameter) == fingerprint(tensor)
    (parameter * 2).sum().backward()
    assert fingerprint(parameter) == fingerprint(tensor)
    assert fingerprint(parameter * 1) == fingerprint(tensor)


def test_a_lazy_conjugate_has_the_fingerprint_of_its_values() -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    assert values.conj().is_conj()
    assert fingerprint(values.conj()) == fingerprint(values.conj_physical())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_taking_it_changes_nothing(dtype: torch.dtype) -> None:
    tensor = example(dtype).T
    before, version, address = tensor.clone(), tensor._version, tensor.data_ptr()
    fingerprint(tensor)
    assert torch.equal(tensor, before)
    assert (tensor._version, tensor.data_ptr(), tensor.dtype) == (version, address, dtype)


# --- what it is made of


def test_it_is_the_digest_of_type_shape_and_bytes() -> None:
    expected = xxhash.xxh3_128(b"torch.float32 (1, 3)" + struct.pack("<3f", 1.5, -0.0, 2.0)).hexdigest()
    assert fingerprint(torch.tensor([[1.5, -0.0, 2.0]])) == expected
    expected = xxhash.xxh3_128(b"torch.int64 ()" + struct.pack("<q", -7)).hexdigest()
    assert fingerprint(torch.tensor(-7)) == expected
    assert fingerprint(torch.empty(0, 2)) == xxhash.xxh3_128(b"torch.float32 (0, 2)").hexdigest()


# --- properties

floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
vectors = st.lists(floats, max_size=8)


@given(vectors, vectors)
@quick
def test_two_vectors_have_one_fingerprint_exactly_if_they_have_the_same_bytes(a: list[float], b: list[float]) -> None:
    first, second = torch.tensor(a), torch.tensor(b)
    same = len(a) == len(b) and raw(first).tolist() == raw(second).tolist()
    assert (fingerprint(first) == fingerprint(second)) == same
    assert fingerprint(first) == fingerprint(torch.tensor(a))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.randoms(use_true_random=False))
@quick
def test_any_order_of_axes_in_memory_gives_the_fingerprint_of_the_logical_tensor(
    shape: list[int], random: object
) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)  # type: ignore[attr-defined]
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    inverse = [order.index(axis) for axis in range(len(shape))]
    in_other_memory = tensor.permute(order).contiguous().permute(inverse)
    assert torch.equal(in_other_memory, tensor)
    assert fingerprint(in_other_memory) == fingerprint(tensor)


# --- root


def test_a_root_does_not_depend_on_the_order() -> None:
    assert root({"a": "1", "b": "2", "c": "3"}) == root({"c": "3", "a": "1", "b": "2"})


def test_a_root_depends_on_every_name_and_every_digest() -> None:
    roots = [
        {},
        {"a": "1"},
        {"a": "2"},
        {"b": "1"},
        {"a": "1", "b": "2"},
        {"a": "2", "b": "1"},
        {"a": "1", "b": "2", "c": "1"},
        {"a.weight": "1"},
        {"a1": ""},
    ]
    assert len({root(each) for each in roots}) == len(roots)


def test_a_root_of_renamed_tensors_differs_though_their_bytes_are_the_same() -> None:
    digest = fingerprint(torch.ones(3))
    assert root({"trunk.weight": digest}) != root({"heads.weight": digest})


digests = st.dictionaries(st.sampled_from("abcde"), st.sampled_from("0123"), max_size=5)


@given(digests, digests)
@quick
def test_two_roots_are_equal_exactly_if_their_tables_are(a: dict[str, str], b: dict[str, str]) -> None:
    assert (root(a) == root(b)) == (a == b)
    assert root(dict(reversed(a.items()))) == root(a)


@pytest.mark.parametrize("size", [0, 1, 300_000])
def test_that_of_a_file_is_the_digest_of_its_bytes_and_nothing_else(tmp_path: Path, size: int) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert fingerprint_of_file(tmp_path / "file") == xxhash.xxh3_128_hexdigest(content[:size])
