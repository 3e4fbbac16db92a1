"""The images that a user names: files, folders, glob patterns and videos."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtl.config import SettingError
from mtl.data import DataError
from mtl.data.files.extras import from_extra
from mtl.data.files.folder import SUFFIXES as IMAGE_SUFFIXES
from mtl.runtime.text import hint

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")
_GLOB = frozenset("*?[")


@dataclass(frozen=True)
class Input:
    """An image to predict for.

    Attributes:
        file: Where it is; of a video, the whole of it.
        name: Under which its outputs are written, without a suffix: its path below the folder that was named.
        frame: Its number in a video; None of a file that is an image.
        image: "c h w", if it was decoded already.
    """

    file: Path
    name: str
    frame: int | None = None
    image: Tensor | None = None

    def __str__(self) -> str:
        return str(self.file) if self.frame is None else f"{self.file}, frame {self.frame}"


def find_inputs(named: Sequence[str]) -> list[Input]:
    """The files that were named, in order; a video is one of them.

    Args:
        named: Files, folders, of which all images are taken, and glob patterns.

    Raises:
        SettingError: One is not there, or has no image; or two would be written under one name.
    """
    found = [each for one in named for each in _of(one)]
    names = [each.name for each in found]
    # Two of one stem keep their suffixes.
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    found = [Input(each.file, f"{each.name}{each.file.suffix}") if each.name in twice else each for each in found]
    first: dict[str, Input] = {}
    for each in found:
        if each.name in first:
            raise SettingError(
                "FILES", f"{first[each.name].file} and {each.file} would both be written as {each.name}; name a folder"
            )
        first[each.name] = each
    return found


def _of(named: str) -> Iterator[Input]:
    path = Path(named)
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if _is_taken(each) and each.is_file())
        if not files:
            kinds = ", ".join([*IMAGE_SUFFIXES, *VIDEO_SUFFIXES])
            raise SettingError("FILES", f"{path} has no image and no video; they end in {kinds}")
        yield from (Input(file, str(file.relative_to(path).with_suffix(""))) for file in files)
    elif path.exists():
        yield Input(path, path.stem)
    elif _GLOB & set(named):
        files = sorted(Path(each) for each in glob.glob(named, recursive=True) if Path(each).is_file())  # noqa: PTH207
        if not files:
            raise SettingError("FILES", f"no file matches {named!r}")
        yield from (Input(file, file.stem) for file in files)
    else:
        there = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SettingError("FILES", f"{path}: no such file or folder{hint(path.name, there)}")


def _is_taken(file: Path) -> bool:
    return file.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)


def is_video(file: Path) -> bool:
    """Whether a file is a video, by its suffix."""
    return file.suffix.lower() in VIDEO_SUFFIXES


def frames(video: Input) -> Iterator[Input]:
    """The frames of a video as images, upright as they are stored.

    Raises:
        SettingError: The extra `video` is not installed.
        DataError: The file cannot be decoded.
    """
    with from_extra("video", f"{video.file}: a video needs PyAV, which is not installed", "FILES"):
        import av
    try:
        with av.open(str(video.file)) as container:
            if not container.streams.video:
                raise DataError(f"{video.file}: has no pictures")
            for number, frame in enumerate(container.decode(video=0)):
                pixels = np.ascontiguousarray(frame.to_ndarray(format="rgb24").transpose(2, 0, 1))
                yield Input(video.file, f"{video.name}/{number:06d}", number, torch.from_numpy(pixels))
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{video.file}: cannot be decoded: {error}") from error
