"""Joint changes of an image and its labels: a list of transforms, and the size of what comes out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
import xxhash
from torch import Tensor
from torchvision import tv_tensors

from mtl.config.transform import OwnTransformConfig, TransformConfig
from mtl.data.cache import DataError
from mtl.data.transforms.built_in import IMAGE, Resize, Sample, Step, build_built_in
from mtl.data.transforms.dense import Classes, Dense, Depth, NoFormulaError, Normals
from mtl.data.transforms.own import OwnTransform
from mtl.data.transforms.points import Points
from mtl.tasks.base import LabelKind

_DENSE: Mapping[LabelKind, type[Dense]] = {"mask": Classes, "depth": Depth, "normals": Normals}
_CHANNELS: Mapping[LabelKind, tuple[int, ...]] = {"mask": (), "depth": (1,), "normals": (3,)}


class Pipeline:
    """Changes an image together with its labels.

    What it returns depends on nothing but what it is called with: all random numbers come from the seed, and no random
    state of the process is read or left changed.

    Attributes:
        is_random: Whether some transform draws; without it, the seed has no effect.
        flips: Whether a `flip` is in the list.
    """

    def __init__(self, config: Sequence[TransformConfig], size: tuple[int, int], key: str) -> None:
        """Makes the transforms; see `build_transforms`."""
        self._config = list(config)
        self._size = size
        self._key = key
        self._steps: list[tuple[str, Step]] = []
        for number, each in enumerate(config):
            place = f"{key}.{number}"
            if isinstance(each, OwnTransformConfig):
                self._steps.append((place, OwnTransform(each, place)))
            else:
                self._steps.append((place, build_built_in(each, size, place)))
        self._resize = Resize(size)
        self.is_random = any(step.is_random for _, step in self._steps)

    def __call__(
        self, image: Tensor, labels: Mapping[str, Tensor], kinds: Mapping[str, LabelKind], seed: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Changes one sample.

        Args:
            image: "c h w", uint8 or float32 from 0 to 255.
            labels: By name, in the shapes of `LabelKind`; those that are missing are left out.
            kinds: What each label is; it may name others too.
            seed: Decides all that is drawn; None if nothing is.

        Returns:
            The image in the pipeline's size, in its own dtype, and the labels.

        Raises:
            DataError: A label does not fit the image, or a transform cannot change it, or returned something else.
            ValueError: The pipeline draws, and there is no seed.
        """
        if seed is None and self.is_random:
            raise ValueError(f"{self._key} draws at random and needs a seed")
        sample = _typed(image, labels, kinds)
        if not self._steps and image.shape[-2:] == self._size:
            return image, dict(labels)
        # Hashed, since a generator of torch reads the lowest 32 bits of a seed only.
        generator = torch.Generator().manual_seed(xxhash.xxh32_intdigest(str(seed).encode()))
        for place, step in self._steps:
            sample = _applied(step, sample, generator, place)
        if sample[IMAGE].shape[-2:] != self._size:
            sample = _applied(self._resize, sample, generator, self._key)
        plain = {name: value.label() if isinstance(value, Points) else value for name, value in sample.items()}
        changed = {name: value.as_subclass(Tensor) for name, value in plain.items()}
        return changed.pop(IMAGE), changed

    def describe(self) -> dict[str, Any]:
        """All that its results depend on besides image, labels and seed, as JSON."""
        kinds = [step.kind for _, step in self._steps if isinstance(step, OwnTransform)]
        files = {Path(inspect.getfile(kind)) for kind in kinds}
        if self._steps:
            files |= set(Path(__file__).parent.glob("*.py"))
        code = b"".join(file.read_bytes() for file in sorted(files))
        return {
            "transforms": [each.model_dump(mode="json") for each in self._config],
            "size": list(self._size),
            "code": xxhash.xxh3_64_hexdigest(code),
            "torchvision": torchvision.__version__,
        }


def _typed(image: Tensor, labels: Mapping[str, Tensor], kinds: Mapping[str, LabelKind]) -> Sample:
    """Image and labels as torchvision's v2 transforms take them."""
    height, width = image.shape[-2:]
    sample: Sample = {IMAGE: tv_tensors.Image(image)}
    for name, label in labels.items():
        kind, shape = kinds[name], tuple(label.shape)
        if kind in _DENSE:
            expected = (*_CHANNELS[kind], height, width)
            if shape != expected:
                raise DataError(f"{name}: expected {kind} of shape {expected}, since the image has it, got {shape}")
            sample[name] = _DENSE[kind].of(label)
        elif kind == "points":
            if len(shape) != 2 or shape[1] != 3:
                raise DataError(f"{name}: expected points of shape (k, 3), got {shape}")
            sample[name] = Points.of(label, (height, width))
        else:
            sample[name] = label
    return sample


def _applied(step: Step, sample: Sample, generator: torch.Generator, place: str) -> Sample:
    try:
        changed = step(sample, generator)
    except NoFormulaError as error:
        raise DataError(f"{place}: {error}") from error
    return changed | {IMAGE: tv_tensors.Image(changed[IMAGE])}


def build_transforms(config: Sequence[TransformConfig], size: tuple[int, int], key: str) -> Pipeline:
    """Makes the transforms of a split.

    Args:
        config: The transforms in their order.
        size: Height and width of the images that come out; what comes out of the list in another size is resized.
        key: The key of the list, dotted, such as `data.transform.train`.

    Raises:
        SettingError: A class of the user's own cannot be had, or does not take its options.
    """
    return Pipeline(config, size, key)
