"""Reads images and labels from files: pictures by Pillow, arrays as `.npy` without pickles."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mtl.data.cache import DataError
from mtl.data.files.blob import Readable, array_of, is_npy, open_bytes, reason

Pixels = NDArray[Any]

# Modes of Pillow whose channels are the file's own; others are converted to RGB.
_PLAIN = ("L", "RGB", "RGBA", "CMYK")
_DEEP = ("I;16", "I;16L", "I;16B", "I")
# Resizing with a cubic filter goes a little beyond the range.
_OVERSHOOT = 0.1
_BROKEN = (OSError, ValueError, EOFError, SyntaxError, struct.error, IndexError, Image.DecompressionBombError)


def inside(root: Path, name: str, follow_links: bool = False) -> Path:
    """The file of that name in a folder.

    Args:
        root: The folder.
        name: A path relative to it.
        follow_links: Whether links may lead out of the folder; the name itself never may.

    Raises:
        DataError: The name leads out of the folder: it is absolute, has `..` that leave it, or passes a link that does.
    """
    if "\0" in name:
        raise DataError(f"{name!r}: expected a file's name, got one with a null character")
    written = root / os.path.normpath(name)
    if written.is_relative_to(root) and ".." not in written.parts[len(root.parts) :]:
        if follow_links:
            return written
        file = Path(os.path.realpath(written))
        if file.is_relative_to(os.path.realpath(root)):
            return file
    raise DataError(f"{name}: leads out of {root}")


def read_image(file: Readable, enough: tuple[int, int] | None = None, to_rgb: bool = False) -> Tensor:
    """An image as it is stored, upright.

    Args:
        file: A picture, or an array `.npy` "h w c" or "h w".
        enough: Height and width that are enough: a JPEG is decoded at the smallest size that is at least that.
        to_rgb: Whether a picture of 8 bits gets the channels red, green and blue, whatever it is stored as; an alpha
            channel is left out.

    Returns:
        "c h w": uint8; or float32 from 0 to 255, if the file has 16 bits, or floats from 0 to 1. Floats that were
        resized may be up to a tenth beyond; they stay as they are.

    Raises:
        DataError: The file cannot be read, or is no image.
    """
    with _reading(file):
        if is_npy(file):
            pixels = _array(file)
        else:
            with _open(file) as picture:
                if enough is not None:
                    picture.draft(None, (enough[1], enough[0]))
                pixels = _pixels(ImageOps.exif_transpose(picture), to_rgb)
        return _as_image(pixels)


def image_of(picture: Image.Image) -> Tensor:
    """As `read_image`, of a picture that is open already.

    Raises:
        DataError: It cannot be decoded, or is no image.
    """
    name = getattr(picture, "filename", "") or "a PIL image"
    try:
        return _as_image(_pixels(ImageOps.exif_transpose(picture), to_rgb=False))
    except _BROKEN as error:
        raise DataError(f"{name}: cannot be read: {error}") from error


def read_mask(file: Readable) -> Tensor:
    """The number of each pixel, "h w", uint8 or int32: grey, a palette's index, 16 bits, or an array `.npy`.

    Raises:
        DataError: The file cannot be read, or has several numbers a pixel, or no whole ones.
    """
    with _reading(file):
        numbers = _one_number(file)
        if numbers.dtype.kind == "f" and not np.array_equal(numbers, np.round(numbers)):
            raise ValueError("expected whole numbers")
        is_narrow = numbers.dtype in (np.bool_, np.uint8)
        return torch.from_numpy(numbers.astype(np.uint8 if is_narrow else np.int32))


def read_depth(file: Readable, scale: float = 1.0) -> Tensor:
    """A distance for each pixel, "1 h w", float32: what the file holds times `scale`; 0 and NaN are no label.

    Raises:
        DataError: The file cannot be read, or has several numbers a pixel.
    """
    with _reading(file):
        return torch.from_numpy(_one_number(file).astype(np.float32))[None] * scale


def read_normals(file: Readable) -> Tensor:
    """A unit vector for each pixel, "3 h w", float32: an array `.npy` "h w 3", or a picture whose 0 to 255 are -1 to 1.

    What is not finite, or shorter than a half, becomes a zero vector: no label; so does black, as grey does, where a
    picture has none.

    Raises:
        DataError: The file cannot be read, or has not three numbers a pixel.
    """
    with _reading(file):
        if is_npy(file):
            values = _array(file).astype(np.float32)
        else:
            with _open(file) as picture:
                values = np.array(picture)
        if values.ndim != 3 or values.shape[2] != 3:
            raise ValueError(f"expected three numbers a pixel, got shape {values.shape}")
    # By plane: sums over a last axis of three take several times as long.
    vectors = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
    is_some = (vectors != 0).any(dim=0)
    if not vectors.is_floating_point():
        vectors = vectors.float().mul_(2 / 255).sub_(1)
    length = vectors.square().sum(dim=0).sqrt_()
    return torch.where(is_some & (length > 0.5) & length.isfinite(), vectors / length, 0)


def read_array(file: Readable) -> Pixels:
    """An array of numbers from `.npy`; pickled objects are refused.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    with _reading(file):
        return _array(file)


