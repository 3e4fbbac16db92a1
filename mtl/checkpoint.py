"""Checkpoints: safetensors for tensors, JSON for the rest, each written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

_TENSORS, _MOMENTS, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"

# What optimizers remember: by class, by parameter, by key.
MomentsState = Mapping[str, Mapping[str, Mapping[str, Any]]]


class CheckpointError(ValueError):
    """A folder that is no checkpoint, or one of another model."""


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
    the place of an old one at once; every other metric that a phase goes back to the best weights of has a link as
    well. Folders that no link points to are removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, module: nn.Module, moments: MomentsState, state: Mapping[str, Any], names: list[str]) -> None:
        """Writes a checkpoint.

        Args:
            module: Whose tensors are kept, under their names, each once.
            moments: What optimizers remember of its parameters.
            state: Plain data beside them; `step` names the folder.
            names: The links that shall point to it: `last`, `best`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"step-{state['step']:08d}"
        temporary = self.folder / f".{target.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_model(module, str(temporary / _TENSORS))
        tensors, numbers = _split(moments)
        save_file(tensors, temporary / _MOMENTS)
        write_json(temporary / _STATE, {**state, "optimizer": numbers})
        _sync(temporary / _TENSORS)
        _sync(temporary / _MOMENTS)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for name in names:
            self._link(name, target.name)
        self._prune()

    def adopt(self, folder: Path, name: str) -> None:
        """Takes a copy of another run's checkpoint under a link's name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / folder.resolve().name
        if not target.exists():
            temporary = self.folder / f".{target.name}.tmp"
            shutil.copytree(folder, temporary)
            temporary.rename(target)
        self._link(name, target.name)

    def find(self, name: str) -> Path | None:
        """The checkpoint that a link points to; None if there is none yet."""
        return self.folder / name if (self.folder / name).exists() else None

    def _link(self, name: str, target: str) -> None:
        link = self.folder / f".{name}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        link.replace(self.folder / name)

    def _prune(self) -> None:
        kept = {str(link.readlink()) for link in self.folder.iterdir() if link.is_symlink()}
        # Half-written ones of a run that was killed go as well.
        for folder in [*self.folder.glob("step-*"), *self.folder.glob(".step-*.tmp")]:
            if folder.name not in kept:
                shutil.rmtree(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The plain data of a checkpoint.

    Raises:
        CheckpointError: The folder is no checkpoint.
    """
    missing = [name for name in (_TENSORS, _MOMENTS, _STATE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {missing[0]}")
    try:
        state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / _STATE} is damaged: {error}") from error
    return state


def load_checkpoint(folder: Path, module: nn.Module) -> tuple[dict[str, Any], MomentsState]:
    """Fills a module from a checkpoint, parameters and buffers, strictly.

    Returns:
        The plain data beside it, and what optimizers remembered.

    Raises:
        CheckpointError: The folder is no checkpoint, or its tensors do not fit the module.
    """
    state = read_state(folder)
    try:
        load_model(module, folder / _TENSORS)
        tensors = load_file(folder / _MOMENTS)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not fit this model: {_cut(' '.join(str(error).split()))}") from error
    return state, _join(tensors, state.pop("optimizer"))


def _cut(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."


def _split(moments: MomentsState) -> tuple[dict[str, Tensor], dict[str, dict[str, dict[str, Any]]]]:
    """The tensors under names of their own, and what is not a tensor."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, parameters in moments.items():
        for name, values in parameters.items():
            own = {key: value.contiguous() for key, value in values.items() if isinstance(value, Tensor)}
            tensors |= {f"{kind}/{name}/{key}": value for key, value in own.items()}
            numbers.setdefault(kind, {})[name] = {key: values[key] for key in values if key not in own}
    return tensors, numbers


def _join(tensors: Mapping[str, Tensor], numbers: dict[str, dict[str, dict[str, Any]]]) -> MomentsState:
    for place, tensor in tensors.items():
        kind, name, key = place.split("/")
        numbers[kind][name][key] = tensor
    return numbers


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
