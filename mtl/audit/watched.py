"""A frozen tensor, and how it was when its phase began."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl.audit.contract import Place
from mtl.audit.fingerprint import fingerprint


class Watched:
    """A frozen tensor as it was when the phase began.

    Attributes:
        place: Where it hangs.
        tensor: The tensor itself.
        digest: Its fingerprint then.
    """

    def __init__(self, place: Place, tensor: Tensor, keep: bool) -> None:
        """Args:
        place: Where it hangs.
        tensor: The tensor.
        keep: Whether to keep a copy, from which it can be put back.
        """
        self.place = place
        self.tensor = tensor
        self.digest = fingerprint(tensor)
        self._original = tensor.detach().clone() if keep else None
        self._address, self._version = tensor.data_ptr(), _version(tensor)

    def shows_a_sign(self) -> bool:
        """Whether it may have been written to: a reason to look at its bytes, not a verdict."""
        return self.tensor.data_ptr() != self._address or _version(self.tensor) != self._version

    def has_changed(self) -> bool:
        """Compares its bytes with those it began with."""
        self._address, self._version = self.tensor.data_ptr(), _version(self.tensor)
        return fingerprint(self.tensor) != self.digest

    def put_back(self) -> None:
        """Gives it the bits it began with, and no gradient."""
        if self._original is None:
            return
        if self.tensor.is_leaf and self.tensor.requires_grad:
            self.tensor.requires_grad_(False)
        self.tensor.grad = None
        if fingerprint(self.tensor) != self.digest:
            with torch.no_grad():
                self.tensor.copy_(self._original)
        self._address, self._version = self.tensor.data_ptr(), _version(self.tensor)


def _version(tensor: Tensor) -> int:
    """How often a tensor has been written to, as far as torch counts; tensors of inference mode are not counted."""
    return 0 if tensor.is_inference() else tensor._version
