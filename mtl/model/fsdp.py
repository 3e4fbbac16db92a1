"""One model spread over processes (FSDP2): each holds a part of every tensor, and fetches the rest block by block.

Statistics of norm layers are not spread; `World.average_buffers` is for them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from mtl.distributed.world import World, WorldError
from mtl.model import MultiTaskModel
from mtl.runtime.tensors import full_tensor

# What our model calls of a timm trunk instead of its forward.
_METHODS = ("forward_features", "forward_intermediates", "forward_head")


def shard(model: MultiTaskModel, world: World) -> None:
    """Spreads a model over the processes, in place; names stay, parameters are others. Optimizers are made after it.

    Call it once a run: later phases may freeze and thaw at will. What is frozen is spread too, but has no gradient.

    Args:
        model: On the process's device, with the same weights in every process.
        world: The processes, which have met.

    Raises:
        WorldError: A parameter is not contiguous in memory, as in the layout channels_last.
    """
    if world.is_alone:
        return
    for name, parameter in model.named_parameters():
        if not parameter.is_contiguous():
            raise WorldError(f"{name}: FSDP takes contiguous tensors only; use the contiguous memory layout")
    mesh = init_device_mesh(next(model.parameters()).device.type, (world.size,))
    for part in [*blocks(model.trunk), model.trunk, *model.heads.values()]:
        # The whole as well, since a forward without backward would leave its parameters gathered.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for method in _METHODS:
        register_fsdp_forward_method(model.trunk, method)
    # What the trunk returns may be views of its activations; our heads, which read them, write to none of them.
    name = re.escape(type(model.trunk).__name__)
    warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({name}\) returned a view", UserWarning)


def blocks(trunk: nn.Module) -> Iterator[nn.Module]:
    """The outermost parts that are run one after the other: members of a Sequential or ModuleList, with parameters."""
    for child in trunk.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            for member in child:
                nested = list(blocks(member)) if isinstance(member, nn.Sequential | nn.ModuleList) else []
                yield from nested or ([member] if any(True for _ in member.parameters()) else [])
        else:
            yield from blocks(child)


def spread(model: MultiTaskModel, groups: Iterable[list[dict[str, Any]]], world: World) -> None:
    """As `shard`, and puts the new parameters in the place of the old ones in what optimizers are going to be given.

    Args:
        model: As for `shard`.
        groups: The groups of each phase, which are written to: what still held an old parameter would keep it whole.
        world: The processes.

    Raises:
        WorldError: As `shard`.
    """
    if world.is_alone:
        return
    before = dict(model.named_parameters())
    shard(model, world)
    now = dict(model.named_parameters())
    new_of: dict[Tensor, nn.Parameter] = {parameter: now[name] for name, parameter in before.items()}
    for group in [group for phase in groups for group in phase]:
        group["params"] = [new_of.get(parameter, parameter) for parameter in group["params"]]


class Gathered:
    """The tensors of a model that is spread, whole, as a module would give them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def state_dict(self) -> dict[str, Tensor]:
        return self._tensors


def gather(model: nn.Module, world: World) -> Gathered:
    """The whole model as plain tensors on the CPU of rank 0; empty elsewhere. Every process has to call it.

    A tensor of two names is one in it, too.
    """
    full: dict[str, Tensor] = {}
    first_of: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = first_of.setdefault(id(tensor), name)
        gathered = full_tensor(tensor.detach()) if first == name else None
        if world.is_main:
            full[name] = full[first] if gathered is None else gathered.cpu().clone()
    return Gathered(full)
