"""Liveness: records what happens to the trainable tensors of a phase, and the steps of their optimizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtl.audit.watch.contract import Contract
from mtl.audit.watch.optimizers import HoldsParameters, param_groups
from mtl.audit.watch.places import is_uninitialized
from mtl.audit.watch.readings import Reading
from mtl.audit.watch.rotation import Rotation
from mtl.audit.watch.trainable_tensor import TrainableTensor, can_train, content_of, digest_of, is_on_other_ranks_only
from mtl.patterns import PatternLike, select
from mtl.patterns.module_tree import describe_modules
from mtl.runtime.tensors import local

# Digests of all trainable tensors are taken after these steps, and then whenever the number has grown by half.
_FIRST_MARKS = (5, 10, 25, 50)


@dataclass
class StepCounts:
    """Counts of optimizer steps and backwards; optimizers and their param groups by identity.

    Attributes:
        moving: The last step at which a param group had a learning rate above zero.
        taken: The steps of each optimizer.
        last: The phase's step at which each optimizer took its last one.
        empty: The steps of each optimizer without any gradient.
        dropped: Gradients that were cleared before each optimizer stepped.
        last_first_signal: The step of the latest first gradient, over all parameters, that was not zero.
        num_backwards: Backwards that reached a trainable tensor; until the first step, if no optimizer is attached.
        num_backwards_stepped: `num_backwards` at the last step.
    """

    moving: dict[int, int] = field(default_factory=dict)
    taken: Counter[int] = field(default_factory=Counter)
    last: dict[int, int] = field(default_factory=dict)
    empty: Counter[int] = field(default_factory=Counter)
    dropped: Counter[int] = field(default_factory=Counter)
    last_first_signal: int = 0
    num_backwards: int = 0
    num_backwards_stepped: int = 0


class Liveness:
    """Records gradients, bytes and learning rates of the trainable tensors of one phase.

    Attributes:
        trainables: The trainable tensors.
        steps: Counts of steps and backwards.
        idle: The names of parameters that are allowed not to train.
    """

    def __init__(self, contract: Contract, idle: Sequence[PatternLike]) -> None:
        """Args:
        contract: The phase's contract.
        idle: Patterns of parameters that are allowed not to train.
        """
        self.steps = StepCounts()
        self.trainables: list[TrainableTensor] = []
        self._idle_patterns = idle
        self.idle: set[str] = set()
        self._without_signal: list[TrainableTensor] = []
        self._on_other_ranks = {place.name for place in contract.free if is_on_other_ranks_only(place.current())}
        self._with_zero_grad: list[TrainableTensor] = []
        self._pending_sizes: list[tuple[list[TrainableTensor], Reading, int]] = []
        self._pending_bytes: list[tuple[TrainableTensor, Reading, int]] = []
        self._next_mark = _FIRST_MARKS[0]
        self.add_new(contract, 0)

    def add_new(self, contract: Contract, step: int) -> None:
        """Adds trainable tensors that are not recorded yet.

        Args:
            contract: The present contract.
            step: The phase's steps so far.
        """
        names = [place.name for place in contract.free]
        if self._idle_patterns:
            self.idle = set(select(self._idle_patterns, names, describe_modules(contract.modules)).names)
        frozen = {
            id(tensor) for place in contract.frozen if place.rows is None and (tensor := place.current()) is not None
        }
        known = frozen | {id(trainable.tensor) for trainable in self.trainables}
        for place in contract.free:
            tensor = place.current()
            if tensor is None or id(tensor) in known or place.name in self.idle or not can_train(place, tensor):
                continue
            known.add(id(tensor))
            self.trainables.append(TrainableTensor(place, tensor, digest_of(tensor), step))
            self._without_signal.append(self.trainables[-1])
        self._rotation = Rotation(self.trainables)

    @property
    def num_observed(self) -> int:
        """The steps of the optimizer that has stepped most often, including steps without a gradient."""
        taken, empty = self.steps.taken, self.steps.empty
        return max((taken + empty if empty else taken).values(), default=0)

    def requiring_grad(self) -> list[Tensor]:
        """The trainable tensors that require a gradient now."""
        tensors = [trainable.tensor for trainable in self.trainables]
        return [
            tensor for tensor in tensors if tensor.requires_grad and tensor.is_leaf and not is_uninitialized(tensor)
        ]

    @property
    def num_trainable(self) -> int:
        return sum(not trainable.is_unregistered for trainable in self.trainables)

    def changed(self, step: int) -> set[int]:
        """Reads all bytes; returns the identities of tensors whose bytes differ from the phase's begin."""
        for trainable in self.trainables:
            if not is_uninitialized(trainable.tensor):
                trainable.record_bytes(content_of(trainable.tensor), step)
        return {id(each.tensor) for each in self.trainables if each.last_digest != each.digest}

    def num_trained(self, changed: set[int]) -> int:
        """How many of `changed` are parameters that were trainable from the phase's begin on."""
        return sum(id(each.tensor) in changed for each in self.trainables if not each.is_unregistered and not each.born)

    def check_gradients(self, step: int) -> bool:
        """Records which tensors have a gradient, and requests the size of gradients that were all zeros so far.

        Args:
            step: The step that the gradients are for.

        Returns:
            Whether any of the tensors due in this step has a gradient.
        """
        is_any = False
        for trainable in self._rotation.due(step):
            if trainable.tensor.grad is not None and trainable.tensor.requires_grad:
                trainable.record_gradient(step)
                is_any = True
        for trainable in self._without_signal:
            trainable.asked |= trainable.tensor.requires_grad
            trainable.had_gradient |= trainable.tensor.grad is not None
        is_mark = step >= self._next_mark
        # A gradient of zeros is measured again until it is another.
        self._request_sizes(self.trainables if is_mark else [*self._without_signal, *self._with_zero_grad], step)
        self._collect(wait=False)
        return is_any

    def record_rates(self, optimizers: Sequence[HoldsParameters], step: int) -> None:
        """Records which param groups have a learning rate above zero."""
        for group in param_groups(optimizers):
            if _is_above_zero(group.get("lr")):
                self.steps.moving[id(group)] = step

    def read_bytes(self, step: int) -> None:
        """After some steps, reads the bytes of all trainable tensors, to find those that no longer change."""
        if step < self._next_mark:
            return
        later = [mark for mark in _FIRST_MARKS if mark > step]
        self._next_mark = later[0] if later else max(step + 25, step * 3 // 2)
        for trainable in self.trainables:
            if not is_uninitialized(trainable.tensor):
                self._pending_bytes.append((trainable, Reading(content_of(trainable.tensor)), step))
        self._collect(wait=False)

    def record_step(self, optimizer: Optimizer, step: int, is_empty: bool, number: int = 1) -> None:
        """Counts a step of an optimizer, or several up to `step`; `is_empty` if there was no gradient."""
        if is_empty:
            self.steps.empty[id(optimizer)] += number
        else:
            self.steps.taken[id(optimizer)] += number
            self.steps.last[id(optimizer)] = step
            self.steps.num_backwards_stepped = self.steps.num_backwards

    def finish_reads(self) -> None:
        """Waits for all pending reads."""
        self._collect(wait=True)

    def state_dict(self, optimizers: Sequence[HoldsParameters]) -> dict[str, Any]:
        """The records as plain data: parameters by name, optimizers and their groups by position."""
        self.finish_reads()
        current = {
            id(trainable): trainable for trainable in {each.place.name: each for each in self.trainables}.values()
        }
        return {
            "trainees": {trainable.place.name: trainable.state_dict() for trainable in current.values()},
            # Tensors that were replaced by others of the same name, and are still recorded themselves.
            "gone": [(each.place.name, each.state_dict()) for each in self.trainables if id(each) not in current],
            "strays": [trainable.place.name for trainable in self.trainables if trainable.is_unregistered],
            "optimizers": [
                {
                    "num_steps": self.steps.taken[id(optimizer)],
                    "last_step": self.steps.last.get(id(optimizer), 0),
                    "num_empty": self.steps.empty[id(optimizer)],
                    "num_dropped": self.steps.dropped[id(optimizer)],
                    "moving_groups": [self.steps.moving.get(id(group), 0) for group in optimizer.param_groups],
                }
                for optimizer in optimizers
            ],
            "last_first_signal": self.steps.last_first_signal,
            "num_backwards": self.steps.num_backwards,
            "num_backwards_stepped": self.steps.num_backwards_stepped,
            "next_mark": self._next_mark,
        }

    def difference_from(self, state: Mapping[str, Any], optimizers: Sequence[HoldsParameters]) -> str | None:
        """Why a state is not one of this phase, in words; None if it is one."""
        # Unregistered tensors may be created and deleted by a forward.
        now = {trainable.place.name for trainable in self.trainables if not trainable.is_unregistered}
        before = {*state["trainees"]} - {*state["strays"]} - self._on_other_ranks
        for name in sorted(now ^ before):
            return f"{name} was{'' if name in before else ' not'} trainable, and is{'' if name in now else ' not'} now"
        groups = [len(optimizer.param_groups) for optimizer in optimizers]
        groups_before = [len(each["moving_groups"]) for each in state["optimizers"]]
        if groups != groups_before:
            return f"its optimizers had {groups_before} param groups, and have {groups} now"
        return None

    def load_state_dict(self, state: Mapping[str, Any], optimizers: Sequence[HoldsParameters]) -> None:
        """Loads the records of another process."""
        for trainable in self.trainables:
            if trainable.place.name in state["trainees"]:
                trainable.load_state_dict(state["trainees"][trainable.place.name])
        place_of = {trainable.place.name: trainable.place for trainable in self.trainables}
        for name, saved in state.get("gone", ()):
            if name in place_of:
                self.trainables.insert(0, TrainableTensor(place_of[name], torch.empty(0, device="cpu"), ""))
                self.trainables[0].load_state_dict(saved)
        self._rotation = Rotation(self.trainables)
        self._without_signal = [trainable for trainable in self.trainables if not trainable.had_signal]
        self._with_zero_grad = [trainable for trainable in self.trainables if trainable.zero_since is not None]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            if saved["num_steps"]:
                self.steps.taken[id(optimizer)] = saved["num_steps"]
                self.steps.last[id(optimizer)] = saved.get("last_step", saved["num_steps"])
            if saved.get("num_empty"):
                self.steps.empty[id(optimizer)] = saved["num_empty"]
            if saved.get("num_dropped"):
                self.steps.dropped[id(optimizer)] = saved["num_dropped"]
            groups = zip(optimizer.param_groups, saved["moving_groups"], strict=True)
            self.steps.moving |= {id(group): int(step) for group, step in groups if step}
        self.steps.last_first_signal = state["last_first_signal"]
        self.steps.num_backwards = state["num_backwards"]
        self.steps.num_backwards_stepped = state.get("num_backwards_stepped", state["num_backwards"])
        self._next_mark = state.get("next_mark", _FIRST_MARKS[0])

    def _request_sizes(self, trainables: Iterable[TrainableTensor], step: int) -> None:
        """Requests the largest elements of gradients."""
        groups: dict[tuple[torch.device, torch.dtype], list[TrainableTensor]] = {}
        for trainable in trainables:
            if (gradient := trainable.tensor.grad) is not None:
                groups.setdefault((gradient.device, gradient.dtype), []).append(trainable)
        for group in groups.values():
            largest = torch.stack([_largest(trainable.tensor.grad) for trainable in group])
            self._pending_sizes.append((group, Reading(largest), step))

    def _collect(self, wait: bool) -> None:
        sizes, self._pending_sizes = self._pending_sizes, []
        for group, reading, step in sizes:
            if (largest := reading.get(wait)) is None:
                self._pending_sizes.append((group, reading, step))
                continue
            for trainable, size in zip(group, largest.tolist(), strict=True):
                if size != 0 and not trainable.had_signal:
                    trainable.had_signal = True
                    self.steps.last_first_signal = max(self.steps.last_first_signal, step - trainable.born)
                if trainable.had_signal:
                    trainable.record_slope(size, step)
        if sizes:
            self._without_signal = [trainable for trainable in self._without_signal if not trainable.had_signal]
            self._with_zero_grad = [trainable for trainable in self.trainables if trainable.zero_since is not None]
        pending, self._pending_bytes = self._pending_bytes, []
        for trainable, content, step in pending:
            if (arrived := content.get(wait)) is None:
                self._pending_bytes.append((trainable, content, step))
            else:
                trainable.record_bytes(arrived, step)


def _largest(gradient: Tensor | None) -> Tensor:
    """The largest absolute element of a gradient; NaN if it has one."""
    assert gradient is not None
    here = content_of(gradient) if not gradient.is_sparse else local(gradient)
    if here.is_sparse:
        here = here.coalesce().values()
    return here.detach().abs().amax() if here.numel() else here.new_zeros(()).abs()


def _is_above_zero(rate: object) -> bool:
    """Whether a learning rate is not zero; True if it is on a device, or the optimizer has none."""
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return True
    return rate is None or bool(rate != 0)
