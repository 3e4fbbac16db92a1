"""Predictions next to labels as one picture, drawn in milliseconds: a validation waits for it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mtl.data import Batch
from mtl.tasks import Task

# Pixels. The width of an image is brought between the first two.
_LEAST, _MOST = 128, 224
_MARGIN, _LINE, _GAP, _SWATCH = 92, 13, 4, 9

# Names, each with red, green and blue from 0 to 1.
Legend = Sequence[tuple[str, tuple[float, float, float]]]


def draw_panel(batch: Batch, outputs: Mapping[str, Tensor], tasks: Mapping[str, Task]) -> bytes:
    """A column for each image: its labels in words, the image, and labels above predictions of each map.

    Args:
        batch: The images and labels, on the CPU.
        outputs: The heads' outputs by task, float32, on the CPU.
        tasks: The tasks by name.

    Returns:
        The content of a PNG file.
    """
    rows = [("image", batch.images.float()[..., : 1 if batch.images.shape[-1] < 3 else 3] / 255)]
    words: list[list[str]] = [[] for _ in range(len(batch))]
    legends: list[Legend] = []
    for name, task in tasks.items():
        if task.output == "dense":
            rows.append((f"{name}\nlabel", task.draw(batch.labels[name], is_label=True)))
            rows.append((f"{name}\npredicted", task.draw(outputs[name], is_label=False)))
            legends.append(task.legend())
            continue
        predicted, truth = task.caption(outputs[name], is_label=False), task.caption(batch.labels[name], is_label=True)
        for lines, one, other in zip(words, predicted, truth, strict=True):
            lines += [f"{name}: {one}", f"  label: {other}"]
    size = _size_of(batch.images)
    picture = _compose([(title, _tiles(pictures, size)) for title, pictures in rows], words, legends, size)
    file = io.BytesIO()
    picture.save(file, format="png", compress_level=1)
    return file.getvalue()


def _compose(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    words: Sequence[Sequence[str]],
    legends: Sequence[Legend],
    size: tuple[int, int],
) -> Image.Image:
    """Rows of tiles of one size, with words above each column, a title at the left of each row, legends below."""
    columns = [_MARGIN + column * (size[0] + _GAP) for column in range(len(words))]
    width = _MARGIN + len(words) * (size[0] + _GAP)
    legend_lines = [line for legend in legends if legend for line in _wrapped(legend, width - _MARGIN)]
    top = max(map(len, words)) * _LINE + _GAP
    height = top + len(rows) * (size[1] + _GAP) + len(legend_lines) * _LINE + _GAP
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for left, lines in zip(columns, words, strict=True):
        for number, text in enumerate(lines):
            draw.text((left, number * _LINE), text[: size[0] // 6], "black")
    for title, tiles in rows:
        draw.multiline_text((2, top), title, "black")
        for left, tile in zip(columns, tiles, strict=True):
            canvas.paste(tile, (left, top))
        top += size[1] + _GAP
    for line in legend_lines:
        for place, name, colour in line:
            left = _MARGIN + place
            draw.rectangle((left, top + 2, left + _SWATCH, top + 2 + _SWATCH), _rgb(colour))
            draw.text((left + _SWATCH + 3, top), name, "black")
        top += _LINE
    return canvas


def _size_of(images: Tensor) -> tuple[int, int]:
    """Width and height of a tile in pixels."""
    height, width = images.shape[1:3]
    scale = min(max(1.0, _LEAST / width), _MOST / width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _tiles(pictures: Tensor, size: tuple[int, int]) -> list[Image.Image]:
    """Args: pictures: "b h w c", floats from 0 to 1, c is 1 or 3; size: width and height of each, in pixels."""
    levels = (pictures.float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    if levels.shape[-1] == 1:
        levels = levels.expand(*levels.shape[:-1], 3)
    tiles = [Image.fromarray(each.numpy()) for each in levels.contiguous()]
    return [tile.resize(size, Image.Resampling.NEAREST) for tile in tiles]


def _wrapped(legend: Legend, width: int) -> list[list[tuple[int, str, tuple[float, float, float]]]]:
    """A legend in lines, each entry with its place from the left, in pixels."""
    lines: list[list[tuple[int, str, tuple[float, float, float]]]] = [[]]
    left = 0
    for name, colour in legend:
        wide = _SWATCH + 12 + 6 * len(name)
        if lines[-1] and left + wide > width:
            lines.append([])
            left = 0
        lines[-1].append((left, name, colour))
        left += wide
    return lines


def _rgb(colour: tuple[float, float, float]) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in colour)
    return red, green, blue
