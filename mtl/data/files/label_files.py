"""Labels that lie in files of their own: masks, depths and normals."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mtl.config import SettingError
from mtl.data.files.blob import Readable
from mtl.data.files.reading import read_depth, read_mask, read_normals
from mtl.runtime.text import hint
from mtl.tasks.base import LabelKind

FILE_KINDS: tuple[LabelKind, ...] = ("mask", "depth", "normals")


def read_label(kind: LabelKind, file: Readable, scale: float) -> Tensor:
    """A label from its file.

    Args:
        kind: One of `FILE_KINDS`.
        file: Where it is.
        scale: Metres of one unit of a depth.

    Raises:
        DataError: It cannot be read.
    """
    if kind == "depth":
        return read_depth(file, scale)
    return read_mask(file) if kind == "mask" else read_normals(file)


def check_scale(scale: Mapping[str, float], kinds: Mapping[str, LabelKind]) -> None:
    """Raises `SettingError` if a key of `data.scale` is no label that is a depth."""
    depths = [label for label, kind in kinds.items() if kind == "depth"]
    for label in scale:
        if label not in depths:
            expected = f"expected a label that a task learns as a depth, {', '.join(depths)}" if depths else ""
            message = expected or "no task learns a depth, whose scale this is"
            raise SettingError(f"data.scale.{label}", message + hint(label, depths))
