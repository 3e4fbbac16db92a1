"""Predictions as files: pictures for each pixel, and a row for each image."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mtl.tasks import Depth, Normals, Segmentation, Task

# Of a depth in a PNG of 16 bits: units in a metre, and the highest number.
UNITS = 1000
_MOST = 2**16 - 1
# Numbers that a palette has colours for.
_PALETTE = 256

Pixels = NDArray[Any]


def png_of(pixels: Pixels, palette: list[int] | None = None) -> bytes:
    """A PNG file's content.

    Args:
        pixels: "h w" or "h w 3", 8 bits, or "h w" 16 bits.
        palette: Red, green and blue of each number, one after the other; then the numbers are those of colours.
    """
    picture = Image.fromarray(pixels)
    if palette is not None:
        picture = picture.convert("P") if picture.mode != "L" else picture
        picture.putpalette(palette)
    stream = io.BytesIO()
    # The lowest compression takes a third of the time, and a few percent more room.
    picture.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def map_files(name: str, task: Task, prediction: Tensor) -> dict[str, bytes]:
    """The files for a dense task's prediction of one image, by path below the output folder, `{}` for the image.

    Segmentation: a PNG whose numbers are classes, in colours; from 257 classes on, 16 bits in grey. Depth: a PNG of 16
    bits in millimetres, 0 below none and 65,535 above 65 metres, and a picture. Normals: -1 to 1 as 0 to 255. Edges
    and saliency: the probability from 0 to 255. Others: an array `.npy`.

    Args:
        name: The task's.
        task: The task.
        prediction: As `Task.predict` gives it, without its first axis.
    """
    file = f"{name}/{{}}.png"
    if isinstance(task, Segmentation):
        return {file: mask_png(prediction, task)}
    if isinstance(task, Depth):
        units = (UNITS * prediction[0]).round().clamp(0, _MOST).numpy().astype(np.uint16)
        return {file: png_of(units), f"{name}_picture/{{}}.png": png_of(_picture(task, prediction))}
    if isinstance(task, Normals):
        return {file: png_of(_eight_bits(prediction.permute(1, 2, 0) / 2 + 0.5))}
    if task.label_kind == "mask" and prediction.ndim == 2 and prediction.is_floating_point():
        return {file: png_of(_eight_bits(prediction))}
    stream = io.BytesIO()
    np.save(stream, prediction.numpy(), allow_pickle=False)
    return {f"{name}/{{}}.npy": stream.getvalue()}


def mask_png(classes: Tensor, task: Task) -> bytes:
    """A PNG whose numbers are classes "h w", in the colours of reports."""
    if task.num_outputs > _PALETTE:
        return png_of(classes.numpy().astype(np.uint16))
    colour = getattr(task, "colour", None)
    each = range(_PALETTE)
    palette = [round(255 * part) for number in each for part in (colour(number) if colour else (number % 2,) * 3)]
    return png_of(classes.numpy().astype(np.uint8), palette)


def _picture(task: Task, prediction: Tensor) -> Pixels:
    """A depth in colours; `draw` takes labels, which metres are."""
    return _eight_bits(task.draw(prediction[None], is_label=True)[0])


def _eight_bits(shares: Tensor) -> Pixels:
    return (255 * shares.nan_to_num()).round().clamp(0, 255).numpy().astype(np.uint8)


def flat(name: str, data: Any) -> dict[str, Any]:
    """A prediction as cells of a row: nested names are joined by dots.

    Args:
        name: The task's.
        data: What `Task.as_data` gives.
    """
    if isinstance(data, Mapping):
        return {key: value for inner, each in data.items() for key, value in flat(f"{name}.{inner}", each).items()}
    if isinstance(data, list):
        return {key: value for place, each in enumerate(data) for key, value in flat(f"{name}.{place}", each).items()}
    return {name: data}


def write_file(folder: Path, name: str, content: bytes) -> None:
    """Writes a file under another name and renames it, so that nobody ever sees half of it; makes its folders."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
