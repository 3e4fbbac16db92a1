"""Fingerprints: exact, position-sensitive digests of tensors, of files, and of plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from mtl.runtime.tensors import byte_view


def fingerprint(tensor: Tensor) -> str:
    """The XXH3-128 digest of a tensor's type, shape and bytes, in hexadecimal.

    It sees what `==` does not (the sign of zero) and is not disturbed by what `==` trips over (NaN). Elements are taken
    in logical order: the memory format does not matter.
    """
    data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    digest = xxhash.xxh3_128(f"{data.dtype} {tuple(data.shape)}".encode())
    if data.numel():
        digest.update(byte_view(data).numpy().data)
    return digest.hexdigest()


def fingerprint_of_parts(parts: Iterable[Tensor], length: int) -> str:
    """`fingerprint` of a tensor that is never there as a whole.

    Args:
        parts: Its parts along the first axis, on the CPU, at least one.
        length: That of its first axis.
    """
    digest = xxhash.xxh3_128()
    for number, part in enumerate(parts):
        if number == 0:
            digest.update(f"{part.dtype} {(length, *part.shape[1:])}".encode())
        digest.update(byte_view(part.contiguous()).numpy().data)
    return digest.hexdigest()


def root(fingerprints: Mapping[str, str]) -> str:
    """One digest of many named fingerprints, whatever their order."""
    digest = xxhash.xxh3_128()
    for name in sorted(fingerprints):
        digest.update(f"{name}\0{fingerprints[name]}\n".encode())
    return digest.hexdigest()


def fingerprint_of_json(content: Any) -> str:
    """The XXH3-128 digest of plain data as JSON, whatever the order of its keys."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def fingerprint_of_file(file: Path) -> str:
    """The XXH3-128 digest of a file's bytes, in constant memory.

    Raises:
        OSError: The file cannot be read.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
