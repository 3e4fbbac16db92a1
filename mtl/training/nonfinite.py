"""Steps whose loss or gradient is NaN or infinite: the error, and how such a step is undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.optim.balance.balance import Balance
from mtl.runtime.rng import random_state, set_random_state
from mtl.runtime.tensors import by_sharding, full_tensor, is_sharded

# Gradients of which it is cheap to see that they are of one kind.
_FEW = 16


class NotFiniteError(FloatingPointError):
    """A loss or gradient that is not finite.

    Attributes:
        fact: What is not finite, without advice.
        what: The metric that is not.
        step: The step.
        indices: The places of the images it came from, in the training split.
    """

    def __init__(self, what: str, value: float, step: int, phase: str, indices: Sequence[int]) -> None:
        self.fact = f"{what} is {value} at step {step} of phase {phase!r}"
        super().__init__(
            f"{self.fact}; a lower learning rate or fp32 precision may help, and not_finite=skip leaves such steps out"
        )
        self.what, self.step, self.indices = what, step, list(indices)

    def to_json(self, epoch: int) -> dict[str, Any]:
        """The content of `not_finite.json`."""
        return {"what": self.what, "step": self.step, "epoch": epoch, "indices": self.indices}


class StepGuard:
    """Records what the forward of a step changes, so that a step can be skipped as if it had not been tried."""

    def __init__(self, root: nn.Module, balance: Balance) -> None:
        self._balance = balance
        self._buffers = [buffer for buffer in root.buffers() if buffer.is_floating_point() or buffer.numel() == 1]

    def before(self) -> None:
        """Call before the first forward of a step."""
        self._before = [buffer.clone() for buffer in self._buffers]
        self._memory = self._balance.state()
        self._random = random_state(self._device())

    @torch.no_grad()
    def undo(self) -> None:
        """Puts running statistics, the balancing method's state, and random numbers back."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            # What is frozen is not even written to.
            if not torch.equal(buffer, before):
                buffer.copy_(before)
        self._balance.load_state(self._memory, self._device())
        set_random_state(self._random, self._device())

    def _device(self) -> torch.device:
        return self._buffers[0].device if self._buffers else torch.device("cpu")


def is_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all losses and norms are numbers; waits for the device."""
    return bool(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).isfinite().all())


def gradient_norm(parameters: Sequence[nn.Parameter], clip_norm: float | None) -> Tensor:
    """The norm of all gradients, a scalar; they are scaled down to `clip_norm`, if that is given."""
    if all(each.grad is None for each in parameters):
        # Not that of an empty list, which would be on the CPU.
        return torch.zeros((), device=parameters[0].device if parameters else None)
    if any(is_sharded(parameter) for parameter in parameters):
        return _norm_of_shards([each for each in parameters if each.grad is not None], clip_norm)
    if clip_norm is not None:
        return nn.utils.clip_grad_norm_(parameters, clip_norm)
    return total_norm([each.grad for each in parameters if each.grad is not None])


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all of some gradients, at least one: `nn.utils.get_total_norm`, to the bit.

    A few small ones of one kind need not be sorted by kind first.
    """
    kinds = {(each.device, each.dtype, each.layout) for each in gradients[:_FEW]}
    if len(gradients) > _FEW or len(kinds) > 1 or gradients[0].layout is not torch.strided:
        return nn.utils.get_total_norm(gradients)
    with torch.no_grad():
        total: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients), 2.0)), 2.0)
    return total


def _norm_of_shards(parameters: Sequence[nn.Parameter], clip_norm: float | None) -> Tensor:
    """`gradient_norm` where some parameters are sharded over the processes; all of them have a gradient."""
    kinds = [[parameters[place] for place in places] for places in by_sharding(parameters)]
    norms = [
        full_tensor(nn.utils.get_total_norm([each.grad for each in kind if each.grad is not None])) for kind in kinds
    ]
    norm = nn.utils.get_total_norm(norms)
    if clip_norm is not None:
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, clip_norm, norm)
    return norm
