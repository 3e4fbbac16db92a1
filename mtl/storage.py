"""Where tensors lie: views, tied tensors, two arrays over one buffer; what is spread over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Where a tensor's bytes lie: on which device, in which storage if it has no address, and from where to where.
_Span = tuple[str, int, int, int]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; all of it, but where it is spread over processes (FSDP)."""
    spread: Any = tensor
    here: Tensor = spread.to_local() if hasattr(tensor, "to_local") else tensor
    return here


def overlapping(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Pairs of a tensor of the first list and one of the second that have bytes in common, by their places.

    Tensors on the meta device, which have no addresses, are compared by their place in a common storage.
    """
    first, second = [local(tensor) for tensor in first], [local(tensor) for tensor in second]
    sides = [
        (side, place, tensor) for side, tensors in enumerate((first, second)) for place, tensor in enumerate(tensors)
    ]
    spans = sorted((*span, side, place) for side, place, tensor in sides if (span := _span(tensor)))
    pairs: list[tuple[int, int]] = []
    opened: list[list[tuple[str, int, int, int]]] = [[], []]
    for device, storage, begin, end, side, place in spans:
        where = (device, storage)
        # Spans are sorted by where they begin: those that end before this one does so need no further look.
        other = opened[1 - side] = [entry for entry in opened[1 - side] if entry[:2] == where and entry[2] > begin]
        for *_, there in other:
            pair = (place, there) if side == 0 else (there, place)
            if _share_bytes(first[pair[0]], second[pair[1]]):
                pairs.append(pair)
        opened[side].append((device, storage, end, place))
    return sorted(pairs)


def _span(tensor: Tensor) -> _Span | None:
    """Where a tensor's elements lie, from the first byte to behind the last; None if it has none."""
    if tensor.numel() == 0:
        return None
    extent = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin, storage = _address(tensor)
    return str(tensor.device), storage, begin, begin + int(extent) * tensor.element_size()


def _address(tensor: Tensor) -> tuple[int, int]:
    """The address of a tensor's first element; on the meta device its offset, and which storage it is an offset in."""
    if tensor.device.type == "meta":
        return int(tensor.storage_offset()) * tensor.element_size(), int(tensor.untyped_storage()._cdata)
    return tensor.data_ptr(), 0


def _share_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose spans meet really share bytes; columns of one matrix do not."""
    if a is b or (a.is_contiguous() and b.is_contiguous()):
        return True
    return bool(torch.isin(_bytes_of(a), _bytes_of(b)).any())


def _bytes_of(tensor: Tensor) -> Tensor:
    """The address of every byte of a tensor's elements."""
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + torch.arange(length, device="cpu") * stride).flatten()
    size = tensor.element_size()
    return (_address(tensor)[0] + offsets[:, None] * size + torch.arange(size, device="cpu")).flatten()
