"""The frozen teachers of `distill` tasks: trunks of their own, whose pooled embedding of each image is learned."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mtl.checkpoint.files import CheckpointError
from mtl.checkpoint.tensor_file import UnreadableError, read_contents
from mtl.checkpoint.trained_run import open_trained_run
from mtl.config import DistillConfig, RunConfig, SettingError, TeacherConfig, TrunkConfig
from mtl.model.build import build_trunk, features_of, input_channels
from mtl.model.network import Normalize, statistics_of
from mtl.model.timm_models import timm
from mtl.model.trunk import read_features
from mtl.model.weights import load_into
from mtl.runtime.fingerprint import fingerprint, root
from mtl.runtime.text import count

# The module around them in the root of a run, and so the pattern of all their tensors.
TEACHERS = "teachers"


class Teacher(nn.Module):
    """A trunk that never trains: it is made without gradients and in eval mode, and the freeze keeps it so.

    Attributes:
        trunk: The timm module; its parameters are named `teachers.<task>.trunk.<timm's name>` in a run.
        normalize: Its own input normalisation.
        size: Height and width of the images that it takes, in pixels; None if it takes any.
        width: Numbers in an embedding.
    """

    def __init__(self, trunk: nn.Module, channels: int, size: tuple[int, int] | None, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        trained_on: Any = trunk.pretrained_cfg
        self.normalize = Normalize(*statistics_of(trained_on, channels), persistent=True)
        self.size = size
        self.width = width
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """The embeddings of images, in float32 whatever the precision of the run: they are labels.

        Args:
            images: "b h w c", uint8 or float32 from 0 to 255, as the run's own trunk gets them; resized with
                antialiasing if the teacher takes images of another size.

        Returns:
            "b width", float32.
        """
        kind = images.device.type
        plain = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with torch.no_grad(), plain:
            prepared = self.normalize(images).contiguous()
            if self.size is not None and tuple(prepared.shape[-2:]) != self.size:
                prepared = functional.interpolate(prepared, self.size, mode="bilinear", antialias=True)
            pooled = read_features(self.trunk, prepared, [], pooled=True).pooled
            assert pooled is not None
            return pooled.float()

    def digest(self) -> str:
        """One digest of its weights and statistics."""
        return root({name: fingerprint(tensor) for name, tensor in self.state_dict().items()})


@dataclass(frozen=True)
class _TeacherSpec:
    """The parts of a teacher.

    Attributes:
        trunk: The timm model, with the weights that timm or a file gives; without any for the trunk of a run.
        size: Height and width of the images that it takes, in pixels; None if it takes any.
        checkpoint: The checkpoint of a run that has its weights.
        key: The key to blame, dotted.
    """

    trunk: TrunkConfig
    size: tuple[int, int] | None
    checkpoint: Path | None
    key: str

    def blamed(self, error: SettingError) -> SettingError:
        """An error about a trunk or the size of its images, at the teacher's own key."""
        section, _, inner = error.key.partition(".")
        if section != "trunk" and self.size is None:
            return error
        inner = "run" if self.checkpoint is not None else inner if section == "trunk" else "options"
        return SettingError(f"{self.key}.{inner}", error.message.replace("trunk.weights", f"{self.key}.weights"))


def build_teachers(config: RunConfig, channels: int, with_weights: bool) -> dict[str, Teacher]:
    """The teachers of a run by task, in its order; empty if no task has one.

    Random numbers are left as they were; random weights follow from the run's seed alone.

    Args:
        config: The run.
        channels: Those of the data set's images.
        with_weights: Whether their weights are loaded; the architecture alone costs nothing on the meta device.

    Raises:
        SettingError: There is no such model or run, or it does not take the images.
        WeightsError: The weights are not available, or do not fit.
    """
    teachers: dict[str, Teacher] = {}
    for task, own in config.tasks.items():
        if isinstance(own, DistillConfig):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                teachers[task] = _build(own.teacher, f"tasks.{task}.teacher", config, channels, with_weights)
    return teachers


