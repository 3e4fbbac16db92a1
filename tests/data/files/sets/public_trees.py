"""Small trees of files in the layouts of public data sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_settings import SETTINGS
from mtl.data.files.sets import public_set
from mtl.data.files.sets.base import PublicSet
from mtl.tasks.base import LabelKind

Pixels = NDArray[Any]


def put(file: Path, content: Any, **options: Any) -> Path:
    """Writes a text, an array or a picture, with the folders that it needs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        file.write_text(content)
    elif file.suffix == ".npy":
        np.save(file, content)
    else:
        Image.fromarray(content).save(file, **options)
    return file


def colours(height: int, width: int, seed: int = 0) -> Pixels:
    """A picture "h w 3", smooth, so that a JPEG keeps it."""
    rng = np.random.default_rng(seed)
    rows, columns = np.linspace(0, 100, height)[:, None, None], np.linspace(0, 100, width)[None, :, None]
    return (rows + columns + rng.integers(0, 50, 3)).astype(np.uint8)


def normals(height: int, width: int, seed: int = 0) -> Pixels:
    """Unit vectors "h w 3", float32, toward the camera."""
    vectors = np.random.default_rng(seed).normal((0, 0, -3), 1, (height, width, 3))
    return (vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).astype(np.float32)


def opened(
    name: str, root: Path, split: str, kinds: Mapping[str, LabelKind] | None = None, **settings: Any
) -> PublicSet:
    """A split of a public data set; all labels are wanted if none are named."""
    kind = public_set(name)
    if kinds is None:
        kinds = {label: allowed[0] for label, allowed in kind.label_kinds.items()}
    return kind(SETTINGS[name].model_validate({"name": name, "root": str(root), **settings}), split, kinds)
