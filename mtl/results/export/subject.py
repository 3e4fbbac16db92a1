"""The input of every export format: the trained model, the chosen tasks, and the files' metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from mtl.model import MultiTaskModel
from mtl.results.export.images import ParityImages
from mtl.results.export.parity import LIMIT, Check, reference_outputs
from mtl.results.export.parts import Input
from mtl.results.export.trace import Sizes
from mtl.results.trained import TrainedModel
from mtl.runtime.version import __version__

Format = Literal["timm", "safetensors", "torch", "onnx"]


@dataclass(frozen=True)
class Subject:
    """A trained model on its way into files.

    Attributes:
        model: The model.
        names: The name of each task's output.
        input: The form of the exported input.
        images: What the files are tried on, of the size that they are made for.
    """

    model: TrainedModel
    names: dict[str, str]
    input: Input
    images: ParityImages

    @property
    def network(self) -> MultiTaskModel:
        return self.model.network

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.network.image_size

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks whose heads are exported."""
        return tuple(self.names)

    def reference(self, images: Tensor) -> dict[str, Tensor]:
        """The model's own outputs for images "b c h w", uint8."""
        return reference_outputs(self.network, images, self.tasks)

    def about(self) -> dict[str, Any]:
        """The metadata of the files, as JSON."""
        origin = self.model.origin
        return {
            "mtl_version": __version__,
            "run": self.model.config.name,
            "checkpoint": origin.checkpoint,
            "step": origin.step,
            "fingerprint": origin.fingerprint,
            "tasks": list(self.tasks),
            "outputs": self.names,
            "class_names": {task: list(self.model.tasks[task].class_names) for task in self.tasks},
        }

    def metadata(self) -> dict[str, str]:
        """The same where a format takes text alone: what is no text, as JSON."""
        return {key: each if isinstance(each, str) else json.dumps(each) for key, each in self.about().items()}


@dataclass(frozen=True)
class ExportedForm:
    """The files of a format.

    Attributes:
        checks: The comparisons with the model.
        sizes: The image sizes that the files take; None where the files hold weights alone.
        opset: Of ONNX.
        inputs: By task, the features that its own file reads; empty if it is one file.
        call: Of `timm`, the call that loads the file.
    """

    checks: list[Check]
    sizes: Sizes | None = None
    opset: int | None = None
    inputs: dict[str, list[str]] = field(default_factory=dict)
    call: str = ""

    @property
    def limit(self) -> float:
        """The largest difference that is exported: weights alone are the same, not nearly."""
        return 0.0 if self.sizes is None else LIMIT
