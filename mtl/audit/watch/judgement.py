"""Judges at the end of a phase which trainable parameters did not train, and why.

One step proves nothing: a learning rate may warm up from zero, a layer may begin at zero and hide the gradient of the
layers below it, a task may not have been drawn. The window is therefore the entire phase.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import LBFGS

from mtl.audit.watch import causes
from mtl.audit.watch.contract import Contract
from mtl.audit.watch.liveness import Liveness
from mtl.audit.watch.optimizers import HoldsParameters, fires_hooks, param_groups
from mtl.audit.watch.places import TensorPlace
from mtl.audit.watch.trainable_tensor import TrainableTensor

# Steps after which a phase can be judged: a warm-up from zero is over.
FEW = 3
# Steps if no gradient came, or only zeros: layers that begin at zero have changed by then; of two tasks drawn at
# random, one is left out for so long once in 32 runs.
SOME = 6
# Steps if chance is at work (first gradients came late), or changes may be too small to be observed.
MANY = 50
# A parameter with this many gradients, and then none for MANY steps and TIMES its longest wait, has stopped.
ENOUGH = 10
# Also the factor on the step at which the last parameter received its first gradient, for patience with late ones.
TIMES = 4
# This many cleared gradients for each step are a mistake.
DROPPED = 8
# A parameter that has kept every bit for MANY steps and this share of the phase no longer changes.
STILL = 1 / 3


@dataclass(frozen=True)
class Verdict:
    """Why one parameter did not train; a hazard if it may be on purpose."""

    kind: str
    place: TensorPlace
    cause: str
    detail: str
    is_hazard: bool = False


class Judge:
    """Judges the trainable parameters of one phase."""

    def __init__(
        self,
        liveness: Liveness,
        contract: Contract,
        optimizers: Sequence[HoldsParameters],
        were_frozen: Collection[int],
    ) -> None:
        """Args:
        liveness: The records of the trainable parameters, and the counts of steps.
        contract: The phase's contract.
        optimizers: The optimizers; without any, nothing is judged.
        were_frozen: The identities of tensors that an earlier phase froze.
        """
        self._trainables = liveness.trainables
        self._steps = liveness.steps
        self._contract = contract
        self._optimizers = optimizers
        self._were_frozen = were_frozen
        self._groups_of: dict[int, list[int]] = {}
        for group in param_groups(optimizers):
            for parameter in group["params"]:
                self._groups_of.setdefault(id(parameter), []).append(id(group))

    def verdicts(self, changed: set[int], num_steps: int) -> Iterator[Verdict]:
        """Args:
        changed: The identities of parameters whose bytes differ from the phase's begin.
        num_steps: The phase's steps.
        """
        if not self._optimizers:
            return
        if not num_steps:
            yield from self._without_steps(changed)
            return
        dead = [
            trainable
            for trainable in self._trainables
            if not (trainable.had_signal and id(trainable.tensor) in changed)
            or _no_longer_changes(trainable, num_steps)
            or _is_cut_off(trainable, num_steps)
        ]
        owners = {id(trainable.place.owner) for trainable in dead if not _is_bias(trainable)}
        are_at_optimum = all(
            each.is_at_its_optimum or _is_bias(each) for each in self._trainables if id(each.tensor) in self._groups_of
        )
        for trainable in self._trainables:
            if trainable.place.current() is trainable.tensor:
                # In front of a norm layer or a softmax, a bias has no effect: its gradient is rounding, or zero. It is
                # excused if the weight of its layer trains.
                is_excused = _is_bias(trainable) and id(trainable.place.owner) not in owners
                yield from self._judge(
                    trainable, id(trainable.tensor) in changed, is_excused, are_at_optimum, num_steps
                )

    def _judge(
        self, trainable: TrainableTensor, has_changed: bool, is_excused: bool, are_at_optimum: bool, num_steps: int
    ) -> Iterator[Verdict]:
        if trainable.is_unregistered:
            yield from self._judge_unregistered(trainable)
        elif has_changed and trainable.was_finite and (number := trainable.num_not_finite):
            detail = f"{number} of its {trainable.tensor.numel()} elements are NaN or infinite"
            yield Verdict("not_finite", trainable.place, causes.NOT_FINITE, detail)
        elif (stopped := self._stopped(trainable, has_changed, is_excused, are_at_optimum, num_steps)) is not None:
            yield stopped
        elif number := self._num_dropped(trainable):
            detail = f"{number} gradients were cleared before its optimizer stepped, in {num_steps} steps"
            yield Verdict("gradients_dropped", trainable.place, causes.DROPPED, detail)
        elif has_changed and trainable.had_signal:
            return
        elif not has_changed and not (trainable.asked or trainable.tensor.requires_grad):
            yield self._judge_fixed(trainable)
        elif id(trainable.tensor) in self._groups_of:
            yield from self._judge_held(trainable, has_changed, is_excused, num_steps - trainable.born)

    def _without_steps(self, changed: set[int]) -> Iterator[Verdict]:
        """Parameters in an optimizer, in a phase with backwards but without a step."""
        number = self._steps.num_backwards
        for trainable in self._trainables if number >= FEW else ():
            if id(trainable.tensor) in self._groups_of.keys() - changed:
                detail = f"was never stepped in {number} backwards"
                yield Verdict("never_trained", trainable.place, self._why_not_stepped(trainable), detail)

    def _judge_unregistered(self, trainable: TrainableTensor) -> Iterator[Verdict]:
        """An unregistered tensor with a gradient is meant to train."""
        if trainable.had_gradient and id(trainable.tensor) not in self._groups_of:
            cause = causes.HIDDEN if trainable.place.is_hidden else causes.PLAIN_TENSOR
            yield Verdict("not_in_optimizer", trainable.place, cause, "received a gradient, but nothing steps it")

    def _num_dropped(self, trainable: TrainableTensor) -> int:
        """The number of dropped gradients, if nearly all were; a penalty, or a step in two parts, drops a few."""
        ids = [id(each) for each in self._optimizers_of(trainable)]
        numbers = [(self._steps.dropped[each], self._steps.taken[each]) for each in ids]
        return max((dropped for dropped, taken in numbers if dropped >= max(MANY, DROPPED * taken)), default=0)

    def _judge_fixed(self, trainable: TrainableTensor) -> Verdict:
        """A parameter that required no gradient in the entire phase, though no pattern freezes it."""
        place, detail = trainable.place, "requires no gradient, though nothing freezes it"
        modules = self._contract.around(place)
        if cause := causes.of_flag(trainable.tensor, modules):
            return Verdict("never_trained", place, cause, detail)
        if id(trainable.tensor) in self._were_frozen or not _is_fixed_by_design(place):
            return Verdict("never_trained", place, causes.NOT_THAWED, detail)
        return Verdict("fixed_parameter", place, causes.FIXED, detail, is_hazard=True)

    def _stopped(
        self, trainable: TrainableTensor, has_changed: bool, is_excused: bool, are_at_optimum: bool, num_steps: int
    ) -> Verdict | None:
        """A parameter that trained and then stopped: without a gradient, or without a change of any bit."""
        silent = num_steps - trainable.last_gradient
        if trainable.num_gradients >= ENOUGH and silent >= max(MANY, TIMES * trainable.longest_wait):
            cause = causes.CUT_OFF if trainable.tensor.requires_grad else causes.SWITCHED_OFF
            detail = f"had its last gradient in step {trainable.last_gradient} of {num_steps}"
            return Verdict("stopped_training", trainable.place, cause, detail)
        if unstepped := self._unstepped(trainable):
            return unstepped
        if not (is_excused or are_at_optimum) and _is_cut_off(trainable, num_steps):
            cause = causes.of_zero_gradient(trainable.tensor.dtype)
            detail = f"its gradient has been zero since step {trainable.zero_since} of {num_steps}"
            return Verdict("stopped_training", trainable.place, cause, detail)
        is_unchanged = has_changed and _no_longer_changes(trainable, num_steps)
        if not is_unchanged or is_excused or id(trainable.tensor) not in self._groups_of:
            return None
        # If nearly all gradients have vanished, training is done. If only one has, its loss no longer counts.
        if are_at_optimum and not _is_short(trainable):
            return None
        cause = self._why_unchanged(trainable)
        # A scalar that is held at a bound, such as a logit scale, keeps its bits while its gradient lives.
        is_bound = trainable.tensor.numel() == 1 and not _is_bias(trainable)
        # And L-BFGS ends by itself at its optimum.
        if cause == causes.TOO_SMALL and (
            is_bound or any(isinstance(o, LBFGS) for o in self._optimizers_of(trainable))
        ):
            return None
        detail = f"has kept every bit since step {trainable.still_since} of {num_steps}"
        return Verdict("stopped_training", trainable.place, cause, detail)

    def _unstepped(self, trainable: TrainableTensor) -> Verdict | None:
        """Backwards that continued without a step: a loop with an attached optimizer does not call `after_step`."""
        steps = self._steps
        silent = steps.num_backwards - steps.num_backwards_stepped
        if (
            not steps.taken
            or silent < max(MANY, STILL * steps.num_backwards)
            or id(trainable.tensor) not in self._groups_of
        ):
            return None
        detail = f"no step was observed in the last {silent} of {steps.num_backwards} backwards"
        return Verdict("stopped_training", trainable.place, causes.NO_LONGER_SEEN, detail)

    def _why_unchanged(self, trainable: TrainableTensor) -> str:
        since = trainable.still_since
        if trainable.last_gradient <= since:
            return causes.CUT_OFF if trainable.tensor.requires_grad else causes.SWITCHED_OFF
        optimizers = [each for each in self._optimizers_of(trainable) if fires_hooks(each)]
        if optimizers and all(self._steps.last.get(id(each), 0) <= since for each in optimizers):
            return causes.NO_LONGER_STEPPED
        if all(self._steps.moving.get(group, 0) <= since for group in self._groups_of[id(trainable.tensor)]):
            return causes.RATE_FELL
        if trainable.slope == 0:
            return causes.of_zero_gradient(trainable.tensor.dtype)
        return causes.TOO_SMALL

    def _judge_held(
        self, trainable: TrainableTensor, has_changed: bool, is_excused: bool, num_steps: int
    ) -> Iterator[Verdict]:
        """A parameter in an optimizer that received no gradient, or did not change."""
        late = self._steps.last_first_signal
        place, patience = trainable.place, SOME if late <= 3 else max(MANY, TIMES * late)
        if not trainable.had_gradient:
            # One that changes without a gradient is stepped elsewhere: inside the backward, or by a method of its own.
            if not has_changed and num_steps >= patience:
                was_zeroed = self._steps.num_backwards and self._was_empty(trainable)
                cause = causes.ZEROED_TOO_EARLY if was_zeroed else causes.NO_GRADIENT
                yield Verdict("never_received_grad", place, cause, "had no gradient at any check")
            return
        stepped = any(not fires_hooks(each) or id(each) in self._steps.last for each in self._optimizers_of(trainable))
        moving = any(group in self._steps.moving for group in self._groups_of[id(trainable.tensor)])
        if num_steps < FEW:
            return
        if not has_changed and not stepped:
            detail = "received gradients, but was never stepped"
            yield Verdict("never_trained", place, self._why_not_stepped(trainable), detail)
        elif not has_changed and not moving:
            yield Verdict("never_trained", place, causes.ZERO_RATE, "its learning rate was 0 at every step")
        elif is_excused:
            return
        elif not trainable.had_signal and num_steps >= patience:
            detail = "its gradient was zero at every step"
            detail += ", and only decay or momentum moved it" if has_changed else ""
            cause = causes.of_zero_gradient(trainable.tensor.dtype)
            yield Verdict("never_received_grad", place, cause, detail)
        elif not has_changed and num_steps >= MANY:
            yield Verdict("never_trained", place, causes.TOO_SMALL, "received gradients, but kept every bit")

    def _why_not_stepped(self, trainable: TrainableTensor) -> str:
        return causes.ZEROED_TOO_EARLY if self._was_empty(trainable) else causes.NEVER_STEPPED

    def _was_empty(self, trainable: TrainableTensor) -> bool:
        """Whether its optimizer stepped without any gradient."""
        return any(self._steps.empty[id(each)] for each in self._optimizers_of(trainable))

    def _optimizers_of(self, trainable: TrainableTensor) -> list[HoldsParameters]:
        mine = self._groups_of.get(id(trainable.tensor), [])
        return [each for each in self._optimizers if any(id(group) in mine for group in each.param_groups)]


def _no_longer_changes(trainable: TrainableTensor, num_steps: int) -> bool:
    """Whether it has changed, and then kept every bit for many steps."""
    still = num_steps - trainable.still_since
    return trainable.still_since > trainable.born and still >= max(MANY, STILL * (num_steps - trainable.born))


def _is_cut_off(trainable: TrainableTensor, num_steps: int) -> bool:
    """Whether its gradient has been zero for much longer than ever before; decay and momentum may still move it."""
    if trainable.zero_since is None or not trainable.num_slopes:
        return False
    least = max(MANY, STILL * (num_steps - trainable.born), TIMES * trainable.longest_zero)
    return num_steps - trainable.zero_since >= least


def _is_bias(trainable: TrainableTensor) -> bool:
    """Whether it is a bias: one value a channel; a table of more axes may be called so, and is none."""
    return "bias" in trainable.place.key and trainable.tensor.ndim <= 1


def _is_short(trainable: TrainableTensor) -> bool:
    """Whether its dtype has so few digits that updates round to zero long before the optimum."""
    return trainable.tensor.dtype.itemsize < 4


def _is_fixed_by_design(place: TensorPlace) -> bool:
    """Whether a parameter may require no gradient on purpose, such as a table of positions.

    A torch layer without any parameter that requires a gradient is more likely a mistake.
    """
    owner = place.owner
    is_layer = any(
        base.__module__.startswith("torch.nn.modules") and base.__module__ != nn.Module.__module__
        for base in type(owner).__mro__
        if base.__module__ != "torch.nn.modules.container"
    )
    others = [each for key, each in owner._parameters.items() if key != place.key and each is not None]
    # Such as the bias of the norm layer in front of a classifier, whose weight trains.
    is_lone_bias = "bias" in place.key and any(each.requires_grad for each in others)
    return not is_layer or isinstance(owner, nn.Embedding) or is_lone_bias
