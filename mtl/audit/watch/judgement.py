"""What did not train in a phase that is over, and why.

One step proves nothing: a rate may be warming up from zero, a layer may begin at zero and hide the gradient of what is
below it, a task may not have been drawn. The window is therefore the whole phase, and it is judged at its end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import LBFGS

from mtl.audit.watch import causes
from mtl.audit.watch.contract import Contract
from mtl.audit.watch.liveness import Steps
from mtl.audit.watch.membership import HoldsParameters, fires_hooks, param_groups
from mtl.audit.watch.places import Place
from mtl.audit.watch.trainable_tensor import Trainee

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
# So many gradients that were cleared for each step that was taken are a mistake.
DROPPED = 8
# What has kept every bit for MANY steps and this share of the phase stands still.
STILL = 1 / 3


@dataclass(frozen=True)
class Verdict:
    """What is wrong with one parameter; a hazard if it may well be meant so."""

    kind: str
    place: Place
    cause: str
    detail: str
    is_hazard: bool = False


class Judge:
    """Judges the parameters of one phase."""

    def __init__(
        self,
        trainees: Sequence[Trainee],
        steps: Steps,
        contract: Contract,
        optimizers: Sequence[HoldsParameters],
        were_frozen: Collection[int],
    ) -> None:
        """Args:
        trainees: The parameters, as they were seen.
        steps: What was seen of the optimizers.
        contract: The phase's contract.
        optimizers: The optimizers; with none, nothing is judged.
        were_frozen: The identities of tensors that an earlier phase froze.
        """
        self._trainees = trainees
        self._steps = steps
        self._contract = contract
        self._optimizers = optimizers
        self._were_frozen = were_frozen
        self._groups_of: dict[int, list[int]] = {}
        for group in param_groups(optimizers):
            for parameter in group["params"]:
                self._groups_of.setdefault(id(parameter), []).append(id(group))

    def verdicts(self, changed: set[int], num_steps: int) -> Iterator[Verdict]:
        """Args:
        changed: The identities of what has other bytes than at first.
        num_steps: Steps of the phase.
        """
        if not self._optimizers:
            return
        if not num_steps:
            yield from self._without_steps(changed)
            return
        dead = [
            trainee
            for trainee in self._trainees
            if not (trainee.had_signal and id(trainee.tensor) in changed)
            or _stands_still(trainee, num_steps)
            or _is_cut_off(trainee, num_steps)
        ]
        owners = {id(trainee.place.owner) for trainee in dead if not _is_bias(trainee)}
        are_at_optimum = all(
            each.is_at_its_optimum or _is_bias(each) for each in self._trainees if id(each.tensor) in self._groups_of
        )
        for trainee in self._trainees:
            if trainee.place.look() is not trainee.tensor:
                continue
            has_changed = id(trainee.tensor) in changed
            # In front of a norm layer or a softmax, a bias has no effect: its gradient is rounding, or zero. The weight
            # beside it lives.
            is_excused = _is_bias(trainee) and id(trainee.place.owner) not in owners
            if trainee.is_stray:
                yield from self._judge_stray(trainee)
            elif has_changed and trainee.was_finite and (number := trainee.num_not_finite):
                detail = f"{number} of its {trainee.tensor.numel()} elements are NaN or infinite"
                yield Verdict("not_finite", trainee.place, causes.NOT_FINITE, detail)
            elif (stopped := self._stopped(trainee, has_changed, is_excused, are_at_optimum, num_steps)) is not None:
                yield stopped
            elif number := self._num_dropped(trainee):
                detail = f"{number} gradients were cleared before its optimizer stepped, in {num_steps} steps"
                yield Verdict("gradients_dropped", trainee.place, causes.DROPPED, detail)
            elif has_changed and trainee.had_signal:
                continue
            elif not has_changed and not (trainee.asked or trainee.tensor.requires_grad):
                yield self._judge_fixed(trainee)
            elif id(trainee.tensor) in self._groups_of:
                yield from self._judge_held(trainee, has_changed, is_excused, num_steps - trainee.born)

    def _without_steps(self, changed: set[int]) -> Iterator[Verdict]:
        """What was to train in a phase in which there were backwards, but no step."""
        number = self._steps.num_backwards
        for trainee in self._trainees if number >= FEW else ():
            if id(trainee.tensor) in self._groups_of.keys() - changed:
                detail = f"was never stepped in {number} backwards"
                yield Verdict("never_trained", trainee.place, self._why_not_stepped(trainee), detail)

    def _judge_stray(self, trainee: Trainee) -> Iterator[Verdict]:
        """What torch does not see may be meant to train, or to be left alone: its gradient says which."""
        if trainee.had_gradient and id(trainee.tensor) not in self._groups_of:
            cause = causes.HIDDEN if trainee.place.hidden else causes.PLAIN_TENSOR
            yield Verdict("not_in_optimizer", trainee.place, cause, "received a gradient, but nothing steps it")

    def _num_dropped(self, trainee: Trainee) -> int:
        """How many gradients were thrown away, if nearly all were; a penalty, or a step in two parts, takes a few."""
        holders = [id(each) for each in self._holders(trainee)]
        numbers = [(self._steps.dropped[each], self._steps.taken[each]) for each in holders]
        return max((dropped for dropped, taken in numbers if dropped >= max(MANY, DROPPED * taken)), default=0)

    def _judge_fixed(self, trainee: Trainee) -> Verdict:
        """What has required no gradient in the whole phase, though no pattern freezes it."""
        place, detail = trainee.place, "requires no gradient, though nothing freezes it"
        modules = self._contract.around(place)
        if cause := causes.of_flag(trainee.tensor, modules):
            return Verdict("never_trained", place, cause, detail)
        if id(trainee.tensor) in self._were_frozen or not _is_fixed_by_design(place):
            return Verdict("never_trained", place, causes.NOT_THAWED, detail)
        return Verdict("fixed_parameter", place, causes.FIXED, detail, is_hazard=True)

    def _stopped(
        self, trainee: Trainee, has_changed: bool, is_excused: bool, are_at_optimum: bool, num_steps: int
    ) -> Verdict | None:
        """What trained for a while and then no longer: without a gradient, or without a change of any bit."""
        silent = num_steps - trainee.last_gradient
        if trainee.num_gradients >= ENOUGH and silent >= max(MANY, TIMES * trainee.longest_wait):
            cause = causes.CUT_OFF if trainee.tensor.requires_grad else causes.SWITCHED_OFF
            detail = f"had its last gradient in step {trainee.last_gradient} of {num_steps}"
            return Verdict("stopped_training", trainee.place, cause, detail)
        if unstepped := self._unstepped(trainee):
            return unstepped
        if not (is_excused or are_at_optimum) and _is_cut_off(trainee, num_steps):
            cause = causes.of_zero_gradient(trainee.tensor.dtype)
            detail = f"its gradient has been zero since step {trainee.zero_since} of {num_steps}"
            return Verdict("stopped_training", trainee.place, cause, detail)
        is_still = has_changed and _stands_still(trainee, num_steps)
        if not is_still or is_excused or id(trainee.tensor) not in self._groups_of:
            return None
        # Where all gradients have all but vanished, training is done. Where only one has, its loss no longer counts.
        if are_at_optimum and not _is_short(trainee):
            return None
        cause = self._why_still(trainee)
        # A scalar that is held at a bound, such as a logit scale, keeps its bits while its gradient lives.
        is_bound = trainee.tensor.numel() == 1 and not _is_bias(trainee)
        # And L-BFGS ends by itself at its optimum.
        if cause == causes.TOO_SMALL and (is_bound or any(isinstance(o, LBFGS) for o in self._holders(trainee))):
            return None
        detail = f"has kept every bit since step {trainee.still_since} of {num_steps}"
        return Verdict("stopped_training", trainee.place, cause, detail)

    def _unstepped(self, trainee: Trainee) -> Verdict | None:
        """Whether backwards went on without a step: nobody calls `after_step` where an optimizer is attached."""
        steps = self._steps
        silent = steps.num_backwards - steps.num_backwards_stepped
        if (
            not steps.taken
            or silent < max(MANY, STILL * steps.num_backwards)
            or id(trainee.tensor) not in self._groups_of
        ):
            return None
        detail = f"no step was seen in the last {silent} of {steps.num_backwards} backwards"
        return Verdict("stopped_training", trainee.place, causes.NO_LONGER_SEEN, detail)

    def _why_still(self, trainee: Trainee) -> str:
        since = trainee.still_since
        if trainee.last_gradient <= since:
            return causes.CUT_OFF if trainee.tensor.requires_grad else causes.SWITCHED_OFF
        holders = [each for each in self._holders(trainee) if fires_hooks(each)]
        if holders and all(self._steps.last.get(id(each), 0) <= since for each in holders):
            return causes.NO_LONGER_STEPPED
        if all(self._steps.moving.get(group, 0) <= since for group in self._groups_of[id(trainee.tensor)]):
            return causes.RATE_FELL
        if trainee.slope == 0:
            return causes.of_zero_gradient(trainee.tensor.dtype)
        return causes.TOO_SMALL

    def _judge_held(self, trainee: Trainee, has_changed: bool, is_excused: bool, num_steps: int) -> Iterator[Verdict]:
        """What is wrong with a parameter that an optimizer holds, and that got no gradient, or stayed as it was."""
        late = self._steps.last_first_signal
        place, patience = trainee.place, SOME if late <= 3 else max(MANY, TIMES * late)
        if not trainee.had_gradient:
            # What moves without one is stepped elsewhere: inside the backward, or by a method of its own.
            if not has_changed and num_steps >= patience:
                was_zeroed = self._steps.num_backwards and self._was_empty(trainee)
                cause = causes.ZEROED_TOO_EARLY if was_zeroed else causes.NO_GRADIENT
                yield Verdict("never_received_grad", place, cause, "had no gradient whenever it was looked at")
            return
        stepped = any(not fires_hooks(each) or id(each) in self._steps.last for each in self._holders(trainee))
        moving = any(group in self._steps.moving for group in self._groups_of[id(trainee.tensor)])
        if num_steps < FEW:
            return
        if not has_changed and not stepped:
            detail = "received gradients, but was never stepped"
            yield Verdict("never_trained", place, self._why_not_stepped(trainee), detail)
        elif not has_changed and not moving:
            yield Verdict("never_trained", place, causes.ZERO_RATE, "its learning rate was 0 at every step")
        elif is_excused:
            return
        elif not trainee.had_signal and num_steps >= patience:
            detail = "its gradient was zero at every step"
            detail += ", and only decay or momentum moved it" if has_changed else ""
            cause = causes.of_zero_gradient(trainee.tensor.dtype)
            yield Verdict("never_received_grad", place, cause, detail)
        elif not has_changed and num_steps >= MANY:
            yield Verdict("never_trained", place, causes.TOO_SMALL, "received gradients, but kept every bit")

    def _why_not_stepped(self, trainee: Trainee) -> str:
        return causes.ZEROED_TOO_EARLY if self._was_empty(trainee) else causes.NEVER_STEPPED

    def _was_empty(self, trainee: Trainee) -> bool:
        """Whether its optimizer was called with no gradient there."""
        return any(self._steps.empty[id(each)] for each in self._holders(trainee))

    def _holders(self, trainee: Trainee) -> list[HoldsParameters]:
        mine = self._groups_of.get(id(trainee.tensor), [])
        return [each for each in self._optimizers if any(id(group) in mine for group in each.param_groups)]


def _stands_still(trainee: Trainee, num_steps: int) -> bool:
    """Whether it has changed, and then kept every bit for long."""
    still = num_steps - trainee.still_since
    return trainee.still_since > trainee.born and still >= max(MANY, STILL * (num_steps - trainee.born))


def _is_cut_off(trainee: Trainee, num_steps: int) -> bool:
    """Whether its gradient has been zero for much longer than ever before; decay and momentum may move it all along."""
    if trainee.zero_since is None or not trainee.num_slopes:
        return False
    least = max(MANY, STILL * (num_steps - trainee.born), TIMES * trainee.longest_zero)
    return num_steps - trainee.zero_since >= least


def _is_bias(trainee: Trainee) -> bool:
    """Whether it is what layers add to each channel; tables of more axes may be called so, and are none."""
    return "bias" in trainee.place.key and trainee.tensor.ndim <= 1


def _is_short(trainee: Trainee) -> bool:
    """Whether its type holds so few digits that updates round to nothing long before the optimum."""
    return trainee.tensor.dtype.itemsize < 4


def _is_fixed_by_design(place: Place) -> bool:
    """Whether a parameter that requires no gradient may be meant so, such as a table of positions.

    A layer of torch of which nothing requires a gradient is more likely to have been caught by mistake.
    """
    owner = place.owner
    is_layer = any(
        base.__module__.startswith("torch.nn.modules") and base.__module__ != nn.Module.__module__
        for base in type(owner).__mro__
        if base.__module__ != "torch.nn.modules.container"
    )
    beside = [each for key, each in owner._parameters.items() if key != place.key and each is not None]
    # Such as the bias of the norm layer in front of a classifier, whose weight trains.
    is_lone_bias = "bias" in place.key and any(each.requires_grad for each in beside)
    return not is_layer or isinstance(owner, nn.Embedding) or is_lone_bias
