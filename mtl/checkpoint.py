"""Checkpoints: safetensors for tensors, JSON for the rest, each written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn

_TENSORS, _STATE = "model.safetensors", "state.json"


def write_text(file: Path, text: str) -> None:
    """Writes a file under another name, forces it to disk and renames it, so that no reader ever sees half of it."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n")


def without_nan(content: Any) -> Any:
    """Plain data with null for numbers that are not finite, which JSON does not have."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return content


class Checkpoints:
    """The checkpoints of a run.

    Each lies in a folder of its own, `step-<n>`; `last` and `best` are links to two of them, so that a new one takes
    the place of an old one at once. Folders that neither points to are removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, module: nn.Module, state: Mapping[str, Any], names: list[str]) -> None:
        """Writes a checkpoint.

        Args:
            module: Whose tensors are kept, under their names, each once.
            state: Plain data beside them; `step` names the folder.
            names: The links that shall point to it: `last`, `best`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"step-{state['step']:08d}"
        temporary = self.folder / f".{target.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_model(module, str(temporary / _TENSORS))
        write_json(temporary / _STATE, state)
        _sync(temporary / _TENSORS)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for name in names:
            link = self.folder / f".{name}.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)
            link.replace(self.folder / name)
        self._prune()

    def _prune(self) -> None:
        kept = {str(link.readlink()) for link in self.folder.iterdir() if link.is_symlink()}
        # Half-written ones of a run that was killed go as well.
        for folder in [*self.folder.glob("step-*"), *self.folder.glob(".step-*.tmp")]:
            if folder.name not in kept:
                shutil.rmtree(folder)


def load_checkpoint(folder: Path, module: nn.Module) -> dict[str, Any]:
    """Fills a module from a checkpoint, strictly, and returns the plain data beside it."""
    load_model(module, folder / _TENSORS)
    state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    return state


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
