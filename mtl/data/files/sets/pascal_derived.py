"""Labels of `pascal_mt` that are derived from MATLAB's files once: human parts, normals, edges.

Needs scipy and scikit-image.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from mtl.data.cache import DataError
from mtl.data.files.reading import read_image
from mtl.data.files.sets.folder import SetFolder
from mtl.runtime.text import count

Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]
# One object of an image: the number of its class, and its parts by name.
Object = tuple[int, Sequence[tuple[str, Mask]]]

_PERSON = 15
# PASCAL-Part's 24 names of a person's parts, as the number of the part that they belong to.
PART_OF = {
    **dict.fromkeys(("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"), 1),
    **dict.fromkeys(("neck", "torso"), 2),
    **dict.fromkeys(("luarm", "ruarm"), 3),
    **dict.fromkeys(("lhand", "llarm", "rhand", "rlarm"), 4),
    **dict.fromkeys(("luleg", "ruleg"), 5),
    **dict.fromkeys(("lfoot", "llleg", "rfoot", "rlleg"), 6),
}
# The classes of PASCAL-Context whose names NYUv2 has too, and `tvmonitor`: the net that found the normals knew these.
KNOWN_TO_NYU = (
    *(3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56),
    *(59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124),
    *(135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202),
    *(213, 215, 216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261),
    *(263, 269, 272, 273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314),
    *(315, 319, 323, 329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383),
    *(384, 397, 401, 403, 405, 407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442),
    *(443, 444, 446, 454, 457),
)
_BROKEN = (OSError, ValueError, TypeError, KeyError, IndexError, NotImplementedError, zlib.error)


def derive(
    folder: SetFolder,
    names: Sequence[str],
    targets: Mapping[str, str],
    sources: Mapping[str, Collection[str]],
    log: Callable[[str], None],
) -> None:
    """Derives labels of all images whose sources are there; files that are there already stay.

    Args:
        folder: The data set's folder.
        names: The names of its images.
        targets: By label, the folder of its files.
        sources: By label, the folders that it is derived from.
        log: Is called with what was done.

    Raises:
        DataError: Another library is missing, a file is missing or cannot be read, or there is nothing to derive.
    """
    _libraries()
    makers = {"human_parts": _parts_file, "normals": _normals_file, "edges": _edges_file}
    num_derived = 0
    for label, target in targets.items():
        missing = [source for source in sources[label] if not folder.has(source)]
        if missing:
            log(f"{label}: skipped, since there is no folder {' and no folder '.join(missing)} in {folder.root}")
            continue
        out = folder.path(target)
        out.mkdir(parents=True, exist_ok=True)
        there = {entry.name for entry in os.scandir(out)}
        todo = [name for name in names if f"{name}.png" not in there]
        for name in tqdm(todo, desc=f"preparing {label}", disable=None, delay=1, leave=False):
            _write(out / f"{name}.png", makers[label](folder, name))
        log(f"{label}: {count(len(todo), 'file')} written to {out}, {len(names) - len(todo):,} were there")
        num_derived += 1
    if not num_derived:
        raise folder.mistake(f"{folder.root}: nothing to prepare labels from")


def edges_of(label_map: NDArray[Any]) -> Mask:
    """The edges between classes, one pixel wide: where the Laplacian of the class numbers is not 0, thinned.

    Args:
        label_map: "h w", class numbers.
    """
    from skimage.morphology import thin

    padded = np.pad(label_map.astype(np.float64), 1, mode="reflect")
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    edges: Mask = thin(around != 4 * padded[1:-1, 1:-1])  # type: ignore[no-untyped-call]
    return edges


def human_parts_of(objects: Sequence[Object], size: tuple[int, int]) -> Pixels:
    """The parts of all people in an image, "h w": 1 to 6, 0 for none; where parts overlap, the last one.

    Args:
        objects: The image's objects.
        size: Its height and width.

    Raises:
        ValueError: A part of a person has a name that is not among the 24.
    """
    parts = np.zeros(size, np.uint8)
    for number, own in objects:
        if number != _PERSON:
            continue
        for name, mask in own:
            if name not in PART_OF:
                raise ValueError(f"expected one of a person's 24 parts, got {name!r}")
            parts[mask] = PART_OF[name]
    return parts


def known_normals(normals: Pixels, label_map: NDArray[Any]) -> Pixels:
    """Normals where the class is one that NYUv2 knows, black elsewhere.

    Args:
        normals: "h w 3", 0 to 255 for -1 to 1.
        label_map: "h w", numbers of PASCAL-Context's classes.
    """
    known: Pixels = np.where(np.isin(label_map, KNOWN_TO_NYU)[..., None], normals, np.uint8(0))
    return known


def _edges_file(folder: SetFolder, name: str) -> Pixels:
    return edges_of(_label_map(folder, name)).astype(np.uint8) * np.uint8(255)


def _normals_file(folder: SetFolder, name: str) -> Pixels:
    file = folder.path(f"normals_distill/{name}.png")
    normals: Pixels = read_image(file).permute(1, 2, 0).numpy()
    label_map = _label_map(folder, name)
    if normals.dtype != np.uint8 or normals.shape != (*label_map.shape, 3):
        raise DataError(
            f"{file}: expected 8 bits of shape {(*label_map.shape, 3)}, got {normals.dtype} of {normals.shape}"
        )
    return known_normals(normals, label_map)


def _parts_file(folder: SetFolder, name: str) -> Pixels:
    file = folder.path(f"human_parts/{name}.mat")
    try:
        objects, size = _objects(_mat(file)["anno"])
        return human_parts_of(objects, size)
    except _BROKEN as error:
        raise DataError(f"{file}: expected PASCAL-Part's `anno`; {error}") from error


def _objects(anno: NDArray[Any]) -> tuple[list[Object], tuple[int, int]]:
    """The objects of PASCAL-Part's structure, and the image's size: name and objects; class, number, mask and parts."""
    objects: list[Object] = []
    size: tuple[int, int] | None = None
    for _, number, mask, parts in anno[0, 0][1][0]:
        size = mask.shape
        own = [(str(name[0]), each.astype(bool)) for name, each in (parts[0] if parts.size else ())]
        objects.append((int(number[0, 0]), own))
    if size is None:
        raise ValueError("it has no object")
    return objects, size


def _label_map(folder: SetFolder, name: str) -> NDArray[Any]:
    file = folder.path(f"pascal-context/trainval/{name}.mat")
    label_map: Any = _mat(file).get("LabelMap")
    if label_map is None or label_map.ndim != 2:
        raise DataError(f'{file}: expected PASCAL-Context\'s `LabelMap`, "h w"')
    return np.asarray(label_map)


def _mat(file: Path) -> dict[str, Any]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content: dict[str, Any] = loadmat(str(file), appendmat=False)
    except (MatReadError, *_BROKEN) as error:
        raise DataError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
    return content


def _write(file: Path, pixels: Pixels) -> None:
    """Writes a picture under another name and renames it, so that half a picture never counts as done."""
    part = file.with_name(f".{file.name}.part")
    Image.fromarray(pixels).save(part, format="PNG")
    part.replace(file)


def _libraries() -> None:
    """Raises `DataError` if scipy or scikit-image is missing."""
    try:
        for module in ("scipy.io", "skimage.morphology"):
            import_module(module)
    except ImportError as error:
        raise DataError(f"to prepare pascal_mt, install scipy and scikit-image ({error})") from error
