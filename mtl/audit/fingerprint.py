"""Fingerprints: exact, position-sensitive digests of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor


def fingerprint(tensor: Tensor) -> str:
    """The XXH3-128 digest of a tensor's type, shape and bytes, in hexadecimal.

    It sees what `==` does not (the sign of zero) and is not disturbed by what `==` trips over (NaN). Elements are taken
    in logical order: the memory format does not matter.
    """
    data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    digest = xxhash.xxh3_128(f"{data.dtype} {tuple(data.shape)}".encode())
    if data.numel():
        # reshape(-1): a tensor without axes cannot be viewed as another type.
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def root(fingerprints: Mapping[str, str]) -> str:
    """One digest of many named fingerprints, whatever their order."""
    digest = xxhash.xxh3_128()
    for name in sorted(fingerprints):
        digest.update(f"{name}\0{fingerprints[name]}\n".encode())
    return digest.hexdigest()
