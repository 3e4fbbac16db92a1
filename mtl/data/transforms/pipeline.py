"""Joint changes of an image and its labels: a list of transforms, and the size of what comes out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from mtl.config.transform import OwnTransformConfig, TransformConfig
from mtl.tasks.base import LabelKind

if TYPE_CHECKING:
    from mtl.data.transforms.built_in import PipelineStep


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
        self._steps: list[tuple[str, PipelineStep]] = []
        if config:
            # Late: torchvision takes a second, and many runs have no transforms.
            from mtl.data.transforms.steps import build_step

            self._steps = [(f"{key}.{n}", build_step(each, size, f"{key}.{n}")) for n, each in enumerate(config)]
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
        from mtl.data.transforms.steps import applied, plain, resized, typed

        sample = typed(image, labels, kinds)
        if not self._steps and image.shape[-2:] == self._size:
            return image, dict(labels)
        # Hashed, since a generator of torch reads the lowest 32 bits of a seed only.
        generator = torch.Generator().manual_seed(xxhash.xxh32_intdigest(str(seed).encode()))
        for place, step in self._steps:
            sample = applied(step, sample, generator, place)
        return plain(resized(sample, self._size, generator, self._key))

    def describe(self) -> dict[str, Any]:
        """All that its results depend on besides image, labels and seed, as JSON."""
        import torchvision

        pairs = zip(self._config, self._steps, strict=True)
        kinds = [getattr(step, "kind") for each, (_, step) in pairs if isinstance(each, OwnTransformConfig)]  # noqa: B009
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
