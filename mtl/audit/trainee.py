"""A parameter that is meant to train, and what was seen of it in a phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl.audit.fingerprint import fingerprint
from mtl.audit.places import Place, is_readable, is_sparse, is_unmade
from mtl.storage import is_spread, local


@dataclass
class Trainee:
    """A parameter that is meant to train.

    Attributes:
        place: Where it hangs.
        tensor: The parameter.
        digest: Its fingerprint when the phase began.
        asked: Whether it has required a gradient at any look.
        had_gradient: Whether it has had one, were it all zeros.
        had_signal: Whether it has had one that was not all zeros.
        num_gradients: Steps in which it asked for a gradient and had one.
        last_gradient: The last of them.
        longest_wait: The most steps between two of them, or before the first.
    """

    place: Place
    tensor: Tensor
    digest: str
    asked: bool = False
    had_gradient: bool = False
    had_signal: bool = False
    num_gradients: int = 0
    last_gradient: int = 0
    longest_wait: int = 0

    def note_gradient(self, step: int) -> None:
        """Notes that it had a gradient in a step; the same step may be noted again."""
        if step > self.last_gradient:
            self.longest_wait = max(self.longest_wait, step - self.last_gradient)
            self.num_gradients, self.last_gradient = self.num_gradients + 1, step

    @property
    def is_stray(self) -> bool:
        """Whether it is a plain tensor, or in a Python list: it may be meant to train, or to be left alone."""
        return self.place.hidden or self.place.kind == "attr"

    def state(self) -> dict[str, Any]:
        """What was seen of it, as plain data."""
        is_there = self.place.look() is self.tensor
        return {
            "digest": self.digest,
            "asked": self.asked,
            "had_gradient": self.had_gradient,
            "had_signal": self.had_signal,
            "num_gradients": self.num_gradients,
            "last_gradient": self.last_gradient,
            "longest_wait": self.longest_wait,
            # One that was replaced will not be there in another process: whether it changed is known by now.
            "left_changed": None if is_there else digest_of(self.tensor) != self.digest,
        }

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Goes on from what was seen of it in another process."""
        seen = dict(state)
        left_changed = seen.pop("left_changed")
        vars(self).update(seen)
        if left_changed is not None:
            # In the place of the one that is gone, which neither hangs anywhere nor moves any more.
            self.tensor = torch.empty(0, device="cpu")
            self.digest = "" if left_changed else digest_of(self.tensor)


def digest_of(tensor: Tensor) -> str:
    """A parameter's fingerprint; none of one that a lazy module has yet to make."""
    return "" if is_unmade(tensor) else fingerprint(local(tensor))


def can_train(place: Place, tensor: Tensor) -> bool:
    """Whether a tensor may be meant to train; whole numbers are not, and plain tensors only if they say so."""
    if is_unmade(tensor):
        return place.kind == "param"
    if not is_readable(tensor) or is_sparse(tensor) or not local(tensor).numel():
        return False
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    if place.kind == "param" and not place.hidden:
        return True
    return place.kind != "buffer" and tensor.requires_grad and tensor.is_leaf


def is_elsewhere(tensor: Tensor | None) -> bool:
    """Whether other processes have all of a tensor that is spread over them."""
    return tensor is not None and is_spread(tensor) and tensor.numel() > 0 and not local(tensor).numel()
