"""timm, imported without its data pipeline, torchvision and what they import in turn: torch's compiler, wandb.

They take most of the seconds of `import timm`, and no model needs them. Whoever asks for them later gets them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch._compile import _disable_dynamo

from mtl.runtime.deferred import deferred, nothing


def _of_data(name: str) -> Any:
    """Timm's models take their mean and std from the data pipeline, which has them from this module."""
    return getattr(import_module("timm.data.constants"), name)


def _of_compiler(name: str) -> Any:
    """Timm exempts a method from compilation; torch has a decorator that asks the compiler at the first call."""
    if name != "disable":
        raise AttributeError(name)
    return lambda method, recursive=True, **_: _disable_dynamo(method, recursive)


with deferred(
    {
        "timm.data": _of_data,
        "torch._dynamo": _of_compiler,
        "torchvision": nothing,
        "torchvision.models": nothing,
        "torchvision.ops": nothing,
    },
    whole=["torch._dynamo"],
):
    import timm

__all__ = ["timm"]
