"""Nested state, as optimizers keep it, taken apart into tensors and JSON, and put together again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtl.runtime.tensors import byte_view, full_tensor

# What every version of safetensors knows; tensors of other types are kept as bytes.
NATIVE = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    }
)


def split(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Takes nested state apart.

    Args:
        content: Dicts with keys that are text or integers, lists, tuples (they come back as lists), tensors, and plain
            data; numbers need not be finite.

    Returns:
        The tensors under names made of their places (`adamw/trunk.bias/exp_avg`), and the rest as JSON, which points to
        them. Sharded tensors stay sharded, but for unusual types, of which all processes get the full tensor.

    Raises:
        TypeError: There is something else in it; names its place.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _plain(content, "", tensors)


def merge(tensors: Mapping[str, Tensor], rest: Any) -> Any:
    """Puts together what `split` took apart.

    Raises:
        ValueError: They do not belong together.
    """
    try:
        return _whole(rest, tensors)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the optimizer state is incomplete: {error!r}") from error


def dense(tensor: Tensor) -> Tensor:
    """A tensor's elements on the CPU, one after the other; copied only if they are not."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with copies of those that share memory with one before, as safetensors asks for."""
    used: set[int] = set()
    kept = {}
    for name, tensor in tensors.items():
        plain = dense(tensor)
        address = plain.untyped_storage().data_ptr()
        kept[name] = plain.clone() if address in used else plain
        used.add(address)
    return kept


def _plain(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return _put(value, place, tensors)
    if isinstance(value, list | tuple):
        return [_plain(each, _below(place, number), tensors) for number, each in enumerate(value)]
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str | int) or isinstance(key, bool)]:
            raise TypeError(f"optimizer state at {place}: expected keys that are text or integers, got {odd[0]!r}")
        inner = {key: _plain(each, _below(place, key), tensors) for key, each in value.items()}
        # JSON would make text of keys that are integers.
        is_text = all(isinstance(key, str) for key in inner)
        return {"dict": inner} if is_text else {"items": [[key, each] for key, each in inner.items()]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"optimizer state at {place}: expected tensors and plain data, got a {type(value).__name__}")


def _below(place: str, key: object) -> str:
    return f"{place}/{key}" if place else str(key)


def _put(tensor: Tensor, place: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"optimizer state at {place}: expected a dense tensor, got a sparse or quantized one")
    # Half a pair of surrogates is text in Python, and no name in a file.
    name = place.encode("utf-8", "replace").decode("utf-8")
    while name in tensors or name == "__metadata__":
        name += "'"
    if tensor.dtype in NATIVE:
        tensors[name] = tensor
        return {"tensor": name}
    tensors[name] = byte_view(dense(full_tensor(tensor)))
    return {"tensor": name, "type": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _whole(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_whole(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        return tensor.view(_dtype(value["type"])).reshape(value["shape"]) if "type" in value else tensor
    if "float" in value:
        return float(value["float"])
    pairs = value["items"] if "items" in value else value["dict"].items()
    return {key: _whole(each, tensors) for key, each in pairs}


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"torch.{name} is no type of tensors")
    return found
