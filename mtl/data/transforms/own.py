"""Transforms of torchvision's v2 and of the user's own, made by name and checked at every sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Generator, Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from mtl.config import SettingError
from mtl.config.own import make_own, own_class
from mtl.config.transform import OwnTransformConfig
from mtl.data.cache import DataError
from mtl.data.transforms.built_in import IMAGE, Sample, as_torchvision_takes_it
from mtl.data.transforms.dense import Dense
from mtl.data.transforms.draws import drawing_from
from mtl.data.transforms.points import Points
from mtl.runtime.plugin import where_it_failed
from mtl.runtime.text import hint

# Those of torchvision that draw nothing. A class of the user's own says so by `is_random = False`.
_FIXED = (v2.Resize, v2.CenterCrop, v2.Pad, v2.Grayscale, v2.Identity)


class OwnTransform:
    """A class that the user names; its objects take a dict of tv_tensors and return it.

    Attributes:
        is_random: True unless the class is known to draw nothing.
        kind: The class.
    """

    def __init__(self, config: OwnTransformConfig, key: str) -> None:
        """Makes the transform.

        Raises:
            SettingError: The class cannot be had, does not take its options, or its objects cannot be called.
        """
        self._key = key
        self._name = config.name
        self.kind: type[Any] = own_class(config.name, f"{key}.name", object)
        self._transform = make_own(self.kind, config.options, f"{key}.options", config.name)
        if not callable(self._transform):
            raise SettingError(f"{key}.name", f"{config.name} has no __call__, which takes and returns a dict")
        self.is_random: bool = getattr(self.kind, "is_random", not issubclass(self.kind, _FIXED))

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        image = sample[IMAGE]
        changed: Sample = {}

        def change(as_taken: Tensor) -> Tensor:
            changed.update(self._called(sample | {IMAGE: tv_tensors.Image(as_taken)}, generator))
            return changed[IMAGE]

        changed[IMAGE] = as_torchvision_takes_it(image, change)
        self._check(sample, changed)
        return {name: changed[name] for name in sample}

    def _called(self, sample: Sample, generator: Generator) -> Mapping[str, Tensor]:
        try:
            with drawing_from(generator):
                result = self._transform(dict(sample))
        except Exception as error:  # the user's code may raise anything
            raise DataError(f"{self._key}: {self._name}: {where_it_failed(error)}") from error
        if not isinstance(result, Mapping):
            raise self._mistake("the dict that it was called with", type(result).__name__)
        for name in result:
            if name not in sample:
                near = hint(str(name), sample)
                raise self._mistake(f"the names {', '.join(sample)}", f"{name!r} too", near)
        for name in sample:
            if not isinstance(result.get(name), Tensor):
                got = type(result[name]).__name__ if name in result else "none"
                raise self._mistake(f"a tensor under {name!r}", got)
        return result

    def _check(self, before: Sample, after: Sample) -> None:
        size = tuple(after[IMAGE].shape[-2:])
        for name, old in before.items():
            new = after[name]
            expected: tuple[int, ...] = tuple(old.shape)
            if name == IMAGE or isinstance(old, Dense):
                expected = (*expected[:-2], *size)
            if new.dtype != old.dtype or tuple(new.shape) != expected:
                raise self._mistake(f"{name} as {_words(old.dtype, expected)}", _words(new.dtype, tuple(new.shape)))
            if isinstance(old, Dense | Points) and not isinstance(new, type(old)):
                raise self._mistake(f"{name} as {type(old).__name__} (tv_tensors.wrap)", type(new).__name__)
            if isinstance(new, Points) and new.canvas_size != size:
                raise self._mistake(f"points {name} in an image of {size}", f"in one of {new.canvas_size}")

    def _mistake(self, expected: str, got: str, near: str = "") -> DataError:
        return DataError(f"{self._key}: {self._name}: expected {expected}, got {got}{near}")


def _words(dtype: Any, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} of shape {shape}"
