"""From a checkpoint in shards to the plain one that one process would have written."""

from __future__ import annotations

import shutil
from pathlib import Path

from mtl.checkpoint import files
from mtl.checkpoint.files import CheckpointError, DamagedCheckpoint, callers_state, plain_content, write_tensors
from mtl.checkpoint.load import sound_shards
from mtl.checkpoint.tensor_file import FROZEN, MODEL, OPTIMIZER, SHARDS, Shards, TensorFileError
from mtl.runtime.files import sync, write_json


def write_plain(checkpoint: Path, folder: Path) -> None:
    """Writes a checkpoint in shards, whole and plain, into a new folder; it can be gone on from, too.

    Everything is in this process's memory once. No other process is needed.

    Raises:
        CheckpointError: It is plain already, is none, or is damaged; nothing was written.
        FileExistsError: The folder is there.
        OSError: It cannot be written.
    """
    state = files.read_state(checkpoint)
    if SHARDS not in state:
        raise CheckpointError(f"{checkpoint} is plain already; copy it: cp -rL {checkpoint} {folder}")
    if folder.exists():
        raise FileExistsError(f"{folder} is there; expected a new folder")
    sound_shards(checkpoint, state)
    try:
        model, frozen, optimizer = (dict(Shards(checkpoint, state, [kind])) for kind in (MODEL, FROZEN, OPTIMIZER))
    except TensorFileError as error:
        raise DamagedCheckpoint(f"{checkpoint} is damaged: {error}") from error
    own = {key: state[key] for key in ("optimizer", "tied")}
    content = plain_content(model | frozen, frozen.keys(), optimizer, own, callers_state(state))
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_tensors(temporary / files.MODEL, content.model)
    write_tensors(temporary / files.OPTIMIZER, content.optimizer)
    if content.frozen:
        write_tensors(temporary / files.FROZEN, content.frozen)
    write_json(temporary / files.STATE, content.state)
    sync(temporary)
    temporary.rename(folder)
    sync(folder.parent)
