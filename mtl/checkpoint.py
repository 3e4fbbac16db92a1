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

from mtl.audit.fingerprint import fingerprint, root
from mtl.disk import sync

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
    sync(file.parent)


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
        try:
            save_model(module, str(temporary / _TENSORS))
            tensors, rest = _split(moments)
            save_file(tensors, temporary / _MOMENTS)
            # Of the files as they lie there now, so that each proves that it is whole, and that they belong together.
            files = {"model": temporary / _TENSORS, "optimizer": temporary / _MOMENTS}
            digests = {part: _digest(_load_tensors(file)) for part, file in files.items()}
            write_json(temporary / _STATE, {**state, "optimizer": rest, "digests": digests})
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(temporary / _TENSORS)
        sync(temporary / _MOMENTS)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync(self.folder)
        for name in names:
            self._link(name, target.name)
        self._prune()

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of a step."""
        return (self.folder / f"step-{step:08d}").exists()

    def adopt(self, folder: Path, step: int, name: str) -> None:
        """Takes a copy of another run's checkpoint of a step under a link's name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"step-{step:08d}"
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
        inside = folder / "checkpoints" / "last"
        instead = f"; {inside} is one" if inside.exists() else ""
        raise CheckpointError(f"{folder} is no checkpoint: it has no {missing[0]}{instead}")
    try:
        state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / _STATE} is damaged: {error}") from error
    for key in ("optimizer", "digests"):
        if not isinstance(state, dict) or not isinstance(state.get(key), dict):
            raise CheckpointError(f"{folder / _STATE} is damaged, or of another version: it says nothing of {key!r}")
    return state


def load_checkpoint(folder: Path, module: nn.Module) -> tuple[dict[str, Any], MomentsState]:
    """Fills a module from a checkpoint, parameters and buffers, strictly.

    Returns:
        The plain data beside it, and what optimizers remembered.

    Raises:
        CheckpointError: The folder is no checkpoint, or its tensors do not fit the module.
    """
    state = read_state(folder)
    tensors = {}
    for part, file in (("model", _TENSORS), ("optimizer", _MOMENTS)):
        tensors[part] = _load_tensors(folder / file)
        if state["digests"].get(part) != _digest(tensors[part]):
            raise CheckpointError(f"{folder / file} is damaged, or of another step: it is not what was written")
    try:
        load_model(module, folder / _TENSORS)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not fit this model: {_cut(' '.join(str(error).split()))}") from error
    del state["digests"]
    try:
        return state, _join(tensors["optimizer"], state.pop("optimizer"))
    except (KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged: its optimizer's state is not whole: {error!r}") from error


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """One digest of all tensors of a file and their names."""
    return root({name: fingerprint(tensor) for name, tensor in tensors.items()})


def _load_tensors(file: Path) -> dict[str, Tensor]:
    """Raises `CheckpointError` if the file is truncated, or no such file."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _cut(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."


def _split(moments: MomentsState) -> tuple[dict[str, Tensor], dict[str, dict[str, dict[str, Any]]]]:
    """The tensors under names of their own, and the rest as plain data that points to them."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            tensors[place] = value.detach().contiguous()
            return {"tensor": place}
        if isinstance(value, list | tuple):
            return [plain(each, f"{place}/{number}") for number, each in enumerate(value)]
        if isinstance(value, dict):
            return {"dict": {key: plain(each, f"{place}/{key}") for key, each in value.items()}}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"an optimizer remembers a {type(value).__name__} in {place}; expected tensors and plain data")

    rest = {
        kind: {
            name: {key: plain(value, f"{kind}/{name}/{key}") for key, value in values.items()}
            for name, values in parameters.items()
        }
        for kind, parameters in moments.items()
    }
    return tensors, rest


def _join(tensors: Mapping[str, Tensor], rest: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> MomentsState:
    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return tensors[value["tensor"]]
        return float(value["float"]) if "float" in value else {key: whole(each) for key, each in value["dict"].items()}

    return {
        kind: {name: {key: whole(value) for key, value in values.items()} for name, values in parameters.items()}
        for kind, parameters in rest.items()
    }
