"""The checkpoints in a folder by their age, and the way back to an older one if one is damaged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from mtl.checkpoint.files import CheckpointError, DamagedCheckpoint, MomentsState
from mtl.checkpoint.load import load_checkpoint

_STEP = re.compile(r"step-(\d{8,})")
# A checkpoint that makes place for another of the same step.
ASIDE = ".old"


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints in a folder, the newest first; one that a killed process left moved aside stands for its step."""
    found = {}
    for path in [*folder.glob(f".step-*{ASIDE}"), *folder.glob("step-*")]:
        if _STEP.fullmatch(path.name.strip(".").removesuffix(ASIDE)) and path.is_dir() and not path.is_symlink():
            found[step_of(path)] = path
    return [found[step] for step in sorted(found, reverse=True)]


def load_newest(folder: Path, module: nn.Module) -> tuple[Path, dict[str, Any], MomentsState, list[str]]:
    """Fills a module from the newest checkpoint that is sound.

    Args:
        folder: The run's `checkpoints`.
        module: Is filled strictly; it stays as it was if none is sound.

    Returns:
        The checkpoint, its plain data, what optimizers remembered, and one sentence for each newer one that is damaged.

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


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(re.sub(r"\D", "", folder.name))
