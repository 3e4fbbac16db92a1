"""Stores of features, in memory and on disk: what is read is what was written."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from device_sync import device_stays_busy, no_device_sync
from featurestore_rows import BIG, FIELDS, open_store, rows, same_bits
from mtl.featurestore import DiskStore, FeatureStore, Field, RamStore

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
]
Make = Callable[[int, list[Field]], FeatureStore]


@pytest.fixture(params=["ram", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "ram":
        return RamStore
    return lambda num_rows, fields: open_store(tmp_path / "store", num_rows, fields)


# Exactness

a_field = st.builds(Field, st.lists(st.integers(1, 4), max_size=3).map(tuple), st.sampled_from(DTYPES))


@settings(max_examples=60)
@given(data=st.data(), kind=st.sampled_from(["ram", "disk"]))
def test_what_is_read_is_bit_for_bit_what_was_written(data: st.DataObject, kind: str) -> None:
    fields = data.draw(st.lists(a_field, min_size=1, max_size=3))
    num_rows = data.draw(st.integers(1, 12))
    some = st.lists(st.integers(0, num_rows - 1), max_size=8)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = RamStore(num_rows, fields) if kind == "ram" else open_store(folder, num_rows, fields)
        stack.callback(store.close)
        there: set[int] = set()
        for batch in [*data.draw(st.lists(some, max_size=6)), list(range(num_rows))]:
            indices = torch.tensor(batch, dtype=torch.int64)
            store.write(indices, rows(indices, fields))
            there.update(batch)
            assert store.num_present == len(there)
            wanted = data.draw(some)
            asked = torch.tensor(wanted, dtype=torch.int64)
            is_there = bool(there) and there >= set(wanted)
            read = store.read(asked)
            assert same_bits(read, rows(asked, fields)) if is_there else read is None
        assert store.is_complete
        everything = torch.randperm(num_rows)
        if kind == "disk":
            again = stack.enter_context(closing(open_store(folder, num_rows, fields)))
            assert same_bits(again.read(everything), rows(everything, fields))
        assert same_bits(store.read(everything), rows(everything, fields))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_payloads_and_negative_zero_keep_their_bits(make: Make, dtype: torch.dtype) -> None:
    integer = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    bits = torch.randint(torch.iinfo(integer).min, torch.iinfo(integer).max, (2, 512), dtype=integer)
    bits[0, :3] = torch.tensor([-1, 1, torch.iinfo(integer).min], dtype=integer)  # a NaN, the least number, -0.0
    if dtype is torch.float32:
        bits[0, 3] = 0x7F800001  # a signalling NaN
    store = make(2, [Field((512,), dtype)])
    store.write(torch.tensor([0, 1]), [bits.view(dtype)])
    (read,) = store.read(torch.tensor([1, 0])) or [torch.empty(0)]
    assert read.view(integer).equal(bits[[1, 0]])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "a slice": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "every second": lambda x: torch.stack([x, x], 4)[..., 0],
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "expanded": lambda x: x[:1, :, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_memory_layout_and_float_dtype_is_taken(make: Make, layout: str, dtype: torch.dtype) -> None:
    tensor = LAYOUTS[layout](torch.randn(4, 3, 5, 2))
    store = make(9, [Field((3, 5, 2), dtype)])
    indices = torch.tensor([7, 0, 3, 5])
    store.write(indices, [tensor])
    assert same_bits(store.read(indices), [tensor.detach().to(dtype)])


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_taken(make: Make) -> None:
    tensor = torch.randn(4, 3, 5, 2, device="cuda").to(memory_format=torch.channels_last)
    store = make(4, [Field((3, 5, 2), torch.bfloat16)])
    store.write(torch.arange(4, device="cuda"), [tensor])
    assert same_bits(store.read(torch.arange(4)), [tensor.bfloat16().cpu()])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_what_is_read_into_pinned_memory_is_copied_to_a_gpu_without_waiting_for_it(kind: str, tmp_path: Path) -> None:
    fields, everything = [Field((64, 128), torch.bfloat16)], torch.arange(16)
    store = (
        RamStore(16, fields, pin_memory=True) if kind == "ram" else open_store(tmp_path, 16, fields, pin_memory=True)
    )
    store.write(everything, rows(everything, fields))
    store.read(everything)  # now the pinned memory is taken
    with device_stays_busy(), no_device_sync():
        (read,) = store.read(everything.flip(0)) or []
        copied = read.to("cuda", torch.float32, non_blocking=True)
    assert read.is_pinned()
    assert torch.equal(copied.cpu().nan_to_num(), rows(everything.flip(0), fields)[0].float().nan_to_num())


def test_a_row_that_is_there_stays_as_it_is(make: Make) -> None:
    store = make(4, FIELDS)
    first = rows(torch.tensor([2]), FIELDS)
    store.write(torch.tensor([2]), first)
    store.write(torch.tensor([2, 2, 1]), rows(torch.tensor([3, 3, 1]), FIELDS))
    assert same_bits(store.read(torch.tensor([2])), first)
    assert same_bits(store.read(torch.tensor([1])), rows(torch.tensor([1]), FIELDS))


def test_what_is_read_is_memory_of_its_own(make: Make) -> None:
    store = make(2, FIELDS)
    both = torch.tensor([0, 1])
    store.write(both, rows(both, FIELDS))
    for tensor in store.read(both) or []:
        tensor.zero_()
    assert same_bits(store.read(both), rows(both, FIELDS))


def test_training_may_use_what_was_written_and_read_in_inference_mode(make: Make) -> None:
    store = make(2, [Field((3,), torch.float32)])
    with torch.inference_mode():
        store.write(torch.tensor([0]), [torch.ones(1, 3)])
        (read,) = store.read(torch.tensor([0])) or []
    store.write(torch.tensor([1]), [torch.ones(1, 3)])
    assert not read.is_inference()
    head = torch.nn.Linear(3, 1)
    head(read).sum().backward()
    assert head.weight.grad is not None


# What is there


def test_an_empty_store_has_nothing_and_a_closed_one_takes_nothing(make: Make) -> None:
    store, indices = make(4, FIELDS), torch.arange(4)
    assert store.read(indices[:1]) is None
    store.write(indices, rows(indices, FIELDS))
    assert same_bits(store.read(indices), rows(indices, FIELDS))
    assert store.nbytes == 4 * (12 + 4)
    store.close()
    store.close()
    assert store.read(indices) is None
    store.write(indices, rows(indices, FIELDS))
    assert store.read(indices) is None


def test_memory_is_taken_at_the_first_write() -> None:
    store = RamStore(1 << 20, [Field((1 << 20,), torch.float32)])  # 4 TB
    assert store.nbytes == 1 << 42
    assert store.read(torch.tensor([5])) is None


def test_threads_that_read_while_rows_are_written_meet_no_half_row(make: Make) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        _read_while_rows_are_written(make)
    finally:
        sys.setswitchinterval(interval)


def _read_while_rows_are_written(make: Make) -> None:
    num_rows = 200
    store, content = make(num_rows, BIG), rows(torch.arange(num_rows), BIG)
    bad, good, stop = [], [], threading.Event()

    def look(seed: int) -> None:
        chance = np.random.default_rng(seed)
        while not stop.is_set():
            indices = torch.from_numpy(chance.integers(0, num_rows, 3))
            read = store.read(indices)
            if read is not None:
                (good if same_bits(read, [tensor[indices] for tensor in content]) else bad).append(indices)

    readers = [threading.Thread(target=look, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    for at in torch.randperm(num_rows).split(4):
        store.write(at, [tensor[at] for tensor in content])
    while len(good) < 100 and not bad:
        pass
    stop.set()
    for reader in readers:
        reader.join()
    assert not bad
    assert store.is_complete


# Mistakes of ours


@pytest.mark.parametrize(
    "indices", [torch.tensor([4]), torch.tensor([0, -1]), torch.tensor([0.0]), torch.tensor([True]), torch.tensor(1)]
)
def test_rows_that_cannot_be_are_never_read_or_written(make: Make, indices: Tensor) -> None:
    store = make(4, FIELDS)
    for call in (store.read, lambda i: store.write(i, rows(torch.tensor([0]), FIELDS))):
        with pytest.raises(AssertionError):
            call(indices)
    every = torch.arange(4)
    store.write(every, rows(every, FIELDS))
    with pytest.raises((AssertionError, IndexError)):
        store.read(indices)


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.zeros(1, 3, 2)],
        [torch.zeros(1, 2, 3), torch.zeros(1)],
        [torch.zeros(2, 3, 2), torch.zeros(1)],
        [torch.zeros(1, 3, 2), torch.zeros(1, dtype=torch.int64)],
    ],
)
def test_tensors_that_do_not_fit_are_never_written(make: Make, tensors: list[Tensor]) -> None:
    with pytest.raises(AssertionError, match=r"expected \[\(\(1, 3, 2\), torch.bfloat16\), .*, got"):
        make(4, FIELDS).write(torch.tensor([0]), tensors)


def test_a_key_that_is_no_json_names_no_entry(tmp_path: Path) -> None:
    for key in ({"a": {1, 2}}, {"a": float("nan")}, {"a": 1, 2: 3}):
        with pytest.raises((TypeError, ValueError)):
            DiskStore(tmp_path, key, 4, FIELDS)  # type: ignore[arg-type]
