"""The memory and the disk space that a data set needs, checked before any of it is made."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from mtl.config import SettingError
from mtl.data.cache import Shape
from mtl.runtime.text import in_bytes

# Of each tensor of some images: its shape, and the bytes of one element.
Stored = Mapping[str, tuple[Shape, int]]


def stored_bytes(stored: Stored) -> int:
    return sum(math.prod(shape) * width for shape, width in stored.values())


def machine_memory() -> int | None:
    """The most memory and swap that a process can have on this machine, in bytes; None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {key: 1024 * int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
        total = sizes["MemTotal"] + sizes["SwapTotal"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    # A container has less.
    limit = Path("/sys/fs/cgroup/memory.max")
    try:
        return min(total, int(limit.read_text(encoding="ascii")))
    except (OSError, ValueError):
        return total


def check_image(image_size: tuple[int, int]) -> None:
    """Raises `SettingError` if not even one image, as the trunk takes it, fits into memory."""
    needed, memory = 3 * 4 * math.prod(image_size), machine_memory()
    if memory is not None and needed > memory:
        raise SettingError(
            "data.image_size",
            f"one image of {_pixels(image_size)} takes {in_bytes(needed)} in the trunk,"
            f" and this machine has {in_bytes(memory)} of memory",
        )


def check_memory(key: str, image_size: tuple[int, int], num: int, needed: int) -> None:
    """Raises `SettingError` if images do not fit into memory.

    Args:
        key: The setting to blame.
        image_size: Their height and width in pixels.
        num: How many there are.
        needed: The bytes that they take with their labels, as far as is known.
    """
    memory = machine_memory()
    if memory is not None and needed > memory:
        raise SettingError(
            key,
            f"{num:,} images of {_pixels(image_size)} with their labels take {in_bytes(needed)} of memory,"
            f" and this machine has {in_bytes(memory)} of memory",
        )


def check_disk(key: str, image_size: tuple[int, int], num: int, num_bytes: int, folder: Path) -> None:
    """Raises `SettingError` if the data does not fit on the disk of the data cache.

    Args:
        key: The setting to blame.
        image_size: Height and width of the images in pixels.
        num: Number of images.
        num_bytes: What they take with their labels.
        folder: That of the data cache, which need not exist.
    """
    there = next((each for each in [folder, *folder.absolute().parents] if each.is_dir()), None)
    if there is None:
        return
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise SettingError(
            key,
            f"{num:,} images of {_pixels(image_size)} with their labels take {in_bytes(num_bytes)} in the data cache"
            f" {folder}, and {in_bytes(free)} are free there; another disk: data.cache_dir",
        )


def _pixels(image_size: tuple[int, int]) -> str:
    return f"{image_size[0]:,} x {image_size[1]:,} pixels"
