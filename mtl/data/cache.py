"""Generated data on disk: made once, keyed by everything that defines it, checked when read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from mtl.checkpoint.tensor_file import read_header
from mtl.runtime.console import logger
from mtl.runtime.files import dead_link, read_json
from mtl.runtime.fingerprint import fingerprint_of_file

Shape = tuple[int, ...]

_TENSORS, _CARD = "data.safetensors", "card.json"


class DataError(ValueError):
    """Data that is missing, damaged, or does not fit the tasks."""


def default_cache_dir() -> Path:
    """MTL_CACHE_DIR, else `mtl` in the user's cache directory."""
    own = os.environ.get("MTL_CACHE_DIR")
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(user) / "mtl"


class _DamagedError(Exception):
    """An entry that is not what was written."""


def entry_of(folder: Path, key: Mapping[str, Any]) -> Path:
    """Where the tensors of a key are kept."""
    digest = xxhash.xxh3_64_hexdigest(json.dumps(key, sort_keys=True).encode())
    return folder / f"{key['name']}-{key['split']}-{digest}"


def cached(folder: Path, key: Mapping[str, Any], shapes: Mapping[str, Shape], make: Callable[[Path], None]) -> Path:
    """The file of tensors that were made before, or are made now; a damaged one is made again, with a warning.

    Args:
        folder: The cache directory.
        key: Everything that the tensors depend on, as JSON; it is written next to them.
        shapes: The shape of each tensor.
        make: Makes the tensors and writes them to a file.

    Raises:
        DataError: The folder cannot be written, or what was just written cannot be read.
    """
    entry = entry_of(folder, key)
    if entry.exists() or entry.is_symlink():
        try:
            return _checked(entry, key, shapes)
        except _DamagedError as error:
            logger.warning(f"the data cache {entry} is damaged ({error}): the data is made again")
            _remove(entry)
    _write(entry, key, make)
    try:
        return _checked(entry, key, shapes)
    except _DamagedError as error:
        raise DataError(
            f"the data cache {entry} is not what was written a moment ago ({error}); set data.cache_dir to another disk"
        ) from error


def _remove(entry: Path) -> None:
    try:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    except FileNotFoundError:
        pass  # another process was first
    except OSError as error:
        raise DataError(
            f"the damaged data cache {entry} cannot be removed: {error.strerror}; remove it, or set data.cache_dir"
        ) from error


def _write(entry: Path, key: Mapping[str, Any], make: Callable[[Path], None]) -> None:
    """Writes an entry under another name and renames it: it is there whole or not at all."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    except OSError as error:
        why = f"{error.strerror}{dead_link(entry.parent)}"
        raise DataError(f"the data cache {entry.parent} cannot be written: {why}; set data.cache_dir") from error
    try:
        make(temporary / _TENSORS)
        card = {"key": dict(key), "checksum": fingerprint_of_file(temporary / _TENSORS)}
        (temporary / _CARD).write_text(json.dumps(card, indent=2))
        temporary.rename(entry)
    except OSError as error:
        # Another process may have been first; its entry is the same.
        if not entry.exists():
            raise DataError(f"the data cache {entry} cannot be written: {error}; set data.cache_dir") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checked(entry: Path, key: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Path:
    """Raises `_DamagedError` if a byte, a name or a shape is another one than was written."""
    try:
        card = read_json(entry / _CARD)
        checksum, written = card["checksum"], card["key"]
        if checksum != fingerprint_of_file(entry / _TENSORS):
            raise _DamagedError("its bytes are not those that were written")
        found = {name: own.shape for name, own in read_header(entry / _TENSORS).items()}
    except PermissionError as error:
        raise DataError(f"the data cache {entry} cannot be read: {error.strerror}; set data.cache_dir") from error
    except OSError as error:
        raise _DamagedError(f"{entry.name}: {error.strerror or error}") from error
    except (ValueError, KeyError) as error:
        raise _DamagedError(str(error) or type(error).__name__) from error
    if written != key or found != dict(shapes):
        raise _DamagedError(f"it holds {found}, expected {dict(shapes)}" if written == key else "it is of other data")
    return entry / _TENSORS
