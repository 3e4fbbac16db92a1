"""From the files of a checkpoint, plain or in shards, to a module: damage is found before anything is changed.

If the newest checkpoint of a folder is damaged, the one before it is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl.checkpoint.files import (
    CheckpointError,
    DamagedCheckpoint,
    OptimizerState,
    callers_state,
    fingerprint_of,
    other_names,
    read_state,
)
from mtl.checkpoint.nested import merge
from mtl.checkpoint.run_files import FROZEN_FILE, MODEL_FILE, OPTIMIZER_FILE
from mtl.checkpoint.tensor_file import SHARDS, Shards, TensorFileError, damaged_shards, read_tensor_file, shards
from mtl.runtime.fingerprint import fingerprint
from mtl.runtime.tensors import is_sharded, shard_like

_STEP = re.compile(r"step-(\d{8,})")
# A checkpoint that is being replaced by another one of the same step.
ASIDE = ".old"


class OnDemand(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_checkpoint(folder: Path, module: nn.Module) -> tuple[dict[str, Any], OptimizerState]:
    """Fills a module from a checkpoint, parameters and buffers, strictly; if it cannot, the module stays as it was.

    Of a sharded module, each process keeps its shard of every tensor, of optimizer state too; nothing is sent.
    Shards of a checkpoint are joined tensor by tensor.

    Returns:
        Its plain data, and the optimizer state.

    Raises:
        DamagedCheckpoint: The folder is no checkpoint, or not the one that was written.
        CheckpointError: Its tensors do not fit the module, or it is of another version.
    """
    state = read_state(folder)
    tensors, optimizer = (
        _read_shards(folder, state) if SHARDS in state else (_read_model(folder, state), _read_optimizer(folder, state))
    )
    own, tied = module.state_dict(), state["tied"]
    sharded = {name: tensor for name, tensor in own.items() if is_sharded(tensor)}

    def placed(place: str) -> Tensor:
        tensor = optimizer[place]
        # Places are made of names: `moments/<kind>/<parameter>/exp_avg`.
        owner = next((sharded[name] for name in place.split("/") if name in sharded), tensor)
        return shard_like(owner, tensor)

    try:
        optimizer_state: OptimizerState = merge(OnDemand(optimizer, placed), state["optimizer"])
    except ValueError as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {error}") from error
    found = _with_tied(tensors, tied)
    _check_fit(folder, found, _shapes(tensors, tied), own)
    _fill(module, own, found)
    return callers_state(state), optimizer_state


def read_weights(folder: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Parameters and buffers of a checkpoint by name, and its plain data; its optimizer state is not read.

    Raises:
        DamagedCheckpoint: The folder is no checkpoint, or not the one that was written.
        CheckpointError: It is of another version.
    """
    state = read_state(folder)
    tensors = _read_shards(folder, state)[0] if SHARDS in state else _read_model(folder, state)
    return callers_state(state), _with_tied(tensors, state["tied"])


def _with_tied(tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> OnDemand:
    return OnDemand([*tensors, *tied], lambda name: tensors[tied.get(name, name)])


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints in a folder, the newest first; one that a killed process left moved aside counts."""
    found = {}
    for path in [*folder.glob(f".step-*{ASIDE}"), *folder.glob("step-*")]:
        if _STEP.fullmatch(path.name.strip(".").removesuffix(ASIDE)) and path.is_dir() and not path.is_symlink():
            found[step_of(path)] = path
    return [found[step] for step in sorted(found, reverse=True)]


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(re.sub(r"\D", "", folder.name))


def load_newest(folder: Path, module: nn.Module) -> tuple[Path, dict[str, Any], OptimizerState, list[str]]:
    """Fills a module from the newest checkpoint that is sound.

    Args:
        folder: The run's `checkpoints`.
        module: Is filled strictly; it stays as it was if none is sound.

    Returns:
        The checkpoint, its plain data, the optimizer state, and one sentence for each newer one that is damaged.

    Raises:
        CheckpointError: None is sound, or the newest sound one does not fit the module.
    """
    refused: list[str] = []
    for path in newest_first(folder):
        try:
            return path, *load_checkpoint(path, module), refused
        except DamagedCheckpoint as error:
            refused.append(str(error))
    if refused:
        raise CheckpointError(f"{folder} has no checkpoint that is sound: {'; '.join(refused)}")
    raise CheckpointError(f"{folder} has no checkpoints")


def sound_shards(folder: Path, state: Mapping[str, Any]) -> None:
    """Raises `DamagedCheckpoint` if a shard is not as it was written."""
    if wrong := damaged_shards(folder, state):
        raise DamagedCheckpoint(f"{folder} is damaged, or of another step: {wrong[0]}")


def _read_shards(folder: Path, state: Mapping[str, Any]) -> tuple[Shards, Shards]:
    # With the digests right, the files hold all shards of every tensor that `state.json` describes.
    sound_shards(folder, state)
    try:
        return Shards(folder, state, [shards.MODEL, shards.FROZEN]), Shards(folder, state, [shards.OPTIMIZER])
    except TensorFileError as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {error}") from error


def _read_optimizer(folder: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    optimizer = _read(folder / OPTIMIZER_FILE)
    if fingerprint_of(optimizer) != state["digests"]["optimizer"]:
        raise _not_as_written(folder / OPTIMIZER_FILE)
    return optimizer


def _read_model(folder: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    frozen: dict[str, Tensor] = {}
    if "frozen" in state["digests"]:
        if not (folder / FROZEN_FILE).is_file():
            raise DamagedCheckpoint(f"{folder} is damaged: it has no {FROZEN_FILE}")
        frozen = _read(folder / FROZEN_FILE)
        if fingerprint_of(frozen) != state["digests"]["frozen"]:
            raise _not_as_written(folder / FROZEN_FILE)
    tensors = frozen | _read(folder / MODEL_FILE)
    if fingerprint_of(tensors) != state["digests"]["model"]:
        raise _not_as_written(folder / MODEL_FILE)
    return tensors


def _read(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = read_tensor_file(file)
    except TensorFileError as error:
        raise DamagedCheckpoint(f"{file} is damaged: {error}") from error
    return tensors


def _not_as_written(file: Path) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{file} is damaged, or of another step: it is not what was written")


def _shapes(tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, torch.Size]:
    shapes = tensors.shapes if isinstance(tensors, Shards) else {name: tensor.shape for name, tensor in tensors.items()}
    return shapes | {name: shapes[first] for name, first in tied.items()}


def _fill(module: nn.Module, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    if not any(is_sharded(tensor) for tensor in own.values()):
        module.load_state_dict(dict(found))
        return
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(shard_like(tensor, found[name]))


def _check_fit(
    folder: Path, found: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], expected: Mapping[str, Tensor]
) -> None:
    """Raises `CheckpointError` if names or shapes are not those of the module."""
    others = [
        f"{name} (expected {tuple(tensor.shape)}, got {tuple(shapes[name])})"
        for name, tensor in expected.items()
        if name in shapes and shapes[name] != tensor.shape
    ]
    two = [
        f"{first} and {name}"
        for name, first in other_names(expected).items()
        if {name, first} <= shapes.keys() and fingerprint(found[name]) != fingerprint(found[first])
    ]
    problems = [
        f"{what} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for what, names in (
            ("it lacks", [name for name in expected if name not in shapes]),
            ("it has, and the model has not,", sorted(shapes.keys() - expected.keys())),
            ("of another shape are", others),
            ("one tensor in the model, and two in it, are", two),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{folder} does not fit this model: {'; '.join(problems)}")
