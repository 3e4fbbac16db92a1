"""The files of one checkpoint: safetensors for tensors, JSON for the rest; nothing in them is ever run."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mtl.audit.fingerprint import fingerprint, fingerprint_of_json, root
from mtl.checkpoint.nested import NATIVE, apart, join, split
from mtl.disk import sync, without_nan
from mtl.storage import is_spread, local, spread_like
from mtl.tensor_file import TensorFileError, read_tensor_file

MODEL, FROZEN, OPTIMIZER, STATE = "model.safetensors", "frozen.safetensors", "optimizer.safetensors", "state.json"
VERSION = 2
# What is a checkpoint's own in its state.json; all other keys are the caller's.
_OWN = ("version", "optimizer", "tied", "digests")

# What optimizers remember: by class, by parameter, by key; and whatever else is kept beside them.
MomentsState = Mapping[str, Mapping[str, Any]]


class CheckpointError(ValueError):
    """A folder that is no checkpoint, or one of another model."""


class HasState(Protocol):
    """A module, or whatever has its tensors by name."""

    def state_dict(self) -> dict[str, Any]: ...


class DamagedCheckpoint(CheckpointError):  # noqa: N818  what it is, like the folder that it is said of
    """A folder that lacks files, or whose files are not those that were written."""


@dataclass(frozen=True)
class Content:
    """All that a checkpoint holds.

    Attributes:
        model: The tensors of the model that train, by name, each once.
        frozen: Those that are frozen.
        optimizer: The tensors beside the model.
        state: The JSON, complete: the caller's, the optimizers', other names of tied tensors, and all digests.
    """

    model: dict[str, Tensor]
    frozen: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        parts = (self.model, self.frozen, self.optimizer)
        return sum(tensor.nbytes for part in parts for tensor in part.values()) + len(json.dumps(self.state))


def collect(module: HasState, frozen: Collection[str], moments: MomentsState, state: Mapping[str, Any]) -> Content:
    """Reads off a module and what is beside it all that a checkpoint holds; see `Checkpoints.save`.

    Raises:
        TypeError: There is something that cannot be kept; names it.
    """
    assert not set(_OWN) & state.keys(), f"{_OWN} are the checkpoint's own"
    tensors, tied = _each_once(module.state_dict())
    # The digests are of what is to be written: what the disk makes of it has to agree.
    prints = {name: fingerprint(tensor) for name, tensor in tensors.items()}
    still = tensors.keys() & set(frozen)
    optimizer, rest = split(moments)
    optimizer = apart(optimizer)
    digests = {"model": root(prints), "optimizer": fingerprint_of(optimizer)}
    if still:
        digests["frozen"] = root({name: prints[name] for name in still})
    own = {"version": VERSION, "optimizer": rest, "tied": tied, "digests": digests}
    # As it will read back: keys become text, tuples lists.
    content = json.loads(json.dumps(without_nan({**state, **own}), allow_nan=False))
    content["digests"]["state"] = state_digest(content)
    return Content(
        {name: tensor for name, tensor in tensors.items() if name not in still},
        {name: tensor for name, tensor in tensors.items() if name in still},
        optimizer,
        content,
    )


def _each_once(tensors: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under the first of their names, and for every other name the first one."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, which a checkpoint cannot keep; expected a tensor")
        if tensor.layout != torch.strided or tensor.dtype not in NATIVE | {torch.complex64}:
            raise TypeError(
                f"{name} is a tensor of {tensor.layout}, {tensor.dtype}, which a checkpoint cannot keep; expected a"
                " dense one of a usual type"
            )
    tied = _other_names(tensors)
    return apart({name: tensor for name, tensor in tensors.items() if name not in tied}), tied


def _other_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For every tensor that was there before under another name, that name."""
    first_of: dict[Any, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        here = local(tensor)
        place = (tensor.device, here.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = first_of.setdefault(place, name)
        if first != name and here.numel():
            tied[name] = first
    return tied


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """One digest of named tensors."""
    return root({name: fingerprint(tensor) for name, tensor in tensors.items()})


def state_digest(content: Mapping[str, Any]) -> str:
    """The digest of all of a `state.json` but this digest itself."""
    digests = {part: digest for part, digest in content["digests"].items() if part != "state"}
    return fingerprint_of_json({**content, "digests": digests})


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a file and forces it to disk."""
    save_file(tensors, file)
    sync(file)


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON of a checkpoint, with what is the checkpoint's own in it.

    Raises:
        DamagedCheckpoint: The folder lacks files, or the JSON is not what was written.
        CheckpointError: It is of another version.
    """
    for name in (MODEL, OPTIMIZER, STATE):
        try:
            is_there = (folder / name).is_file()
        except OSError as error:
            raise DamagedCheckpoint(f"{folder} cannot be read: {error.strerror}") from error
        if not is_there:
            inside = folder / "checkpoints" / "last"
            instead = f"; {inside} is one" if inside.exists() else ""
            raise DamagedCheckpoint(f"{folder} is no checkpoint: it has no {name}{instead}")
    file = folder / STATE
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} is damaged: {error}") from error
    digests = state.get("digests") if isinstance(state, dict) else None
    if not isinstance(digests, dict) or "state" not in digests:
        raise DamagedCheckpoint(f"{file} is damaged, or of another version: it says nothing of its own digest")
    if digests["state"] != state_digest(state):
        raise DamagedCheckpoint(f"{file} is damaged, or of another version: it is not what was written")
    if state.get("version") != VERSION:
        raise CheckpointError(f"{file} is of version {state.get('version')}; this program reads version {VERSION}")
    return state


def load_checkpoint(folder: Path, module: nn.Module) -> tuple[dict[str, Any], MomentsState]:
    """Fills a module from a checkpoint, parameters and buffers, strictly; if it cannot, the module stays as it was.

    Returns:
        The plain data beside it, and what optimizers remembered.

    Raises:
        DamagedCheckpoint: The folder is no checkpoint, or not the one that was written.
        CheckpointError: Its tensors do not fit the module, or it is of another version.
    """
    state = read_state(folder)
    optimizer = _read(folder / OPTIMIZER)
    if fingerprint_of(optimizer) != state["digests"]["optimizer"]:
        raise _not_as_written(folder / OPTIMIZER)
    try:
        moments: MomentsState = join(optimizer, state["optimizer"])
    except ValueError as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {error}") from error
    tensors = _read_model(folder, state["digests"])
    tensors |= {name: tensors[first] for name, first in state["tied"].items()}
    _check_fit(folder, tensors, module.state_dict())
    fill(module, tensors)
    return {key: value for key, value in state.items() if key not in _OWN}, moments


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads a whole state that fits into a module, which may be spread over processes; nothing is sent."""
    own = module.state_dict()
    if not any(is_spread(tensor) for tensor in own.values()):
        module.load_state_dict(dict(tensors))
        return
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(spread_like(tensor, tensors[name]))


def _read_model(folder: Path, digests: Mapping[str, str]) -> dict[str, Tensor]:
    frozen: dict[str, Tensor] = {}
    if "frozen" in digests:
        if not (folder / FROZEN).is_file():
            raise DamagedCheckpoint(f"{folder} is damaged: it has no {FROZEN}")
        frozen = _read(folder / FROZEN)
        if fingerprint_of(frozen) != digests["frozen"]:
            raise _not_as_written(folder / FROZEN)
    tensors = frozen | _read(folder / MODEL)
    if fingerprint_of(tensors) != digests["model"]:
        raise _not_as_written(folder / MODEL)
    return tensors


def _read(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = read_tensor_file(file)
    except TensorFileError as error:
        raise DamagedCheckpoint(f"{file} is damaged: {error}") from error
    return tensors


def _not_as_written(file: Path) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{file} is damaged, or of another step: it is not what was written")


def _check_fit(folder: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` if names or shapes are not those of the module."""
    shapes = [
        f"{name} (expected {tuple(tensor.shape)}, got {tuple(found[name].shape)})"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    two = [
        f"{first} and {name}"
        for name, first in _other_names(expected).items()
        if {name, first} <= found.keys() and fingerprint(found[name]) != fingerprint(found[first])
    ]
    problems = [
        f"{what} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for what, names in (
            ("it lacks", [name for name in expected if name not in found]),
            ("it has, and the model has not,", sorted(found.keys() - expected.keys())),
            ("of another shape are", shapes),
            ("one tensor in the model, and two in it, are", two),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{folder} does not fit this model: {'; '.join(problems)}")
