"""Modules and tensors that a module keeps where torch does not look: in containers, plain objects, class attributes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

# The keys from a module's attribute to what is kept there.
Way = tuple[str, ...]

# A module's own bookkeeping; what is in it is known, or no state.
_OF_TORCH = frozenset(nn.Module().__dict__)
# Objects of these packages are machinery (trainers, loggers, optimizers), through which everything can be reached.
_MACHINERY = frozenset(
    (
        *("builtins", "torch", "torchvision", "timm", "numpy", "PIL", "pandas", "logging", "threading", "io", "queue"),
        *("multiprocessing", "concurrent", "asyncio", "weakref", "pathlib", "re", "abc", "inspect", "typing", "ctypes"),
        *("lightning", "lightning_fabric", "pytorch_lightning", "transformers", "accelerate", "wandb", "deepspeed"),
        *("omegaconf", "pydantic", "unittest", "contextlib", "importlib", "_thread", "mtl"),
    )
)
_SEQUENCES = (list, tuple, deque)
_SETS = (set, frozenset)
_KEPT_BY_CLASSES = (Tensor, nn.Module, Mapping, *_SEQUENCES, *_SETS)
_NOT_STATE = (str, bytes, bytearray, int, float, complex, type, ModuleType, FunctionType, MethodType, type(None))
# No module keeps its state further down, or in more pieces, on purpose.
_DEEPEST, _MOST = 12, 20_000


def kept_in(module: nn.Module, seen: set[int]) -> Iterator[tuple[Way, nn.Module | Tensor]]:
    """Every module and tensor that a module keeps beside its parameters, buffers and submodules, with the way to it.

    Args:
        module: The module.
        seen: The identities of containers and objects that were searched already; it is added to.
    """
    waiting: deque[tuple[Way, object]] = deque(
        ((key,), value) for key, value in vars(module).items() if key not in _OF_TORCH
    )
    waiting.extend(((key,), value) for key, value in _class_attributes(type(module)))
    for _ in range(_MOST):
        if not waiting:
            return
        way, value = waiting.popleft()
        if isinstance(value, nn.Module | Tensor):
            yield way, value
        elif not isinstance(value, _NOT_STATE) and id(value) not in seen and len(way) <= _DEEPEST:
            seen.add(id(value))
            waiting.extend(((*way, key), inner) for key, inner in _parts(value))


def follow(module: nn.Module, way: Way) -> object:
    """What is at the end of a way by now; None if nothing is."""
    first, *rest = way
    found = vars(module)[first] if first in vars(module) else getattr(type(module), first, None)
    for key in rest:
        found = next((value for name, value in _parts(found) if name == key), None)
    return found


def _class_attributes(kind: type) -> Iterator[tuple[str, object]]:
    """What the classes of a module keep, those of torch left out; attributes of the nearest class go first."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module:
            return
        if base.__module__.partition(".")[0] in _MACHINERY:
            continue
        for key, value in vars(base).items():
            if not key.startswith("__") and key not in seen and isinstance(value, _KEPT_BY_CLASSES):
                seen.add(key)
                yield key, value


def _parts(value: Any) -> Iterator[tuple[str, object]]:
    """What a container or plain object has in it, by keys in words."""
    if isinstance(value, Mapping):
        yield from ((str(key), inner) for key, inner in value.items())
    elif isinstance(value, _SEQUENCES):
        yield from ((str(index), inner) for index, inner in enumerate(value))
    elif isinstance(value, _SETS):
        yield from ((str(index), inner) for index, inner in enumerate(sorted(value, key=id)))
    elif isinstance(value, partial):
        yield from (("args", value.args), ("keywords", value.keywords))
    elif not isinstance(value, _NOT_STATE) and type(value).__module__.partition(".")[0] not in _MACHINERY:
        yield from getattr(value, "__dict__", {}).items()
        slots = [key for base in type(value).__mro__ for key in _names(vars(base).get("__slots__", ()))]
        yield from ((key, getattr(value, key)) for key in slots if hasattr(value, key))


def _names(slots: str | Sequence[str]) -> Sequence[str]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
