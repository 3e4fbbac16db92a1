"""Tensors out of anyone's checkpoint files; nothing in a file is ever run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mtl.tensor_file import TensorFileError, read_tensor_file

# What wrappers put before names (DataParallel and the like), or anywhere in them (torch.compile, FSDP, checkpointing).
_WRAPPERS = re.compile(r"^(?:module\.)+|(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Under these keys, training scripts put the weights beside other things.
_WEIGHTS = ("state_dict", "model", "model_state_dict", "module")


class UnreadableError(ValueError):
    """A file that holds no tensors, or not all that it should hold."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the prefixes of wrappers.

    Args:
        path: A `.safetensors` file; a file of `torch.save`, read with `weights_only`; or a folder with one
            `model.safetensors`, as a run of `mtl` writes it.

    Raises:
        UnreadableError: There is no such file, it is damaged, holds code, or holds no tensors by name; or two of its
            names are one without the prefixes.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        there = " (a folder without model.safetensors)" if path.is_dir() else ""
        raise UnreadableError(f"{path}: no such checkpoint{there}")
    try:
        content = read_tensor_file(file)
    except TensorFileError as error:
        raise UnreadableError(f"{file}: cannot be read: {error}") from error
    tensors: dict[str, Tensor] = {}
    for name, tensor in _named(content):
        plain = _WRAPPERS.sub("", _WRAPPERS.sub("", name))
        if plain in tensors:
            raise UnreadableError(f"{file}: two tensors are named {plain} without the prefixes of wrappers")
        tensors[plain] = tensor
    if not tensors:
        raise UnreadableError(f"{file}: holds no tensors by name")
    return tensors


def _named(content: Any) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(content, Mapping):
        return
    inner = next((content[key] for key in _WEIGHTS if isinstance(content.get(key), Mapping)), None)
    for name, value in (content if inner is None else inner).items():
        if isinstance(value, Tensor):
            yield str(name), value
