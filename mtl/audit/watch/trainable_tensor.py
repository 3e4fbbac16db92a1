"""A trainable tensor, and the record of its gradients and bytes in a phase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl.audit.watch.frozen_tensor import is_wrapper, packed
from mtl.audit.watch.places import TensorPlace, is_readable, is_sparse, is_uninitialized
from mtl.runtime.fingerprint import fingerprint
from mtl.runtime.tensors import is_sharded, local

# A parameter is at its optimum if its gradient has shrunk to this share of its peak, or to this size.
_SHRUNK = 1e-3
_SMALL = 1e-5


@dataclass
class TrainableTensor:
    """A trainable tensor; its attributes but the first two are keys of the state on disk.

    Attributes:
        place: The module and key under which it is registered.
        tensor: The tensor.
        digest: Its fingerprint when the phase began, or when it was added.
        born: The phase's steps at that time.
        was_fixed: Whether it required no gradient at that time.
        asked: Whether it has required a gradient at any check.
        had_gradient: Whether it has had a gradient, even one of zeros.
        had_signal: Whether it has had a gradient that was not all zeros.
        num_gradients: Steps at which it required a gradient and had one.
        last_gradient: The last of these steps.
        longest_wait: The most steps between two of them, or before the first.
        last_digest: The fingerprint of the last read.
        still_since: The step after which that fingerprint was first read; the bits are the same ever since.
        peak: The largest absolute element of its gradient over all measurements.
        slope: The same at the last measurement; None if it was not finite.
        last_slope: The same at the last measurement that was not zero.
        num_slopes: Measurements that were not zero.
        zero_since: The step since which its gradient has been zero at every measurement, if it is.
        longest_zero: The most steps for which it was zero before.
        was_finite: Whether all of its elements were finite when the phase began.
    """

    place: TensorPlace
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
        self.was_finite = is_uninitialized(self.tensor) or self.num_not_finite == 0

    def record_gradient(self, step: int) -> None:
        """Records that it had a gradient in a step; the same step may be recorded again."""
        if step > self.last_gradient:
            self.longest_wait = max(self.longest_wait, step - self.last_gradient)
            self.num_gradients, self.last_gradient = self.num_gradients + 1, step

    def record_slope(self, largest: float, step: int) -> None:
        """Records the largest absolute element of its gradient; ignored if it is NaN or infinite."""
        self.slope = largest if math.isfinite(largest) else None
        if self.slope:
            self.peak, self.last_slope = max(self.peak, self.slope), self.slope
            self.num_slopes += 1
        if largest != 0 and self.zero_since is not None:
            self.longest_zero, self.zero_since = max(self.longest_zero, step - self.zero_since), None
        elif largest == 0 and self.zero_since is None:
            self.zero_since = step

    def record_bytes(self, content: Tensor, step: int) -> None:
        """Records its bytes after a step."""
        if (digest := fingerprint(content)) != self.last_digest:
            self.last_digest, self.still_since = digest, step

    @property
    def num_not_finite(self) -> int:
        """How many of its elements are NaN or infinite."""
        here = content_of(self.tensor).detach()
        return int(here.numel() - here.isfinite().sum()) if here.numel() else 0

    @property
    def is_unregistered(self) -> bool:
        """Whether it is a plain tensor, or in a Python list: torch does not know whether it is to train."""
        return self.place.is_hidden or self.place.kind == "attr"

    @property
    def is_at_its_optimum(self) -> bool:
        """Whether its gradient has shrunk to nearly zero; a parameter that is cut off from the loss is not."""
        return self.slope is not None and self.last_slope <= max(_SHRUNK * self.peak, _SMALL)

    def state_dict(self) -> dict[str, Any]:
        """The record as plain data."""
        is_there = self.place.current() is self.tensor
        record = {key: value for key, value in vars(self).items() if key not in ("place", "tensor")}
        # A replaced tensor does not exist in another process: whether it changed is decided now.
        return record | {"left_changed": None if is_there else digest_of(self.tensor) != self.digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the record of another process."""
        record = dict(state)
        left_changed = record.pop("left_changed")
        self.last_digest = record["digest"]
        vars(self).update(record)
        if left_changed is not None:
            # A placeholder for the replaced tensor, which is registered nowhere and does not change any more.
            self.tensor = torch.empty(0, device="cpu")
            self.digest = "" if left_changed else digest_of(self.tensor)


def content_of(tensor: Tensor) -> Tensor:
    """This rank's shard of a parameter, or all of it, as one tensor with bytes."""
    here = local(tensor)
    return packed(here) if is_wrapper(here) else here


def digest_of(tensor: Tensor) -> str:
    """A parameter's fingerprint; empty if a lazy module has not created it yet."""
    return "" if is_uninitialized(tensor) else fingerprint(content_of(tensor))


def can_train(place: TensorPlace, tensor: Tensor) -> bool:
    """Whether a tensor is trainable: a floating-point parameter, or a plain tensor that requires a gradient."""
    if is_uninitialized(tensor):
        return place.kind == "param"
    if not is_readable(tensor) or is_sparse(tensor) or not local(tensor).numel():
        return False
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    if place.kind == "param" and not place.is_hidden:
        return True
    return place.kind != "buffer" and tensor.requires_grad and tensor.is_leaf


def is_on_other_ranks_only(tensor: Tensor | None) -> bool:
    """Whether this rank's shard of a sharded tensor is empty."""
    return tensor is not None and is_sharded(tensor) and tensor.numel() > 0 and not local(tensor).numel()