@contextmanager
def _reading(file: Readable) -> Iterator[None]:
    """Turns an error of a file into a `DataError` with its name."""
    try:
        yield
    except _BROKEN as error:
        raise DataError(f"{file}: {reason(file, error)}") from error


def _as_image(pixels: Pixels) -> Tensor:
    if pixels.ndim not in (2, 3):
        raise ValueError(f'expected an image "h w" or "h w c", got shape {pixels.shape}')
    if pixels.dtype == np.uint16:
        pixels = pixels.astype(np.float32) / 257
    elif pixels.dtype.kind == "f":
        if pixels.size and not (pixels.min() >= -_OVERSHOOT and pixels.max() <= 1 + _OVERSHOOT):
            raise ValueError(
                f"expected floats from 0 to 1, got {pixels.min():.4g} to {pixels.max():.4g};"
                " store 0 to 255 as whole numbers of 8 bits, and an image as it was before it was normalised"
            )
        pixels = pixels.astype(np.float32) * 255
    elif pixels.dtype != np.uint8:
        raise ValueError(f"expected 8 or 16 bits without sign, or floats, got {pixels.dtype}")
    image = torch.from_numpy(np.ascontiguousarray(pixels))
    return image[None] if image.ndim == 2 else image.permute(2, 0, 1)


def _open(file: Readable) -> Image.Image:
    return Image.open(file if isinstance(file, Path) else open_bytes(file))


def _array(file: Readable) -> Pixels:
    array: Pixels | None = array_of(file)
    if array is None:
        with open_bytes(file) as stream:  # np.load would leave an archive open
            array = np.lib.format.read_array(stream, allow_pickle=False)
    if array.dtype.kind not in "buif":
        raise ValueError("expected an array of numbers")
    return array


def _pixels(picture: Image.Image, to_rgb: bool) -> Pixels:
    if picture.mode in _DEEP:
        deep: Pixels = np.array(picture)
        if deep.size and not (deep.min() >= 0 and deep.max() < 2**16):
            raise ValueError(f"expected at most 16 bits, got {deep.min()} to {deep.max()}")
        return deep.astype(np.uint16)
    if picture.mode == "F":
        raise ValueError("expected whole numbers, got a picture of floats")
    mode = "L" if picture.mode == "1" else picture.mode if picture.mode in _PLAIN else "RGB"
    mode = "RGB" if to_rgb else mode
    return np.array(picture if mode == picture.mode else picture.convert(mode))


def _one_number(file: Readable) -> Pixels:
    if is_npy(file):
        numbers = _array(file)
        numbers = numbers[..., 0] if numbers.ndim == 3 and numbers.shape[2] == 1 else numbers
    else:
        with _open(file) as picture:  # of a palette, the indices
            numbers = np.array(picture)
    if numbers.ndim != 2:
        raise ValueError(f"expected one number a pixel, got shape {numbers.shape}")
    return numbers
