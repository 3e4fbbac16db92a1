"""Modules and tensors that are not registered: in containers, plain objects and class attributes of a module."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

# The keys from a module's attribute to a value inside it.
KeyPath = tuple[str, ...]

# A module's own bookkeeping: registered, or no state.
_OF_TORCH = frozenset(nn.Module().__dict__)
# Objects of these packages are machinery (trainers, loggers, optimizers) that refers to everything.
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
# No module keeps its state deeper, or in more pieces, on purpose.
_DEEPEST, _MOST = 12, 20_000


def unregistered_in(module: nn.Module, searched: set[int]) -> Iterator[tuple[KeyPath, nn.Module | Tensor]]:
    """Every module and tensor of a module besides its parameters, buffers and submodules, with its key path.

    Args:
        module: The module.
        searched: The identities of containers and objects that were searched already; updated in place.
    """
    waiting: deque[tuple[KeyPath, object]] = deque(
        ((key,), value) for key, value in vars(module).items() if key not in _OF_TORCH
    )
    waiting.extend(((key,), value) for key, value in _class_attributes(type(module)))
    for _ in range(_MOST):
        if not waiting:
            return
        key_path, value = waiting.popleft()
        if isinstance(value, nn.Module | Tensor):
            yield key_path, value
        elif not isinstance(value, _NOT_STATE) and id(value) not in searched and len(key_path) <= _DEEPEST:
            searched.add(id(value))
            waiting.extend(((*key_path, key), inner) for key, inner in _parts(value))


def value_at(module: nn.Module, key_path: KeyPath) -> object:
    """The present value at a key path; None if there is none."""
    first, *rest = key_path
    found = vars(module)[first] if first in vars(module) else getattr(type(module), first, None)
    for key in rest:
        found = next((value for name, value in _parts(found) if name == key), None)
    return found


def _class_attributes(kind: type) -> Iterator[tuple[str, object]]:
    """The class attributes of a module, without those of torch; the nearest class has priority."""
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
    """The values in a container or plain object, by keys as text."""
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
