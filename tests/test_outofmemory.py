"""Running out of memory is recognised by what torch really raises."""

from __future__ import annotations

import pytest
import torch

from mtl.outofmemory import is_out_of_memory


def test_what_torch_raises_on_a_cpu_without_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_the_types_for_it_are_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_another_error_is_not() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
