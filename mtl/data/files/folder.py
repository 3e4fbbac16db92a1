"""Data sets of folders: a folder for each class, or images with folders of masks next to them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl.config import SettingError
from mtl.config.file_data import FolderData, SplitName
from mtl.data.cache import DataError
from mtl.data.files.fileset import IMAGE, FileSet
from mtl.data.files.label_files import FILE_KINDS, check_scale, read_label
from mtl.data.files.mistakes import Mistakes
from mtl.data.files.paths import wrong_paths
from mtl.data.files.reading import inside, read_image
from mtl.tasks.base import LabelKind

CLASS = "class"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".npy")


def folder_labels(settings: FolderData, wanted: Collection[str]) -> tuple[str, ...]:
    """The names of the labels: those of the folders of masks; or the class, by the name of the only label wanted.

    Args:
        settings: Where the folders are.
        wanted: The labels that tasks learn.
    """
    if settings.masks is not None:
        return tuple(settings.masks)
    return tuple(set(wanted)) if len(set(wanted)) == 1 else (CLASS,)


class Folder(FileSet):
    """One split of a data set of folders; only files whose names end in one of `SUFFIXES` are images."""

    def __init__(self, settings: FolderData, split: SplitName, kinds: Mapping[str, LabelKind]) -> None:
        """Lists the files; none is opened.

        Args:
            settings: Where the folders are.
            split: Which split.
            kinds: What each label is.

        Raises:
            DataError: The folders do not fit the labels or each other: everything that is wrong, in a line each.
            SettingError: There is no such split; a key of `scale` is no depth.
        """
        if split not in settings.places:
            raise SettingError(f"data.{split}", "this split is required here")
        check_scale(settings.scale, kinds)
        self._root = Path(settings.places[split]).expanduser()
        self._outside, self._kinds, self._scale = settings.outside, dict(kinds), settings.scale
        self.labels = tuple(kinds)
        self._class_of: list[int] | None = None
        self._label_files: dict[str, list[Path | None]] = {}
        mistakes = Mistakes()
        _check_labels(settings, kinds, mistakes)
        mistakes.check()
        if settings.masks is None:
            classes = _classes(Path(settings.train).expanduser(), mistakes)
            mistakes.check()
            self._images, self._class_of = _by_class(self._root, classes, mistakes)
            self.classes = dict.fromkeys(kinds, classes)
        else:
            by_stem = _by_stem(self._root / (settings.images or ""), mistakes)
            self._images = list(by_stem.values())
            for label in kinds:
                self._label_files[label] = _files_of_label(by_stem, self._root / settings.masks[label], label, mistakes)
        mistakes.check()

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int, names: Collection[str]) -> dict[str, Any]:
        item: dict[str, Tensor] = {}
        files = self.files(index)
        for name in names:
            if name == IMAGE:
                item[name] = read_image(files[name])
            elif self._class_of is not None:
                item[name] = torch.tensor(self._class_of[index])
            elif name in files:
                item[name] = read_label(self._kinds[name], files[name], self._scale.get(name, 1.0))
        return item

    def files(self, index: int) -> Mapping[str, Path]:
        there = {label: file for label, files in self._label_files.items() if (file := files[index]) is not None}
        return {name: self._allowed(file) for name, file in {IMAGE: self._images[index], **there}.items()}

    def column(self, label: str) -> Tensor | None:
        if self._class_of is None or label not in self.labels:
            return None
        return torch.tensor(self._class_of, dtype=torch.float64)

    def where(self, index: int) -> str:
        return str(self._images[index])

    def _allowed(self, file: Path) -> Path:
        """The file; raises `DataError` if a link leads out of the split's folder, and may not."""
        if self._outside:
            return file
        try:
            return inside(self._root, str(file.relative_to(self._root)))
        except (ValueError, RuntimeError) as error:  # of a link, or a circle of them
            raise DataError(f"{file}: leads out of {self._root}; data.outside=true allows it") from error


def _check_labels(settings: FolderData, kinds: Mapping[str, LabelKind], mistakes: Mistakes) -> None:
    there = folder_labels(settings, kinds)
    expected = FILE_KINDS if settings.masks is not None else (CLASS,)
    for label, kind in kinds.items():
        if label not in there:
            mistakes.add(f"the data set has no label {label!r}; it has {', '.join(there)}", label, there, label)
        elif kind not in expected:
            what = f"the label {label!r} is a {' or '.join(expected)} here, and the task learns {kind}"
            mistakes.add(what, label=label)
    names = [*([settings.images] if settings.images else []), *(settings.masks or {}).values()]
    for _, what in wrong_paths(names, settings.outside):
        mistakes.add(what)


def _classes(root: Path, mistakes: Mistakes) -> tuple[str, ...]:
    """The sorted names of the folders in that of the training split."""
    names = tuple(sorted(folder.name for folder in _folders(root, mistakes)))
    if not names and not len(mistakes):
        mistakes.add(f"{root}: expected a folder for each class, got none")
    return names


def _by_class(root: Path, classes: tuple[str, ...], mistakes: Mistakes) -> tuple[list[Path], list[int]]:
    """The images of a split, and the class of each."""
    images, class_of = [], []
    for folder in sorted(_folders(root, mistakes)):
        found = list(_files(folder, mistakes))
        if folder.name not in classes:
            mistakes.add(f"{folder}: class {folder.name!r} is never seen in training", folder.name, classes)
            continue
        if not found:
            mistakes.add(f"{folder}: expected an image, got none")
        images += found
        class_of += [classes.index(folder.name)] * len(found)
    if not images and not len(mistakes):
        mistakes.add(f"{root}: expected a folder with images for each class, got none")
    return images, class_of


def _folders(root: Path, mistakes: Mistakes) -> list[Path]:
    try:
        return [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        mistakes.add(f"{root}: {error.strerror}")
        return []


def _files(folder: Path, mistakes: Mistakes) -> Iterator[Path]:
    """The images in a folder and in those in it, sorted by their paths."""

    def record(error: OSError) -> None:
        mistakes.add(f"{error.filename}: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=record):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(place, name)


def _by_stem(folder: Path, mistakes: Mistakes) -> dict[str, Path]:
    """The files by their paths in the folder without the suffix, which are those of one image."""
    found: dict[str, Path] = {}
    before = len(mistakes)
    for file in _files(folder, mistakes):
        stem = file.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            mistakes.add(f"{file}: {found[stem].name} has the same name; expected one file for each image")
        found[stem] = file
    if not found and len(mistakes) == before:
        mistakes.add(f"{folder}: expected files that end in {', '.join(SUFFIXES)}, got none")
    return dict(sorted(found.items()))


def _files_of_label(images: Mapping[str, Path], folder: Path, label: str, mistakes: Mistakes) -> list[Path | None]:
    """The file of a label of each image; None if it has none."""
    files = _by_stem(folder, mistakes)
    for stem, file in files.items():
        if images and stem not in images:
            mistakes.add(f"{file}: {label} of no image", stem, images)
    return [files.get(stem) for stem in images]
