"""Liveness: what was meant to train received a gradient, was stepped, and changed.

One step proves nothing: a rate may be warming up from zero, a layer may begin at zero and hide the gradient of what is
below it, a task may not have been drawn. The window is therefore the whole phase, and it is judged at its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtl.audit import causes
from mtl.audit.contract import Contract
from mtl.audit.membership import HoldsParameters, param_groups, tells_of_steps
from mtl.audit.places import Place
from mtl.audit.readings import Reading
from mtl.audit.trainee import Trainee, can_train, digest_of, is_elsewhere
from mtl.moduletree import describe_modules
from mtl.patterns import PatternLike, select
from mtl.storage import local

# After so many steps a phase can be judged: a warm-up from zero is over.
FEW = 3
# So many if no gradient came, or only zeros: layers that begin at zero have moved by then; with two tasks drawn at
# random, one is left out so often once in 32 runs.
SOME = 6
# So many if chance is at work (parameters got their first gradient late), or changes too small to be seen.
MANY = 50
# What has had so many gradients, and then none for MANY steps and TIMES its longest wait, has stopped.
ENOUGH = 10
# And, if it is, so many times the step at which the last parameter got its first gradient.
TIMES = 4


@dataclass(frozen=True)
class Finding:
    """What is wrong with one parameter, in the terms of a violation."""

    kind: str
    place: Place
    cause: str
    detail: str


@dataclass
class _Seen:
    """What was seen of the optimizers: groups with a rate above zero, and each one's steps, by identity."""

    moving_groups: set[int] = field(default_factory=set)
    stepped: Counter[int] = field(default_factory=Counter)
    last_first_signal: int = 0


