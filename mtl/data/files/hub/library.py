"""Loads data sets by Hugging Face's `datasets`, an extra: without progress bars, code of others, or pickles."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mtl.config import SettingError
from mtl.config.hub_data import HuggingFaceData
from mtl.data.files.extras import from_extra
from mtl.runtime.fingerprint import fingerprint_of_json

_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
# Folders of the library's cache around a file that tell what it was made from: builder, configuration, version, hash.
_NUM_TELLING = 5


@dataclass(frozen=True)
class Loaded:
    """The splits of a data set, mapped into memory.

    Attributes:
        splits: `datasets.Dataset`s by their names.
        digests: Another one whenever a split's data is.
        folders: Where images that lie in files of their own may do so.
    """

    splits: Mapping[str, Any]
    digests: Mapping[str, str]
    folders: tuple[Path, ...]


def library() -> ModuleType:
    """The package; raises `SettingError` if it is not installed."""
    with from_extra("datasets", "huggingface needs datasets", "data.name"):
        import datasets
    module: ModuleType = datasets
    return module


def load_splits(settings: HuggingFaceData) -> Loaded:
    """Opens a data set; what is not saved or cached yet is prepared in the library's cache.

    Raises:
        SettingError: It cannot be had.
    """
    datasets = library()
    place = Path(settings.path).expanduser()
    is_saved = (place / "dataset_dict.json").is_file() or (place / "state.json").is_file()
    if is_saved and settings.config is not None:
        raise SettingError("data.config", f"{place} was written by save_to_disk, which keeps one configuration")
    with _quiet(datasets):
        try:
            loaded = _load(datasets, settings, place, is_saved)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
            why = _innermost(error)
            key = "data.config" if "BuilderConfig" in why or "Config name" in why else "data.path"
            raise SettingError(key, f"{settings.path}: {why}") from error
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "train"): loaded}
    if not isinstance(loaded, dict):
        raise SettingError("data.path", f"{settings.path}: expected splits, got {type(loaded).__name__}")
    digests = {name: _digest(split, is_saved) for name, split in loaded.items()}
    own = [place if place.is_dir() else place.parent] if place.exists() else []
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME)
    return Loaded(loaded, digests, tuple(map(Path, (*own, *caches))))


def _load(datasets: ModuleType, settings: HuggingFaceData, place: Path, is_saved: bool) -> Any:
    if is_saved:
        # Copied into memory by an environment variable, it would be read whole, and belong to no file.
        return datasets.load_from_disk(str(place), keep_in_memory=False)
    options: dict[str, Any] = {"name": settings.config, "keep_in_memory": False}
    if place.is_dir():
        return datasets.load_dataset(str(place.resolve()), **options)
    if place.is_file():
        if place.suffix.lower() not in (".parquet", ".pq"):
            raise ValueError("expected a folder, or a file that ends in .parquet")
        files = {"train": glob.escape(str(place.resolve()))}
        return datasets.load_dataset("parquet", data_files=files, **options)
    if not _ON_THE_HUB.fullmatch(settings.path):
        raise ValueError("no such file or folder; a data set of the hub is named owner/name")
    return datasets.load_dataset(settings.path, **options)


@contextmanager
def _quiet(datasets: ModuleType) -> Iterator[None]:
    """No progress bars and no log lines; as it was afterwards."""
    logging = datasets.utils.logging
    had_bars, level = not datasets.are_progress_bars_disabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            datasets.enable_progress_bars()


def _innermost(error: BaseException) -> str:
    """Why it failed: an error that was raised from another one says less than that."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _digest(split: Any, is_saved: bool) -> str:
    """Of the fingerprint that was saved with the data, and its files; of a cache, whose paths tell what it was made of.

    A cache that is made again has other times and the same data.
    """
    files = []
    for path in (Path(each["filename"]) for each in split.cache_files):
        status = path.stat()
        own = [path.name, status.st_size, status.st_mtime_ns]
        files.append(own if is_saved else [path.parts[-_NUM_TELLING:], status.st_size])
    return fingerprint_of_json([split._fingerprint if is_saved else "", files])
