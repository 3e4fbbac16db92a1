"""The files of one checkpoint: safetensors for tensors, JSON for the rest; nothing in them is ever run."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from mtl.checkpoint.nested import NATIVE, apart, split
from mtl.checkpoint.run_files import MODEL_FILE, OPTIMIZER_FILE, STATE, RunFileError, read_state_file
from mtl.checkpoint.tensor_file import SHARDS, shard_files, shards
from mtl.runtime.files import sync, without_nan, write_synced
from mtl.runtime.fingerprint import fingerprint, fingerprint_of_json, root
from mtl.runtime.tensors import local

VERSION = 2
# What is a checkpoint's own in its state.json; all other keys are the caller's.
_OWN = ("version", "optimizer", "tied", SHARDS, "digests")

# Optimizer state by class, by parameter, by key; and other nested state of a run, such as random numbers.
OptimizerState = Mapping[str, Mapping[str, Any]]


class CheckpointError(ValueError):
    """A folder that is no checkpoint, or one of another model."""


class HasState(Protocol):
    """A module, or whatever has its tensors by name."""

    def state_dict(self) -> dict[str, Any]: ...


class DamagedCheckpoint(CheckpointError):  # noqa: N818  named after the folder, not after the error
    """A folder that lacks files, or whose files are not those that were written."""


@dataclass(frozen=True)
class CheckpointContent:
    """All that a checkpoint holds.

    Attributes:
        model: The trainable tensors of the model by name, each once.
        frozen: The frozen ones.
        optimizer: The tensors of the optimizer state.
        state: The JSON, complete: the caller's, that of the optimizer state, other names of tied tensors, all digests.
    """

    model: dict[str, Tensor]
    frozen: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        parts = (self.model, self.frozen, self.optimizer)
        return sum(map(num_bytes_of, parts)) + len(json.dumps(self.state))

    def with_copies(self) -> CheckpointContent:
        """The same, with copies of the tensors that training continues to change; frozen tensors are not copied."""
        return replace(self, model=copies(self.model), optimizer=copies(self.optimizer))


def collect(
    module: HasState,
    frozen: Collection[str],
    optimizer_state: OptimizerState,
    state: Mapping[str, Any],
    known: Mapping[str, str] | None = None,
) -> CheckpointContent:
    """Collects all that a checkpoint holds from a module and its optimizer state; see `Checkpoints.save`.

    Raises:
        TypeError: Something cannot be stored; names it.
    """
    tensors = module.state_dict()
    check_kept(tensors)
    tied = other_names(tensors)
    optimizer, rest = split(optimizer_state)
    tensors = apart({name: tensor for name, tensor in tensors.items() if name not in tied})
    return plain_content(tensors, frozen, apart(optimizer), {"optimizer": rest, "tied": tied}, state, known)


def plain_content(
    tensors: Mapping[str, Tensor],
    frozen: Collection[str],
    optimizer: dict[str, Tensor],
    own: Mapping[str, Any],
    state: Mapping[str, Any],
    known: Mapping[str, str] | None = None,
) -> CheckpointContent:
    """The content of a plain checkpoint.

    Args:
        tensors: The model's, each once.
        frozen: Which of them are frozen; other names do not count.
        optimizer: The tensors of the optimizer state.
        own: The JSON of the optimizer state, and other names of tied tensors.
        state: The caller's.
        known: Fingerprints of frozen tensors, as far as they are known.
    """
    # The digests are taken before writing: what is read back has to match them.
    frozen_names = tensors.keys() & set(frozen)
    old = {name: digest for name, digest in (known or {}).items() if name in frozen_names}
    prints = {name: old.get(name) or fingerprint(tensor) for name, tensor in tensors.items()}
    digests = {"model": root(prints), "optimizer": fingerprint_of(optimizer)}
    if frozen_names:
        digests["frozen"] = root({name: prints[name] for name in frozen_names})
    return CheckpointContent(
        {name: tensor for name, tensor in tensors.items() if name not in frozen_names},
        {name: tensor for name, tensor in tensors.items() if name in frozen_names},
        optimizer,
        complete_state(state, own, digests),
    )


def complete_state(state: Mapping[str, Any], own: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """The content of a `state.json` as it will be read back: keys become text, tuples lists."""
    assert not set(_OWN) & state.keys(), f"{_OWN} are the checkpoint's own"
    everything = {**state, "version": VERSION, **own, "digests": digests}
    content: dict[str, Any] = json.loads(json.dumps(without_nan(everything), allow_nan=False))
    content["digests"]["state"] = state_digest(content)
    return content


def callers_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a `state.json` that the caller of `save` passed."""
    return {key: value for key, value in state.items() if key not in _OWN}


def check_kept(tensors: Mapping[str, Any]) -> None:
    """Raises `TypeError` if a module's state has something that a checkpoint cannot store."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, which a checkpoint cannot store; expected a tensor")
        if tensor.layout != torch.strided or tensor.dtype not in NATIVE | {torch.complex64}:
            raise TypeError(
                f"{name} is a tensor of {tensor.layout}, {tensor.dtype}, which a checkpoint cannot store; expected a"
                " dense one of a usual type"
            )


def other_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For every tied tensor, the first of its names."""
    first_of: dict[Any, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        here = local(tensor)
        place = (tensor.device, here.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = first_of.setdefault(place, name)
        if first != name and here.numel():
            tied[name] = first
    return tied


def num_bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, in the same layout."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


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


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes `state.json` into a folder that nobody reads yet, and forces it to disk."""
    # Not indented, for which Python has only a slow encoder.
    write_synced(folder / STATE, json.dumps(state, allow_nan=False).encode())


def read_state(folder: Path) -> dict[str, Any]:
    """The whole `state.json` of a checkpoint, with the keys that are the checkpoint's own.

    Raises:
        DamagedCheckpoint: The folder lacks files, or the JSON is not what was written.
        CheckpointError: It is of another version.
    """
    try:
        if not folder.exists():
            there = sorted(each.name for each in folder.parent.glob("step-*"))
            raise DamagedCheckpoint(f"there is no {folder}" + (f"; there are {', '.join(there)}" if there else ""))
        # A folder in the place of a file: each process wrote its own shards.
        is_plain = not (folder / shards.MODEL).is_dir()
        needed = (MODEL_FILE, OPTIMIZER_FILE, STATE) if is_plain else (STATE,)
        missing = [name for name in needed if not (folder / name).is_file()]
        inside = folder / "checkpoints" / "last"
        instead = f"; {inside} is one" if missing and inside.exists() else ""
    except OSError as error:
        raise DamagedCheckpoint(f"{folder} cannot be read: {error.strerror}") from error
    if missing:
        raise DamagedCheckpoint(f"{folder} is no checkpoint: it has no {missing[0]}{instead}")
    file = folder / STATE
    try:
        state = read_state_file(file)
    except RunFileError as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {error}") from error
    digests = state.get("digests", {})
    if "state" not in digests:
        raise DamagedCheckpoint(f"{file} is damaged, or of another version: it has no digest of itself")
    if digests["state"] != state_digest(state):
        raise DamagedCheckpoint(f"{file} is damaged, or of another version: it is not what was written")
    if state.get("version") != VERSION:
        raise CheckpointError(f"{file} is of version {state.get('version')}; this program reads version {VERSION}")
    if not is_plain and SHARDS not in state:
        raise DamagedCheckpoint(f"{file} is damaged: it does not describe the shards next to it")
    for name in [] if is_plain else shard_files(state):
        if not (folder / name).is_file():
            raise DamagedCheckpoint(f"{folder} is damaged: it has no {name}")
    return state
