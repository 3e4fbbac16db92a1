"""What TorchJD's weightings remember from call to call, as checkpoints have it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtl.optim.balance.subset import plain_attributes


def options_of(kind: Callable[..., Any]) -> dict[str, Any]:
    """What a class is constructed from, or a function called with, and defaults; `Parameter.empty` if there is none."""
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}


def with_tensors(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with tensors for the lists that a configuration writes: on the CPU, even if the model is on meta."""
    return {
        name: torch.tensor(value, dtype=torch.float32, device="cpu") if isinstance(value, list) else value
        for name, value in options.items()
    }


def state_of(weighting: nn.Module) -> dict[str, Any]:
    """A copy of a weighting's state, without its options."""
    options = options_of(type(weighting))
    own = {n: value for n, value in plain_attributes(weighting).items() if n.lstrip("_") not in options}
    return {name: _to_plain(value) for name, value in {**own, **weighting._buffers}.items()}


def restore_state(weighting: nn.Module, state: Mapping[str, Any]) -> None:
    """Restores what `state_of` gave."""
    for name, value in state.items():
        setattr(weighting, name, _from_plain(value))


def _to_plain(value: Any) -> Any:
    """Tensors and JSON values; tuples, dtypes and devices keep their type, or a method would reset its state."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return {"tuple": [_to_plain(each) for each in value]}
    if isinstance(value, torch.device):
        # Weightings run on the CPU.
        return {"device": "cpu"}
    return {"type": str(value).removeprefix("torch.")} if isinstance(value, torch.dtype) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if not isinstance(value, Mapping):
        return value
    if "device" in value:
        return torch.device(value["device"])
    return tuple(map(_from_plain, value["tuple"])) if "tuple" in value else getattr(torch, value["type"])