def _build(own: TeacherConfig, key: str, config: RunConfig, channels: int, with_weights: bool) -> Teacher:
    origin = _of_run(own.run, key, channels) if own.run is not None else _of_timm(own, key)
    takes, size = input_channels(origin.trunk), origin.size or config.data.size
    # Grey images are shown to each of three channels.
    if channels != takes and (channels, takes) != (1, 3):
        raise _channels_differ(origin, takes, channels, config.data.name)
    settings = origin.trunk if with_weights else origin.trunk.model_copy(update={"weights": "none"})
    try:
        trunk = build_trunk(settings, size)
        if with_weights and origin.checkpoint is not None:
            _load_trunk(trunk, origin, config.data.name)
        _, shape = features_of(trunk, False, size, settings)
    except SettingError as error:
        raise origin.blamed(error) from error
    return Teacher(trunk, takes, origin.size, shape.pooled)


def _of_timm(own: TeacherConfig, key: str) -> _TeacherSpec:
    assert own.name is not None and own.weights is not None
    trunk = TrunkConfig(name=own.name, weights=own.weights, options=own.options)
    try:
        known = timm.models.get_pretrained_cfg(own.name)
    except RuntimeError:  # No weights of that tag: an error when the model is built.
        known = None
    if known is None or not known.fixed_input_size:
        return _TeacherSpec(trunk, None, None, key)
    chosen = own.options.get("img_size", known.input_size[-2:])
    sides = [chosen, chosen] if isinstance(chosen, int) else chosen
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        raise SettingError(f"{key}.options", f"img_size: expected a number, or height and width, got {chosen!r}")
    return _TeacherSpec(trunk, (sides[0], sides[1]), None, key)


def _of_run(run: str, key: str, channels: int) -> _TeacherSpec:
    """The trunk of a run: its best weights, or the last ones if no validation gave a score."""
    try:
        opened = open_trained_run(Path(run))
    except CheckpointError as error:
        raise SettingError(f"{key}.run", str(error)) from error
    config = opened.config
    # Where images have more channels than three, a run's trunk takes as many by itself.
    options = ({"in_chans": channels} if channels > 3 else {}) | config.trunk.options
    trunk = config.trunk.model_copy(update={"options": options, "weights": "none", "checkpointing": False})
    return _TeacherSpec(trunk, config.data.size, opened.checkpoint, key)


def _load_trunk(trunk: nn.Module, origin: _TeacherSpec, data: str) -> None:
    assert origin.checkpoint is not None
    try:
        found = read_contents(origin.checkpoint).tensors
    except UnreadableError as error:
        raise SettingError("trunk.weights", f"cannot be read: {error}") from error
    state = {name.removeprefix("trunk."): tensor for name, tensor in found.items() if name.startswith("trunk.")}
    # The first layer that sees pixels.
    name, stem = next((name, tensor) for name, tensor in trunk.state_dict().items() if tensor.ndim == 4)
    if name in state and state[name].shape[1] != stem.shape[1]:
        raise _channels_differ(origin, state[name].shape[1], stem.shape[1], data)
    load_into(trunk, state, str(origin.checkpoint))


def _channels_differ(origin: _TeacherSpec, takes: int, channels: int, data: str) -> SettingError:
    key = f"{origin.key}.{'options' if origin.checkpoint is None else 'run'}"
    return SettingError(
        key, f"the teacher takes images of {count(takes, 'channel')}, and those of {data} have {channels}"
    )


def load_teachers(teachers: Mapping[str, Teacher], checkpoint: Path) -> None:
    """Loads teachers as a run has them in a checkpoint of its own.

    Raises:
        CheckpointError: They are not there, or do not fit.
    """
    try:
        found = read_contents(checkpoint).tensors
        start = f"{TEACHERS}."
        own = {name.removeprefix(start): tensor for name, tensor in found.items() if name.startswith(start)}
        nn.ModuleDict(teachers).load_state_dict(own)
    except (UnreadableError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint} has no such teachers: {error}") from error
