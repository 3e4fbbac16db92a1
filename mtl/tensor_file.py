"""Reads a file of tensors, whoever wrote it; nothing in it is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mtl.console import first_line


class TensorFileError(ValueError):
    """A file that cannot be read as tensors; says why."""


def read_tensor_file(file: Path) -> Any:
    """What a `.safetensors` file, or one of `torch.save`, holds: mostly tensors by name, perhaps inside other things.

    Raises:
        TensorFileError: It is damaged, is no such file, or holds code.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise a dozen unrelated types for a file that is not theirs
        # torch advises to load such a file with the code in it; that advice is not passed on.
        is_pickle = "Weights only" in str(error)
        reason = "it holds more than tensors and plain data; code in it is not run" if is_pickle else first_line(error)
        raise TensorFileError(reason) from error
