"""Liveness: follows what is meant to train, and the optimizers that are meant to train it, through one phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtl.audit.watch.contract import Contract
from mtl.audit.watch.membership import HoldsParameters, param_groups
from mtl.audit.watch.places import is_unmade
from mtl.audit.watch.readings import Reading
from mtl.audit.watch.rotation import Turns
from mtl.audit.watch.trainable_tensor import Trainee, can_train, content_of, digest_of, is_elsewhere
from mtl.patterns import PatternLike, select
from mtl.patterns.module_tree import describe_modules
from mtl.runtime.tensors import local

# The digests of all that trains are taken after these steps, and then whenever half as many more have been done.
_FIRST_MARKS = (5, 10, 25, 50)


@dataclass
class Steps:
    """What was seen of the optimizers and of the loop; optimizers and their groups by identity.

    Attributes:
        moving: The last step at which a group had a rate above zero.
        taken: The steps of each optimizer.
        last: The phase's step at which each took its last one.
        empty: How often each was called with no gradient there.
        dropped: How many gradients were cleared before it stepped.
        last_first_signal: The step at which the last parameter received its first gradient that was not zero.
        num_backwards: Backwards that reached something which trains; until the first step, if no optimizer is attached.
        num_backwards_stepped: Those of them that were seen when the last step was taken.
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
    """Follows the parameters that no pattern freezes through one phase.

    Attributes:
        trainees: The parameters.
        steps: What was seen of the optimizers.
        idle: The names of parameters that may stay as they are.
    """

    def __init__(self, contract: Contract, idle: Sequence[PatternLike]) -> None:
        """Args:
        contract: The phase's contract.
        idle: Patterns of parameters that may stay as they are.
        """
        self.steps = Steps()
        self.trainees: list[Trainee] = []
        self._patterns_of_idle = idle
        self.idle: set[str] = set()
        self._waiting: list[Trainee] = []
        self._elsewhere = {place.name for place in contract.free if is_elsewhere(place.look())}
        self._zero: list[Trainee] = []
        self._asked: list[tuple[list[Trainee], Reading, int]] = []
        self._read: list[tuple[Trainee, Reading, int]] = []
        self._next_mark = _FIRST_MARKS[0]
        self.adopt(contract, 0)

    def adopt(self, contract: Contract, step: int) -> None:
        """Follows what has come since the phase began, too.

        Args:
            contract: The contract as it is by now.
            step: Steps done.
        """
        names = [place.name for place in contract.free]
        if self._patterns_of_idle:
            self.idle = set(select(self._patterns_of_idle, names, describe_modules(contract.modules)).names)
        frozen = {
            id(tensor) for place in contract.frozen if place.rows is None and (tensor := place.look()) is not None
        }
        known = frozen | {id(trainee.tensor) for trainee in self.trainees}
        for place in contract.free:
            tensor = place.look()
            if tensor is None or id(tensor) in known or place.name in self.idle or not can_train(place, tensor):
                continue
            known.add(id(tensor))
            self.trainees.append(Trainee(place, tensor, digest_of(tensor), step))
            self._waiting.append(self.trainees[-1])
        self._turns = Turns(self.trainees)

    @property
    def num_noted(self) -> int:
        """The steps of the optimizer that has stepped most often, with no gradient there, too."""
        return max((self.steps.taken + self.steps.empty).values(), default=0)

    def asking(self) -> list[Tensor]:
        """What asks for a gradient now."""
        tensors = [trainee.tensor for trainee in self.trainees]
        return [tensor for tensor in tensors if tensor.requires_grad and tensor.is_leaf and not is_unmade(tensor)]

    @property
    def num_trainable(self) -> int:
        return sum(not trainee.is_stray for trainee in self.trainees)

    def changed(self, step: int) -> set[int]:
        """Reads all bytes; the identities of those that have other ones than when the phase began."""
        for trainee in self.trainees:
            if not is_unmade(trainee.tensor):
                trainee.note_bytes(content_of(trainee.tensor), step)
        return {id(each.tensor) for each in self.trainees if each.last_digest != each.digest}

    def num_trained(self, changed: set[int]) -> int:
        """How many of `changed` are parameters that were to train from the phase's begin on."""
        return sum(id(each.tensor) in changed for each in self.trainees if not each.is_stray and not each.born)

    def look_at_gradients(self, step: int) -> bool:
        """Looks who has a gradient, and into the gradients of those that have had none but zeros so far.

        Args:
            step: The step that the gradients are for.

        Returns:
            Whether there was any, of those whose turn it is.
        """
        is_any = False
        for trainee in self._turns.due(step):
            if trainee.tensor.grad is not None and trainee.tensor.requires_grad:
                trainee.note_gradient(step)
                is_any = True
        for trainee in self._waiting:
            trainee.asked |= trainee.tensor.requires_grad
            trainee.had_gradient |= trainee.tensor.grad is not None
        is_mark = step >= self._next_mark
        # What has a gradient of zeros is looked at until it has another one.
        self._measure(self.trainees if is_mark else [*self._waiting, *self._zero], step)
        self._take_in(wait=False)
        return is_any

    def look_at_rates(self, optimizers: Sequence[HoldsParameters], step: int) -> None:
        """Notes which groups have a rate above zero."""
        for group in param_groups(optimizers):
            if _is_above_zero(group.get("lr")):
                self.steps.moving[id(group)] = step

    def look_at_bytes(self, step: int) -> None:
        """After some steps, reads all bytes of what trains: what has the same again and again stands still."""
        if step < self._next_mark:
            return
        later = [mark for mark in _FIRST_MARKS if mark > step]
        self._next_mark = later[0] if later else max(step + 25, step * 3 // 2)
        for trainee in self.trainees:
            if not is_unmade(trainee.tensor):
                self._read.append((trainee, Reading(content_of(trainee.tensor)), step))
        self._take_in(wait=False)

    def note_step(self, optimizer: Optimizer, step: int, is_empty: bool) -> None:
        """Notes that an optimizer has stepped, perhaps with no gradient there."""
        if is_empty:
            self.steps.empty[id(optimizer)] += 1
        else:
            self.steps.taken[id(optimizer)] += 1
            self.steps.last[id(optimizer)] = step
            self.steps.num_backwards_stepped = self.steps.num_backwards

    def settle(self) -> None:
        """Waits for all that was asked for."""
        self._take_in(wait=True)

    def state(self, optimizers: Sequence[HoldsParameters]) -> dict[str, Any]:
        """What was seen, as plain data: parameters by name, optimizers and their groups by position."""
        self.settle()
        followed = {id(trainee): trainee for trainee in {each.place.name: each for each in self.trainees}.values()}
        return {
            "trainees": {trainee.place.name: trainee.state() for trainee in followed.values()},
            # Those that others have taken the place of, and that are followed themselves.
            "gone": [(each.place.name, each.state()) for each in self.trainees if id(each) not in followed],
            "strays": [trainee.place.name for trainee in self.trainees if trainee.is_stray],
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

    def differs_from(self, state: Mapping[str, Any], optimizers: Sequence[HoldsParameters]) -> str | None:
        """Why a state cannot be one of this phase, in words; None if it can."""
        # Plain tensors may come and go with a forward.
        now = {trainee.place.name for trainee in self.trainees if not trainee.is_stray}
        before = {*state["trainees"]} - {*state["strays"]} - self._elsewhere
        for name in sorted(now ^ before):
            return f"{name} was{'' if name in before else ' not'} to train, and is{'' if name in now else ' not'} now"
        groups = [len(optimizer.param_groups) for optimizer in optimizers]
        groups_before = [len(each["moving_groups"]) for each in state["optimizers"]]
        if groups != groups_before:
            return f"its optimizers had {groups_before} param groups, and have {groups} now"
        return None

    def take_over(self, state: Mapping[str, Any], optimizers: Sequence[HoldsParameters]) -> None:
        """Goes on from what was seen in another process."""
        for trainee in self.trainees:
            if trainee.place.name in state["trainees"]:
                trainee.take_over(state["trainees"][trainee.place.name])
        place_of = {trainee.place.name: trainee.place for trainee in self.trainees}
        for name, seen in state.get("gone", ()):
            if name in place_of:
                self.trainees.insert(0, Trainee(place_of[name], torch.empty(0, device="cpu"), ""))
                self.trainees[0].take_over(seen)
        self._turns = Turns(self.trainees)
        self._waiting = [trainee for trainee in self.trainees if not trainee.had_signal]
        self._zero = [trainee for trainee in self.trainees if trainee.zero_since is not None]
        for optimizer, seen in zip(optimizers, state["optimizers"], strict=True):
            if seen["num_steps"]:
                self.steps.taken[id(optimizer)] = seen["num_steps"]
                self.steps.last[id(optimizer)] = seen.get("last_step", seen["num_steps"])
            if seen.get("num_empty"):
                self.steps.empty[id(optimizer)] = seen["num_empty"]
            if seen.get("num_dropped"):
                self.steps.dropped[id(optimizer)] = seen["num_dropped"]
            groups = zip(optimizer.param_groups, seen["moving_groups"], strict=True)
            self.steps.moving |= {id(group): int(step) for group, step in groups if step}
        self.steps.last_first_signal = state["last_first_signal"]
        self.steps.num_backwards = state["num_backwards"]
        self.steps.num_backwards_stepped = state.get("num_backwards_stepped", state["num_backwards"])
        self._next_mark = state.get("next_mark", _FIRST_MARKS[0])

    def _measure(self, trainees: Iterable[Trainee], step: int) -> None:
        """Asks for the largest elements of gradients."""
        groups: dict[tuple[torch.device, torch.dtype], list[Trainee]] = {}
        for trainee in trainees:
            if (gradient := trainee.tensor.grad) is not None:
                groups.setdefault((gradient.device, gradient.dtype), []).append(trainee)
        for group in groups.values():
            largest = torch.stack([_largest(trainee.tensor.grad) for trainee in group])
            self._asked.append((group, Reading(largest), step))

    def _take_in(self, wait: bool) -> None:
        asked, self._asked = self._asked, []
        for group, reading, step in asked:
            if (largest := reading.get(wait)) is None:
                self._asked.append((group, reading, step))
                continue
            for trainee, size in zip(group, largest.tolist(), strict=True):
                if size != 0 and not trainee.had_signal:
                    trainee.had_signal = True
                    self.steps.last_first_signal = max(self.steps.last_first_signal, step - trainee.born)
                if trainee.had_signal:
                    trainee.note_slope(size, step)
        if asked:
            self._waiting = [trainee for trainee in self._waiting if not trainee.had_signal]
            self._zero = [trainee for trainee in self.trainees if trainee.zero_since is not None]
        read, self._read = self._read, []
        for trainee, content, step in read:
            if (arrived := content.get(wait)) is None:
                self._read.append((trainee, content, step))
            else:
                trainee.note_bytes(arrived, step)


def _largest(gradient: Tensor | None) -> Tensor:
    """The largest element of a gradient, without a sign; not a number is not zero."""
    assert gradient is not None
    here = content_of(gradient) if not gradient.is_sparse else local(gradient)
    if here.is_sparse:
        here = here.coalesce().values()
    return here.detach().abs().amax() if here.numel() else here.new_zeros(()).abs()


def _is_above_zero(rate: object) -> bool:
    """Whether a rate moves anything; one on a device is not read, and an optimizer without one has its own."""
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return True
    return rate is None or bool(rate != 0)
