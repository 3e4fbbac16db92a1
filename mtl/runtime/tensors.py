"""Tensors in memory: views, tied tensors, two arrays over one buffer; and tensors sharded over processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Where a tensor's bytes lie: on which device, in which storage if it has no address, and from where to where.
_Span = tuple[str, int, int, int]
# Torch's allocators give addresses that are multiples of it, in bytes.
_ALIGNMENT = 64


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; all of it if it is not sharded (FSDP)."""
    sharded: Any = tensor
    here: Tensor = sharded.to_local() if hasattr(tensor, "to_local") else tensor
    return here


def byte_view(tensor: Tensor) -> Tensor:
    """The bytes of a tensor that is contiguous, a view of it."""
    # By strides of its own: a tensor without axes, or a lone element of a column, cannot be viewed as another type.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def aligned(tensor: Tensor) -> Tensor:
    """A tensor that begins where memory of its own could: itself, or a copy. The bits of a product may depend on it."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over processes (FSDP)."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; if it is sharded, every process has to call it in the same order."""
    sharded: Any = tensor
    full: Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return full


def shard_like(model: Tensor, tensor: Tensor) -> Tensor:
    """A full tensor, which every process has, sharded as one of the same shape is; nothing is sent."""
    if not is_sharded(model) or is_sharded(tensor) or tensor.shape != model.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = model
    given = tensor.to(local(model).device)
    return distribute_tensor(given, sharded.device_mesh, sharded.placements, src_data_rank=None)


def shard_offsets(tensor: Tensor) -> Sequence[int]:
    """Where in a tensor this process's shard begins, for each axis; zeros if it is not sharded."""
    sharded: Any = tensor
    if not is_sharded(tensor):
        return [0] * tensor.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, sharded.device_mesh, sharded.placements)[1]


def sharded_as(model: Tensor, here: Tensor) -> Tensor:
    """A sharded tensor of which this process has a shard; nothing is sent.

    Args:
        model: Is sharded in the same way.
        here: The shard, "*s" for the shape s of the model's own, or "t *s": with an axis before it that is not sharded.
    """
    from torch.distributed.tensor import DTensor, Shard

    sharded: Any = model
    shape, stride, placements = model.shape, model.stride(), sharded.placements
    if here.ndim > model.ndim:
        shape, stride = torch.Size([len(here), *shape]), (model.numel(), *stride)
        placements = [Shard(each.dim + 1) for each in placements]
    found: Tensor = DTensor.from_local(
        here.contiguous(), sharded.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
    return found


def by_sharding(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of sharded tensors, and those of others: torch takes no list of both."""
    sharded = [place for place, tensor in enumerate(tensors) if is_sharded(tensor)]
    plain = [place for place, tensor in enumerate(tensors) if not is_sharded(tensor)]
    return [places for places in (sharded, plain) if places]


def gathered(content: Any, keep: bool) -> Any:
    """Nested state with every sharded tensor gathered on the CPU; every process has to call it.

    Args:
        content: Dicts, lists, tuples, tensors, and plain data.
        keep: Whether this process wants it; if not, it gets None for each sharded tensor.
    """
    if isinstance(content, Mapping):
        return {key: gathered(each, keep) for key, each in content.items()}
    if isinstance(content, list | tuple):
        return [gathered(each, keep) for each in content]
    if not isinstance(content, Tensor) or not is_sharded(content):
        return content
    full = full_tensor(content.detach())
    return full.cpu() if keep else None


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
    """Where a tensor's elements lie, from the first byte to the one after the last; None if it has none."""
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
    return bool(torch.isin(_byte_addresses(a), _byte_addresses(b)).any())


def _byte_addresses(tensor: Tensor) -> Tensor:
    """The address of every byte of a tensor's elements."""
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + torch.arange(length, device="cpu") * stride).flatten()
    size = tensor.element_size()
    return (_address(tensor)[0] + offsets[:, None] * size + torch.arange(size, device="cpu")).flatten()
