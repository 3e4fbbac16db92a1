"""Images and labels as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mtl.data import Batch
from mtl.tasks import Task


def picture_of(images: Tensor) -> Tensor:
    """Images as matplotlib shows them.

    Args:
        images: "b h w c", uint8, or float32 from 0 to 255.

    Returns:
        "b h w c", uint8, c is 1 or 3: the first channels of images that have others.
    """
    channels = 1 if images.shape[-1] < 3 else 3
    shown = images[..., :channels]
    return shown.round().clamp(0, 255).to(torch.uint8) if shown.is_floating_point() else shown


def draw_samples(batch: Batch, tasks: Mapping[str, Task], file: Path) -> None:
    """A PNG with a column for each sample: the image with labels in words above it, labels that are maps below it.

    Args:
        batch: The samples, on the CPU.
        tasks: The tasks by name.
        file: Where it is written.

    Raises:
        OSError: It cannot be written.
    """
    from matplotlib.figure import Figure

    maps = {name: task for name, task in tasks.items() if task.output == "dense"}
    rows = [("image", picture_of(batch.images))]
    rows += [(name, task.draw(batch.labels[name], is_label=True)) for name, task in maps.items()]
    words = {name: task.caption(batch.labels[name], is_label=True) for name, task in tasks.items() if name not in maps}
    figure = Figure(figsize=(1.8 * len(batch), 2.0 * len(rows) + 0.16 * len(words)), layout="constrained")
    for axes_of_row, (title, pictures) in zip(figure.subplots(len(rows), len(batch), squeeze=False), rows, strict=True):
        axes_of_row[0].set_ylabel(title, fontsize=8)
        for axes, picture in zip(axes_of_row, pictures.numpy(), strict=True):
            axes.imshow(picture, cmap="gray" if picture.shape[-1] == 1 else None)
            axes.set(xticks=[], yticks=[])
    for place, axes in enumerate(figure.axes[: len(batch)]):
        axes.set_title("\n".join(f"{name}: {said[place]}" for name, said in words.items()), fontsize=7)
    figure.savefig(file, dpi=110)
