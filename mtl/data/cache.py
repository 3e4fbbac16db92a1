"""Generated data on disk: made once, keyed by everything that defines it, checked when read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSORS, _CARD = "data.safetensors", "card.json"


class DataError(ValueError):
    """Data that is missing, damaged, or does not fit the tasks."""


def default_cache_dir() -> Path:
    """MTL_CACHE_DIR, else `mtl` in the user's cache directory."""
    own = os.environ.get("MTL_CACHE_DIR")
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(user) / "mtl"


def cached(folder: Path, key: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Reads tensors that were made before, or makes and keeps them.

    Args:
        folder: The cache directory.
        key: Everything that the tensors depend on, as JSON; it is kept beside them.
        make: Makes the tensors.

    Raises:
        DataError: What is there is damaged, or the folder cannot be written.
    """
    digest = xxhash.xxh3_64_hexdigest(json.dumps(key, sort_keys=True).encode())
    entry = folder / f"{key['name']}-{key['split']}-{digest}"
    if not entry.exists():
        _write(entry, key, make())
    return _read(entry)


def _write(entry: Path, key: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes an entry under another name and renames it: it is there whole or not at all."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    except OSError as error:
        raise DataError(f"the data cache {entry.parent} cannot be written: {error}; set data.cache_dir") from error
    try:
        save_file(tensors, temporary / _TENSORS)
        card = {"key": key, "checksum": _checksum(temporary / _TENSORS)}
        (temporary / _CARD).write_text(json.dumps(card, indent=2))
        temporary.rename(entry)
    except (OSError, SafetensorError) as error:
        # Another process may have been first; its entry is the same.
        if not entry.exists():
            raise DataError(f"the data cache {entry} cannot be written: {error}; set data.cache_dir") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(entry: Path) -> dict[str, Tensor]:
    try:
        checksum = json.loads((entry / _CARD).read_text())["checksum"]
        if checksum != _checksum(entry / _TENSORS):
            raise ValueError("its bytes are not those that were written")
        return load_file(entry / _TENSORS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(
            f"the data cache {entry} is damaged ({error}); remove that folder and the data is made again"
        ) from error


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
