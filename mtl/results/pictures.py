"""Images and labels as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtl.data import Batch
from mtl.tasks import Task

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

# The width of a legend's column: a class's name takes about as much.
_COLUMN_INCHES = 1.1


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


def add_legend(figure: FigureBase, tasks: Mapping[str, Task], width: float) -> None:
    """Adds a legend below a figure: what the colours of maps stand for. Without such names, nothing.

    Args:
        figure: With constrained layout, which makes room for it.
        tasks: The tasks that are shown, by name; with several legends, each name follows that of its task.
        width: The figure's width in inches.
    """
    from matplotlib.patches import Patch

    legends = {name: legend for name, task in tasks.items() if (legend := task.legend())}
    handles = [
        Patch(color=colour, label=f"{name}: {label}" if len(legends) > 1 else label)
        for name, legend in legends.items()
        for label, colour in legend
    ]
    if handles:
        columns = max(1, int(width / _COLUMN_INCHES / min(len(legends), 2)))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=7)


def draw_samples(batch: Batch, tasks: Mapping[str, Task], file: Path) -> None:
    """A PNG with a column for each sample: the image with labels in words above it, labels that are maps below it.

    Below all of them, a legend has the names of the maps' classes.

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
    width = 1.8 * len(batch)
    figure = Figure(figsize=(width, 2.0 * len(rows) + 0.16 * len(words)), layout="constrained")
    for axes_of_row, (title, pictures) in zip(figure.subplots(len(rows), len(batch), squeeze=False), rows, strict=True):
        axes_of_row[0].set_ylabel(title, fontsize=8)
        for axes, picture in zip(axes_of_row, pictures.numpy(), strict=True):
            axes.imshow(picture, cmap="gray" if picture.shape[-1] == 1 else None)
            axes.set(xticks=[], yticks=[])
    for place, axes in enumerate(figure.axes[: len(batch)]):
        axes.set_title("\n".join(f"{name}: {said[place]}" for name, said in words.items()), fontsize=7)
    add_legend(figure, maps, width)
    figure.savefig(file, dpi=110)
