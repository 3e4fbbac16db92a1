"""Checkpoints: safetensors for tensors, JSON for the rest, each written whole or not at all."""

from mtl.checkpoint.convert import write_plain
from mtl.checkpoint.files import CheckpointError, DamagedCheckpoint, MomentsState, read_state
from mtl.checkpoint.folder import Checkpoints, SaveError
from mtl.checkpoint.load import load_checkpoint
from mtl.checkpoint.newest import load_newest, newest_first
from mtl.disk import write_json, write_text

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DamagedCheckpoint",
    "MomentsState",
    "SaveError",
    "load_checkpoint",
    "load_newest",
    "newest_first",
    "read_state",
    "write_json",
    "write_plain",
    "write_text",
]
