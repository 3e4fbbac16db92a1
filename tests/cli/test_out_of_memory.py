"""Running out of memory is recognised by what torch and the system really raise."""

from __future__ import annotations

import errno

import pytest
import torch

from mtl.cli.out_of_memory import is_out_of_memory


def test_what_torch_raises_on_a_cpu_without_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_the_types_for_it_are_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("could not create a primitive descriptor for a convolution"),
        OSError(errno.ENOENT, "No such file"),
    ],
)
def test_another_error_is_not(error: Exception) -> None:
    assert not is_out_of_memory(error)
