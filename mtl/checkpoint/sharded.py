"""A checkpoint of a model that is sharded over processes (FSDP2): each writes its own shards, and none ever holds all.

torch.distributed.checkpoint writes them, as safetensors, and raises in all processes if one of them cannot write.
Afterwards one process can make the plain checkpoint of it that one process would have written.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mtl.checkpoint.files import (
    CheckpointError,
    DamagedCheckpoint,
    OptimizerState,
    callers_state,
    check_kept,
    complete_state,
    plain_content,
    read_state,
    write_state,
    write_tensors,
)
from mtl.checkpoint.load import sound_shards
from mtl.checkpoint.nested import apart, split
from mtl.checkpoint.run_files import FROZEN_FILE, MODEL_FILE, OPTIMIZER_FILE
from mtl.checkpoint.tensor_file import (
    FROZEN,
    MODEL,
    OPTIMIZER,
    SHARDS,
    Shards,
    TensorFileError,
    described,
    shards_digest,
)
from mtl.distributed.world import World
from mtl.runtime.files import sync
from mtl.runtime.tensors import is_sharded, local, shard_offsets


@dataclass(frozen=True)
class ShardedContent:
    """The part of a checkpoint that this process writes.

    Attributes:
        kinds: Sharded tensors by folder and name; in rank 0 also those that are not sharded.
        state: The JSON, complete, the same in every process.
    """

    kinds: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        return sum(local(tensor).nbytes for kind in self.kinds.values() for tensor in kind.values())


def collect_shards(
    module: nn.Module, frozen: Collection[str], optimizer_state: OptimizerState, state: Mapping[str, Any], world: World
) -> ShardedContent:
    """Collects what this process has to write of a sharded module and its optimizer state; all have to call it.

    Raises:
        TypeError: Something cannot be stored; names it.
    """
    everything = module.state_dict(keep_vars=True)
    check_kept(everything)
    first_of: dict[int, str] = {}
    firsts = {name: first_of.setdefault(id(tensor), name) for name, tensor in everything.items()}
    tied = {name: first for name, first in firsts.items() if name != first}
    tensors = {name: tensor.detach() for name, tensor in everything.items() if name not in tied}
    optimizer, rest = split(optimizer_state)
    frozen_names = tensors.keys() & set(frozen)
    kinds = {
        MODEL: {name: tensor for name, tensor in tensors.items() if name not in frozen_names},
        FROZEN: {name: tensor for name, tensor in tensors.items() if name in frozen_names},
        OPTIMIZER: optimizer,
    }
    shapes = {kind: {name: described(tensor) for name, tensor in each.items()} for kind, each in kinds.items()}
    mine = {kind: _of_this_process(each, world) for kind, each in kinds.items()}
    digests = {
        f"{kind}/{shard_file(world.rank)}": digest
        for kind, each in mine.items()
        if (digest := shards_digest((name, shard_offsets(tensor), local(tensor)) for name, tensor in each.items()))
    }
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, digests)
    own = {"optimizer": rest, "tied": tied, SHARDS: {kind: each for kind, each in shapes.items() if each}}
    return ShardedContent(mine, complete_state(state, own, {k: v for each in every for k, v in each.items()}))


def write_shards(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Writes a file for each process that has shards, and forces them to disk; all have to call it.

    Raises:
        OSError: A process could not write.
    """
    # Late: with what they import, they take most of a second.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        # Only rank 0 has tensors that are not sharded; and empty shards, which count for nothing, may look the same.
        save(dict(tensors), storage_writer=writer, planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"process {rank}: {reason}") from error
    if world.is_main:
        sync(folder)


def shard_file(rank: int) -> str:
    """The name that torch gives to the file of a rank."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def _of_this_process(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    sharded = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
    plain = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)} if world.is_main else {}
    return sharded | apart(plain)


def write_plain(checkpoint: Path, folder: Path) -> None:
    """Writes the plain checkpoint of a sharded one into a new folder; a run can resume from it, too.

    All tensors are in this process's memory at once. No other process is needed.

    Raises:
        CheckpointError: It is plain already, is none, or is damaged; nothing was written.
        FileExistsError: The folder is there.
        OSError: It cannot be written.
    """
    state = read_state(checkpoint)
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
    write_tensors(temporary / MODEL_FILE, content.model)
    write_tensors(temporary / OPTIMIZER_FILE, content.optimizer)
    if content.frozen:
        write_tensors(temporary / FROZEN_FILE, content.frozen)
    write_state(temporary, content.state)
    sync(temporary)
    temporary.rename(folder)
    sync(folder.parent)
