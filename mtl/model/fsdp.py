"""One model sharded over ranks (FSDP2): each holds a shard of every parameter, and gathers the rest block by block.

Statistics of norm layers are not sharded; `World.average_buffers` averages them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from mtl.distributed.world import World, WorldError
from mtl.model import MultiTaskModel
from mtl.runtime.tensors import full_tensor

# The methods of a timm trunk that our model calls instead of `forward`.
_METHODS = ("forward_features", "forward_intermediates", "forward_head")


def shard(model: MultiTaskModel, world: World) -> None:
    """Shards a model over the ranks, in place: names stay, parameters are new objects. Build optimizers after it.

    Call it once a run; later phases may freeze and thaw. Frozen parameters are sharded too.

    Args:
        model: On the rank's device, with the same weights on every rank.
        world: The ranks, with their process group.

    Raises:
        WorldError: A parameter is not contiguous in memory, as in the layout channels_last.
    """
    if world.is_alone:
        return
    for name, parameter in model.named_parameters():
        if not parameter.is_contiguous():
            raise WorldError(f"{name}: FSDP takes contiguous tensors only; set memory_format to contiguous")
    # Late: with what they import, they take a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(model.parameters()).device.type, (world.size,))
    for part in [*blocks(model.trunk), model.trunk, *model.heads.values()]:
        # The trunk itself as well, since a forward without backward would leave its parameters gathered.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for method in _METHODS:
        register_fsdp_forward_method(model.trunk, method)
    # The trunk may return views of its activations; our heads only read them.
    name = re.escape(type(model.trunk).__name__)
    warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({name}\) returned a view", UserWarning)


def blocks(trunk: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of Sequentials and ModuleLists that have parameters, which run one after the other."""
    for child in trunk.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            for member in child:
                nested = list(blocks(member)) if isinstance(member, nn.Sequential | nn.ModuleList) else []
                yield from nested or ([member] if any(True for _ in member.parameters()) else [])
        else:
            yield from blocks(child)


def shard_with_groups(model: MultiTaskModel, groups: Iterable[list[dict[str, Any]]], world: World) -> None:
    """Shards a model as `shard` does, and replaces the old parameters in the optimizers' groups by the new ones.

    Args:
        model: As for `shard`.
        groups: The groups of each phase; written to, since an old parameter in them would keep its full tensor alive.
        world: The ranks.

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


class FullModel:
    """The full tensors of a sharded model, with the `state_dict` of a module."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def state_dict(self) -> dict[str, Tensor]:
        return self._tensors


def gather_model(model: nn.Module, world: World) -> FullModel:
    """The full model as plain tensors on the CPU of rank 0; empty on other ranks. Collective: every rank calls it.

    A tensor with two names stays one tensor.
    """
    full: dict[str, Tensor] = {}
    first_of: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = first_of.setdefault(id(tensor), name)
        gathered = full_tensor(tensor.detach()) if first == name else None
        if world.is_main:
            full[name] = full[first] if gathered is None else gathered.cpu().clone()
    return FullModel(full)
