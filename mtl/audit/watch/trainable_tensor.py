"""A parameter that is meant to train, and what was seen of it in a phase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl.audit.watch.frozen_tensor import is_wrapper, packed
from mtl.audit.watch.places import Place, is_readable, is_sparse, is_unmade
from mtl.runtime.fingerprint import fingerprint
from mtl.runtime.tensors import is_sharded, local

# A gradient that has shrunk so much is that of a parameter at its optimum.
_SHRUNK = 1e-3
# And one that was so small when it was first seen.
_SMALL = 1e-5


@dataclass
class Trainee:
    """A parameter that is meant to train.

    Attributes:
        place: Where it hangs.
        tensor: The parameter.
        digest: Its fingerprint when the phase began, or when it came.
        born: Steps of the phase that were done by then.
        was_fixed: Whether it required no gradient then.
        asked: Whether it has required a gradient at any look.
        had_gradient: Whether it has had one, were it all zeros.
        had_signal: Whether it has had one that was not all zeros.
        num_gradients: Looks at which it asked for a gradient and had one.
        last_gradient: The step of the last of them.
        longest_wait: The most steps between two of them, or before the first.
        last_digest: Its fingerprint when it was last taken.
        still_since: The step after which that was first found; it has had the same bits ever since.
        peak: The largest element of its gradient, of those looks that measured it.
        slope: The same at the last of them.
        last_slope: The same at the last of them where it was not zero.
        num_slopes: Looks at which it was measured and not zero.
        zero_since: The step since which its gradient has been zero at every look, if it is.
        longest_zero: The most steps for which it was so before.
        was_finite: Whether all of its elements were finite when the phase began.
    """

    place: Place
    tensor: Tensor
    digest: str
    born: int = 0
    was_fixed: bool = False
    asked: bool = False
    had_gradient: bool = False
    had_signal: bool = False
    num_gradients: int = 0
    last_gradient: int = 0
    longest_wait: int = 0
    last_digest: str = ""
    still_since: int = 0
    peak: float = 0.0
    slope: float | None = None
    last_slope: float = 0.0
    num_slopes: int = 0
    zero_since: int | None = None
    longest_zero: int = 0
    was_finite: bool = True

    def __post_init__(self) -> None:
        self.last_digest = self.digest
        self.still_since = self.last_gradient = self.born
        self.was_fixed = not self.tensor.requires_grad
        self.was_finite = is_unmade(self.tensor) or self.num_not_finite == 0

    def note_gradient(self, step: int) -> None:
        """Notes that it had a gradient in a step; the same step may be noted again."""
        if step > self.last_gradient:
            self.longest_wait = max(self.longest_wait, step - self.last_gradient)
            self.num_gradients, self.last_gradient = self.num_gradients + 1, step

    def note_slope(self, largest: float, step: int) -> None:
        """Notes how large its gradient is for a step; one that is NaN or infinite says nothing."""
        self.slope = largest if math.isfinite(largest) else None
        if self.slope:
            self.peak, self.last_slope = max(self.peak, self.slope), self.slope
            self.num_slopes += 1
        if largest != 0 and self.zero_since is not None:
            self.longest_zero, self.zero_since = max(self.longest_zero, step - self.zero_since), None
        elif largest == 0 and self.zero_since is None:
            self.zero_since = step

    def note_bytes(self, content: Tensor, step: int) -> None:
        """Notes its bytes as they were after a step."""
        if (digest := fingerprint(content)) != self.last_digest:
            self.last_digest, self.still_since = digest, step

    @property
    def num_not_finite(self) -> int:
        """How many of its elements are NaN or infinite."""
        here = content_of(self.tensor).detach()
        return int(here.numel() - here.isfinite().sum()) if here.numel() else 0

    @property
    def is_stray(self) -> bool:
        """Whether it is a plain tensor, or in a Python list: it may be meant to train, or to be left alone."""
        return self.place.hidden or self.place.kind == "attr"

    @property
    def is_at_its_optimum(self) -> bool:
        """Whether its gradient has shrunk to next to nothing over several looks; one that is cut off has not."""
        return self.slope is not None and self.last_slope <= max(_SHRUNK * self.peak, _SMALL)

    def state(self) -> dict[str, Any]:
        """What was seen of it, as plain data."""
        is_there = self.place.look() is self.tensor
        seen = {key: value for key, value in vars(self).items() if key not in ("place", "tensor")}
        # One that was replaced will not be there in another process: whether it changed is known by now.
        return seen | {"left_changed": None if is_there else digest_of(self.tensor) != self.digest}

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Goes on from what was seen of it in another process."""
        seen = dict(state)
        left_changed = seen.pop("left_changed")
        self.last_digest = seen["digest"]
        vars(self).update(seen)
        if left_changed is not None:
            # In the place of the one that is gone, which neither hangs anywhere nor moves any more.
            self.tensor = torch.empty(0, device="cpu")
            self.digest = "" if left_changed else digest_of(self.tensor)


def content_of(tensor: Tensor) -> Tensor:
    """What this process has of a parameter, as one tensor with bytes."""
    here = local(tensor)
    return packed(here) if is_wrapper(here) else here


def digest_of(tensor: Tensor) -> str:
    """A parameter's fingerprint; none of one that a lazy module has yet to make."""
    return "" if is_unmade(tensor) else fingerprint(content_of(tensor))


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
    return tensor is not None and is_sharded(tensor) and tensor.numel() > 0 and not local(tensor).numel()
