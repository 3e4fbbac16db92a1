"""Steps of a pipeline and the samples that they change, as torchvision's v2 transforms take them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision import tv_tensors

from mtl.config.transform import OwnTransformConfig, TransformConfig
from mtl.data.cache import DataError
from mtl.data.transforms.built_in import IMAGE, PipelineStep, Resize, Sample, build_built_in
from mtl.data.transforms.dense import Classes, Dense, DepthMap, NoFormulaError, NormalMap
from mtl.data.transforms.own import OwnTransform
from mtl.data.transforms.points import Points
from mtl.tasks.base import LabelKind

_DENSE: Mapping[LabelKind, type[Dense]] = {"mask": Classes, "depth": DepthMap, "normals": NormalMap}
_CHANNELS: Mapping[LabelKind, tuple[int, ...]] = {"mask": (), "depth": (1,), "normals": (3,)}


def build_step(config: TransformConfig, size: tuple[int, int], place: str) -> PipelineStep:
    """Makes one transform.

    Args:
        config: Its settings.
        size: Height and width of the pipeline's images.
        place: Its key, dotted.

    Raises:
        SettingError: A class of the user's own cannot be had, or does not take its options.
    """
    if isinstance(config, OwnTransformConfig):
        return OwnTransform(config, place)
    return build_built_in(config, size, place)


def resized(sample: Sample, size: tuple[int, int], generator: torch.Generator, place: str) -> Sample:
    """A sample in a size, height and width."""
    return sample if sample[IMAGE].shape[-2:] == size else applied(Resize(size), sample, generator, place)


def plain(sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
    """Image and labels of a sample as plain tensors."""
    labels = {name: value.label() if isinstance(value, Points) else value for name, value in sample.items()}
    changed = {name: value.as_subclass(Tensor) for name, value in labels.items()}
    return changed.pop(IMAGE), changed


def typed(image: Tensor, labels: Mapping[str, Tensor], kinds: Mapping[str, LabelKind]) -> Sample:
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


def applied(step: PipelineStep, sample: Sample, generator: torch.Generator, place: str) -> Sample:
    try:
        changed = step(sample, generator)
    except NoFormulaError as error:
        raise DataError(f"{place}: {error}") from error
    return changed | {IMAGE: tv_tensors.Image(changed[IMAGE])}
