"""From images of any size to predictions in units, batch by batch; the next images are read meanwhile."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mtl.data import DataError
from mtl.data.files.items import ImageForm, in_form, words
from mtl.data.files.reading import image_of, read_image
from mtl.data.transforms import Pipeline, build_transforms
from mtl.data.workers import ahead
from mtl.model import MultiTaskModel
from mtl.tasks import Task

Picture = str | Path | Image.Image | Tensor


class Prepared(NamedTuple):
    """An image as the network takes it.

    Attributes:
        pixels: "c h w", uint8, or float32 from 0 to 255.
        size: Height and width that it had, in pixels.
    """

    pixels: Tensor
    size: tuple[int, int]


class Preparer:
    """Brings images to the size and the channels that a network takes."""

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        self._size, self._channels = size, channels
        self._resize: Pipeline = build_transforms([], size, "data.image_size")

    def __call__(self, picture: Picture) -> Prepared:
        """Args:
            picture: As for `TrainedModel.predict`.

        Raises:
            DataError: It cannot be read, or has other channels.
        """
        image, where = _opened(picture)
        if 0 in image.shape:
            raise DataError(f"{where}: expected an image, got one without pixels: {words(image)}")
        image = in_form(image, ImageForm(self._size, self._channels, image.dtype), where)
        pixels, _ = self._resize(image, {}, {}, None)
        height, width = image.shape[-2:]
        return Prepared(pixels, (height, width))


def _opened(picture: Picture) -> tuple[Tensor, str]:
    """An image "c h w" as it is, and what messages call it."""
    if isinstance(picture, Tensor):
        image = picture.detach().cpu()
        if not image.is_floating_point():
            return image, "a tensor"
        if image.numel() and not (image.min() >= -0.1 and image.max() <= 1.1):
            raise DataError(f"a tensor: expected floats from 0 to 1, got {image.min():.4g} to {image.max():.4g}")
        return 255 * image.float(), "a tensor"
    if isinstance(picture, Image.Image):
        return image_of(picture), getattr(picture, "filename", "") or "a PIL image"
    return read_image(Path(picture)), str(picture)


def predictions(
    network: MultiTaskModel,
    prepared: Iterable[Prepared],
    tasks: Mapping[str, Task],
    autocast: torch.autocast,
    batch_size: int,
) -> Iterator[dict[str, Tensor]]:
    """The output of `Task.predict` for each image, by task, without the first axis, on the CPU.

    Args:
        network: In eval mode.
        prepared: The images; they are read in a thread, ahead of what is computed.
        tasks: The tasks by name.
        autocast: The types in which the network computes.
        batch_size: Images that it is given at once.
    """
    # While the maps of one batch are resized, the next one is computed, and the one after it is read.
    for outputs, sizes in ahead(_outputs(network, prepared, tasks, autocast, batch_size)):
        for number, size in enumerate(sizes):
            with torch.no_grad():
                found = {name: task.predict(outputs[name][number, None], size) for name, task in tasks.items()}
            # What was made in inference mode would not be a usual tensor in the caller's hands.
            yield {name: (each.clone() if each.is_inference() else each)[0].cpu() for name, each in found.items()}


def _outputs(
    network: MultiTaskModel,
    prepared: Iterable[Prepared],
    tasks: Mapping[str, Task],
    autocast: torch.autocast,
    batch_size: int,
) -> Generator[tuple[dict[str, Tensor], list[tuple[int, int]]], None, None]:
    """The heads' outputs for each batch, and the sizes that its images had."""
    device = next(network.parameters()).device
    for images, sizes in ahead(_in_batches(prepared, batch_size)):
        with torch.inference_mode(), autocast:
            outputs = network(images.to(device, non_blocking=True), tasks)
        yield outputs, sizes


def _in_batches(
    prepared: Iterable[Prepared], batch_size: int
) -> Generator[tuple[Tensor, list[tuple[int, int]]], None, None]:
    """Images "b h w c", and the sizes that they had."""
    rest = iter(prepared)
    while part := list(islice(rest, batch_size)):
        pixels = [each.pixels for each in part]
        if any(each.is_floating_point() for each in pixels):
            pixels = [each.float() for each in pixels]
        yield torch.stack(pixels).permute(0, 2, 3, 1).contiguous(), [each.size for each in part]