class Liveness:
    """Follows the parameters that no pattern freezes through one phase."""

    def __init__(self, contract: Contract, idle: Sequence[PatternLike]) -> None:
        """Args:
        contract: The phase's contract.
        idle: Patterns of parameters that may stay as they are.
        """
        names = [place.name for place in contract.free]
        rest = set(select(idle, names, describe_modules(contract.modules)).names) if idle else set()
        frozen = {
            id(tensor) for place in contract.frozen if place.rows is None and (tensor := place.look()) is not None
        }
        trainees: dict[int, Trainee] = {}
        for place in contract.free:
            tensor = place.look()
            if tensor is None or id(tensor) in frozen or place.name in rest or not can_train(place, tensor):
                continue
            trainees.setdefault(id(tensor), Trainee(place, tensor, digest_of(tensor)))
        self._trainees = list(trainees.values())
        self._waiting = list(self._trainees)
        self._elsewhere = {place.name for place in contract.free if is_elsewhere(place.look())}
        self._contract = contract
        self._seen = _Seen()
        self._asked: list[tuple[list[Trainee], Reading, int]] = []
        self.num_backwards = 0

    @property
    def num_noted(self) -> int:
        """The steps of the optimizer that has stepped most often."""
        return max(self._seen.stepped.values(), default=0)

    def asking(self) -> list[Tensor]:
        """What asks for a gradient now."""
        return [trainee.tensor for trainee in self._trainees if trainee.tensor.requires_grad and trainee.tensor.is_leaf]

    @property
    def num_trainable(self) -> int:
        return sum(not trainee.is_stray for trainee in self._trainees)

    def changed(self) -> set[int]:
        """The identities of those with other bytes than when the phase began."""
        return {id(each.tensor) for each in self._trainees if digest_of(each.tensor) != each.digest}

    def num_trained(self, changed: set[int]) -> int:
        """How many of `changed` are parameters that were to train."""
        return sum(id(trainee.tensor) in changed for trainee in self._trainees if not trainee.is_stray)

    def look_at_gradients(self, step: int) -> None:
        """Looks who has a gradient, and into the gradients of those that have had none but zeros so far.

        Args:
            step: The step that the gradients are for.
        """
        for trainee in self._trainees:
            if trainee.tensor.grad is not None and trainee.tensor.requires_grad:
                trainee.note_gradient(step)
        if not self._waiting:
            return
        groups: dict[tuple[torch.device, torch.dtype], list[Trainee]] = {}
        for trainee in self._waiting:
            trainee.asked |= trainee.tensor.requires_grad
            if (gradient := trainee.tensor.grad) is not None:
                trainee.had_gradient = True
                groups.setdefault((gradient.device, gradient.dtype), []).append(trainee)
        for group in groups.values():
            largest = torch.stack([_largest(trainee.tensor.grad) for trainee in group])
            self._asked.append((group, Reading(largest), step))
        self._take_in(wait=False)

    def look_at_rates(self, optimizers: Sequence[HoldsParameters]) -> None:
        """Notes which groups have a rate above zero."""
        for group in param_groups(optimizers):
            if id(group) not in self._seen.moving_groups and _is_above_zero(group.get("lr")):
                self._seen.moving_groups.add(id(group))

    def note_step(self, optimizer: Optimizer) -> None:
        """Notes that an optimizer has stepped."""
        self._seen.stepped[id(optimizer)] += 1

    def judge(self, changed: set[int], num_steps: int, optimizers: Sequence[HoldsParameters]) -> Iterator[Finding]:
        """What did not train in a phase that is over, and why; `changed` is what has other bytes by now."""
        self._take_in(wait=True)
        num_steps = max(num_steps, self.num_noted)
        if not optimizers:
            return
        if not num_steps:
            yield from self._judge_without_steps(changed, optimizers)
            return
        held = {id(p) for group in param_groups(optimizers) for p in group["params"]}
        dead = [t for t in self._trainees if not (t.had_signal and id(t.tensor) in changed)]
        owners = {id(trainee.place.owner) for trainee in dead if not _is_bias(trainee.place)}
        for trainee in self._trainees:
            has_changed = id(trainee.tensor) in changed
            if _has_stopped(trainee, num_steps) and trainee.place.look() is trainee.tensor and not trainee.is_stray:
                cause = causes.CUT_OFF if trainee.tensor.requires_grad else causes.SWITCHED_OFF
                detail = f"had its last gradient in step {trainee.last_gradient} of {num_steps}"
                yield Finding("stopped_training", trainee.place, cause, detail)
                continue
            if trainee.place.look() is not trainee.tensor or (has_changed and (trainee.had_signal or trainee.is_stray)):
                continue
            if trainee.is_stray:
                if trainee.had_gradient and id(trainee.tensor) not in held:
                    cause = causes.HIDDEN if trainee.place.hidden else causes.PLAIN_TENSOR
                    yield Finding("not_in_optimizer", trainee.place, cause, "received a gradient, but nothing steps it")
            elif not has_changed and not (trainee.asked or trainee.tensor.requires_grad):
                modules = self._contract.around(trainee.place)
                cause = causes.of_flag(trainee.tensor, modules) or causes.NOT_THAWED
                yield Finding("never_trained", trainee.place, cause, "requires no gradient, though nothing freezes it")
            elif id(trainee.tensor) in held:
                # In front of a norm layer or a softmax, a bias has no effect: its gradient is rounding, or zero. The
                # weight beside it lives.
                is_excused = _is_bias(trainee.place) and id(trainee.place.owner) not in owners
                yield from self._judge_held(trainee, has_changed, is_excused, num_steps, optimizers)

    def _judge_without_steps(self, changed: set[int], optimizers: Sequence[HoldsParameters]) -> Iterator[Finding]:
        """What was to train in a phase in which there were backwards, but no step."""
        held = {id(p) for group in param_groups(optimizers) for p in group["params"]}
        for trainee in self._trainees if self.num_backwards >= FEW else ():
            if id(trainee.tensor) in held - changed:
                detail = f"was never stepped in {self.num_backwards} backwards"
                yield Finding("never_trained", trainee.place, causes.NEVER_STEPPED, detail)

    def _judge_held(
        self,
        trainee: Trainee,
        has_changed: bool,
        is_excused: bool,
        num_steps: int,
        optimizers: Sequence[HoldsParameters],
    ) -> Iterator[Finding]:
        """What is wrong with a parameter that an optimizer holds, and that got no gradient, or stayed as it was."""
        late = self._seen.last_first_signal
        place, patience = trainee.place, SOME if late <= 3 else max(MANY, TIMES * late)
        if not trainee.had_gradient:
            # What moves without one is stepped elsewhere: inside the backward, or by a method of its own.
            if not has_changed and num_steps >= patience:
                yield Finding("never_received_grad", place, causes.NO_GRADIENT, "had no gradient after any backward")
            return
        holders = [o for o in optimizers if any(p is trainee.tensor for g in o.param_groups for p in g["params"])]
        groups = [g for g in param_groups(holders) if any(p is trainee.tensor for p in g["params"])]
        stepped = any(not tells_of_steps(o) or id(o) in self._seen.stepped for o in holders)
        moving = any(id(group) in self._seen.moving_groups for group in groups)
        if num_steps < FEW:
            return
        if not has_changed and not stepped:
            yield Finding("never_trained", place, causes.NEVER_STEPPED, "received gradients, but was never stepped")
        elif not has_changed and not moving:
            yield Finding("never_trained", place, causes.ZERO_RATE, "its learning rate was 0 at every step")
        elif is_excused:
            return
        elif not trainee.had_signal and num_steps >= patience:
            detail = "its gradient was zero at every step"
            detail += ", and only decay or momentum moved it" if has_changed else ""
            yield Finding("never_received_grad", place, causes.ZERO_GRADIENT, detail)
        elif not has_changed and num_steps >= MANY:
            yield Finding("never_trained", place, causes.TOO_SMALL, "received gradients, but kept every bit")

    def state(self, optimizers: Sequence[HoldsParameters]) -> dict[str, Any]:
        """What was seen, as plain data: parameters by name, optimizers and their groups by position."""
        self._take_in(wait=True)
        return {
            "trainees": {trainee.place.name: trainee.state() for trainee in self._trainees},
            "strays": [trainee.place.name for trainee in self._trainees if trainee.is_stray],
            "optimizers": [
                {
                    "num_steps": self._seen.stepped[id(optimizer)],
                    "moving_groups": [id(group) in self._seen.moving_groups for group in optimizer.param_groups],
                }
                for optimizer in optimizers
            ],
            "last_first_signal": self._seen.last_first_signal,
            "num_backwards": self.num_backwards,
        }

    def differs_from(self, state: Mapping[str, Any], optimizers: Sequence[HoldsParameters]) -> str | None:
        """Why a state cannot be one of this phase, in words; None if it can."""
        # Plain tensors may come and go with a forward.
        now = {trainee.place.name for trainee in self._trainees if not trainee.is_stray}
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
        for trainee in self._trainees:
            if trainee.place.name in state["trainees"]:
                trainee.take_over(state["trainees"][trainee.place.name])
        self._waiting = [trainee for trainee in self._trainees if not trainee.had_signal]
        for optimizer, seen in zip(optimizers, state["optimizers"], strict=True):
            if seen["num_steps"]:
                self._seen.stepped[id(optimizer)] = seen["num_steps"]
            groups = zip(optimizer.param_groups, seen["moving_groups"], strict=True)
            self._seen.moving_groups |= {id(group) for group, moves in groups if moves}
        self._seen.last_first_signal = state["last_first_signal"]
        self.num_backwards = state["num_backwards"]

    def _take_in(self, wait: bool) -> None:
        asked, self._asked = self._asked, []
        for group, reading, step in asked:
            largest = reading.get(wait)
            if largest is None:
                self._asked.append((group, reading, step))
                continue
            for trainee, is_there in zip(group, (largest != 0).tolist(), strict=True):
                if is_there and not trainee.had_signal:
                    trainee.had_signal = True
                    self._seen.last_first_signal = max(self._seen.last_first_signal, step)
        self._waiting = [trainee for trainee in self._waiting if not trainee.had_signal]


def _has_stopped(trainee: Trainee, num_steps: int) -> bool:
    """Whether it trained for a while, and has had no gradient for much longer than ever before."""
    silent = num_steps - trainee.last_gradient
    return trainee.num_gradients >= ENOUGH and silent >= max(MANY, TIMES * trainee.longest_wait)


def _is_bias(place: Place) -> bool:
    return "bias" in place.key


def _largest(gradient: Tensor | None) -> Tensor:
    """The largest element of a gradient, without a sign; not a number is not zero."""
    assert gradient is not None
    here = local(gradient)
    if here.is_sparse:
        here = here.coalesce().values()
    return here.detach().abs().amax() if here.numel() else here.new_zeros(()).abs()


def _is_above_zero(rate: object) -> bool:
    """Whether a rate moves anything; one on a device is not read, and an optimizer without one has its own."""
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return True
    return rate is None or bool(rate != 0)
