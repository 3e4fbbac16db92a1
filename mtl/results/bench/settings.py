"""What `mtl bench` measures: trunks with heads, and the kinds of phases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl.config import RunConfig

# More than are ever timed, and enough that the phase decides to keep what it can.
_EPOCHS = 100
_VAL_BATCHES = 4
_DENSE = {
    "segmentation": {"type": "segmentation", "num_classes": 13},
    "depth": {"type": "depth"},
    "normals": {"type": "normals"},
    "object": {"type": "classification", "num_classes": 10},
}
_LINEAR = {side: {"type": "classification", "num_classes": 10} for side in ("left", "right")}


@dataclass(frozen=True)
class Setting:
    """A trunk with heads, at one size of images and batches.

    Attributes:
        num_steps: Steps in an epoch; where the trunk is frozen, at least 20, since such steps are short.
    """

    trunk: str
    image_size: int
    batch_size: int
    num_steps: int
    dense: bool
    memory_format: str = "contiguous"

    @property
    def name(self) -> str:
        heads = "dense heads" if self.dense else "linear heads"
        return f"{self.trunk}, {self.image_size} px, batch {self.batch_size}, {heads}"

    @property
    def phases(self) -> dict[str, list[str]]:
        """Patterns of what each kind of phase freezes."""
        head = "heads.depth" if self.dense else "heads.left"
        return {
            "trunk_frozen": ["trunk"],
            "half_frozen": ["trunk@first:50%"],
            "head_frozen": [head],
            "nothing_frozen": [],
        }

    def steps_of(self, phase: str) -> int:
        """Steps in an epoch of a kind of phase."""
        return max(20, self.num_steps) if phase == "trunk_frozen" else self.num_steps

    def config(self, folder: Path, phase: str) -> RunConfig:
        """A run of one phase, tracked by wandb offline; everything else is as a configuration has it by default."""
        phases = [{"name": phase, "freeze": self.phases[phase], "epochs": _EPOCHS}]
        data = {
            "name": "scenes" if self.dense else "multifashion",
            "image_size": self.image_size,
            "batch_size": self.batch_size,
            "num_train": self.steps_of(phase) * self.batch_size,
            "num_val": _VAL_BATCHES * self.batch_size,
        }
        content: dict[str, Any] = {
            "name": "bench",
            "runs_dir": str(folder),
            "tracking": {"mode": "offline"},
            "data": data,
            "trunk": {"name": self.trunk},
            "memory_format": self.memory_format,
            "tasks": _DENSE if self.dense else _LINEAR,
            "phases": phases,
        }
        return RunConfig.model_validate(content)


SETTINGS = [
    Setting("resnet18", 64, 64, 20, dense=False),
    Setting("tf_efficientnet_lite0", 64, 32, 20, dense=True, memory_format="channels_last"),
    Setting("vit_tiny_patch16_224", 224, 16, 4, dense=False),
]
