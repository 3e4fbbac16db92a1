"""What is looked at during one phase: each method looks, and says what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from mtl.audit import causes
from mtl.audit.agreement import compare_ranks
from mtl.audit.bytewatch import ByteWatch
from mtl.audit.contract import Contract, Subject, draw_contract, shared_memory
from mtl.audit.fingerprint import root
from mtl.audit.liveness import FEW, Liveness
from mtl.audit.membership import HoldsParameters, Membership
from mtl.audit.places import Place
from mtl.audit.report import PhaseRecord, Violation
from mtl.audit.watched import Watched
from mtl.patterns import PatternError, PatternLike, text_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MEMBERSHIP = {
    "in_optimizer": "is held by an optimizer, whose decay or momentum could move it",
    "not_in_optimizer": "is not frozen and requires a gradient, but no optimizer holds it",
    "in_several_groups": "is held by more than one param group",
}


class PhaseWatch:
    """The contract of one phase, and how everything was when it began.

    Attributes:
        record: What was checked, and with what result.
        every: Between steps, it looks at the first few and then at every so many.
        agreed_at: The last step after which all ranks were found to hold the same.
    """

    every: int = 1
    agreed_at: int = 0

    def __init__(
        self,
        name: str,
        subject: Subject,
        patterns: Sequence[PatternLike],
        idle: Sequence[PatternLike],
        optimizers: Sequence[HoldsParameters],
        whole: bool = False,
    ) -> None:
        """Args: as `GradientAudit` and its `phase` have them.

        Raises:
            PatternError: A pattern cannot be read or selects nothing.
        """
        self._subject = subject
        self._optimizers = optimizers
        self._contract = draw_contract(subject, patterns)
        self._membership = Membership(self._contract)
        self._free_at_first = self._membership.free
        self._has_begun = False
        self._watched = [
            Watched(place, tensor, whole) for place in self._contract.frozen if (tensor := place.look()) is not None
        ]
        self._whole = [watched for watched in self._watched if watched.place.is_held_whole]
        self._liveness = Liveness(self._contract, idle)
        norms = {
            id(watched.place.owner): (watched.place.module_name, watched.place.owner)
            for watched in self._whole
            if watched.place.kind == "buffer" and isinstance(watched.place.owner, _NormBase)
        }
        self._frozen_norms = list(norms.values())
        digests = {watched.place.name: watched.whole_digest for watched in self._watched}
        self.record = PhaseRecord(
            name, [text_of(p) for p in patterns], digests, root(digests), num_trainable=self._liveness.num_trainable
        )
        self._bytes = ByteWatch(self._watched, self.record, optimizers)

    def note_step(self, optimizer: Optimizer) -> bool:
        """Takes note of a step of one optimizer, right behind it.

        Returns:
            Whether it is one that no other optimizer has done yet: several of them may share the steps of a loop.
        """
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            self._liveness.note_step(optimizer)
            self._liveness.look_at_gradients(self._liveness.num_noted)
            self._liveness.look_at_rates([optimizer])
        return self._liveness.num_noted > self.record.num_steps

    def note_backward(self) -> None:
        """Takes note of a backward that reached something which trains."""
        self._liveness.num_backwards += 1

    def trained(self) -> list[Tensor]:
        """What is meant to train and asks for a gradient."""
        return self._liveness.asking()

    def at_begin(self) -> list[Violation]:
        """What can be wrong before the first step."""
        found = []
        for frozen, free in shared_memory(self._contract):
            detail = f"lies in the same memory as {free.name}, which is not frozen"
            found.append(self._violation("shared_storage", frozen, causes.SHARED, detail))
        for watched in self._whole:
            if watched.tensor.requires_grad:
                found.append(self._still_required(watched))
            if watched.tensor.grad is not None:
                detail = f"has a gradient before the {'next' if self.record.num_steps else 'first'} step"
                found.append(self._violation("grad_present", watched.place, causes.STALE_GRADIENT, detail))
                watched.had_gradient = True
        found += self._optimizer_membership()
        self._has_begun = True
        return found

    def after_backward(self) -> list[Violation]:
        """Gradients, and modes."""
        if not self._is_due(self.record.num_steps + 1):
            return []
        self.record.num_tripwire_checks += len(self._whole) + len(self._frozen_norms)
        self._liveness.look_at_gradients(self.record.num_steps + 1)
        self._liveness.look_at_rates(self._optimizers)
        return self._gradients() + self._train_mode()

    def after_step(self, is_new: bool = True) -> list[Violation]:
        """Counts the step, if it is a new one; flags, identities, signs, and what the rotation has read."""
        record = self.record
        record.num_steps += is_new
        if not self._is_due(record.num_steps):
            return []
        record.num_tripwire_checks += len(self._watched) + len(self._frozen_norms)
        # Whoever does not call after_backward (closures) has the gradients here.
        self._liveness.look_at_gradients(record.num_steps)
        self._liveness.look_at_rates(self._optimizers)
        found = self._gradients()
        if self._contract.is_unlinked() or self._membership.is_outdated():
            found += self._replaced()
        suspects: set[int] = set()
        for watched in self._whole:
            if watched.place.look() is not watched.tensor:
                found += self._another(watched, watched.place)
                continue
            if watched.tensor.requires_grad:
                found.append(self._still_required(watched))
            if watched.shows_a_sign():
                # BatchNorm's statistics move without a sign, its counter does not: the whole module is suspected.
                suspects.add(id(watched.place.owner))
        found += self._bytes.look(suspects)
        return found + self._train_mode() + self._optimizer_membership()

    def _is_due(self, step: int) -> bool:
        return step <= FEW or step % self.every == 0

    def verify(self, bytes_only: bool = False, counted: bool = True) -> list[Violation]:
        """Every byte of every frozen tensor, whatever the signs say."""
        found = [] if bytes_only else self._replaced()
        return found + self._bytes.verify(counted) + self._train_mode() + self._optimizer_membership()

    def at_end(self) -> list[Violation]:
        """Every byte once more, and whether what was meant to train did."""
        found = self.verify()
        changed = self._liveness.changed()
        self.record.num_trained = self._liveness.num_trained(changed)
        for finding in self._liveness.judge(changed, self.record.num_steps, self._optimizers):
            found.append(self._violation(finding.kind, finding.place, finding.cause, finding.detail, since=0))
        return found

    def put_back(self) -> None:
        """Puts back what can be put back: bits, flags and modes; a tensor that was replaced is only reported."""
        tied = {id(tensor) for tensor in self._membership.free.values()}
        for watched in self._watched:
            # What is frozen under one name and free under another has no bits that are right.
            if id(watched.tensor) not in tied or watched.place.rows is not None:
                watched.put_back()
        for _, norm in self._frozen_norms:
            norm.eval()
        self._bytes.restart()

    def agree(self, group: ProcessGroup | None, buffers: bool) -> list[Violation]:
        """What is not the same on all ranks, and what other ranks have found."""
        apart, found = compare_ranks(self._contract, self.record.violations, group, buffers)
        if not apart:
            self.agreed_at = self.record.num_steps
        return found + [
            self.record.breach("ranks_differ", each.name, each.cause, each.detail, since=self.agreed_at)
            for each in apart
        ]

    def settle(self) -> list[Violation]:
        """What was asked for and has not come yet; it is waited for."""
        return self._bytes.settle()

    def state(self) -> dict[str, Any]:
        """All that is known of the phase between two steps, as plain data; `settle` comes first."""
        return {
            "record": self.record.state(),
            "bytes": self._bytes.state(),
            "liveness": self._liveness.state(self._optimizers),
            "every": self.every,
            "agreed_at": self.agreed_at,
        }

    def go_on(self, state: Mapping[str, Any]) -> list[Violation]:
        """Goes on with the phase of a state, in place of a new one.

        Raises:
            ValueError: It is the state of another phase or contract.
        """
        difference = self.record.differs_from(state["record"])
        if difference := difference or self._liveness.differs_from(state["liveness"], self._optimizers):
            raise ValueError(
                f"the phase {self.record.name!r} cannot go on where it was stopped: {difference}; begin it as it was"
                " begun then, or begin another run"
            )
        self.record.take_over(state["record"])
        self._liveness.take_over(state["liveness"], self._optimizers)
        self.every, self.agreed_at = state["every"], state["agreed_at"]
        return self._bytes.go_on(state["bytes"])

    def _gradients(self) -> list[Violation]:
        found = []
        for watched in self._whole:
            if watched.tensor.grad is not None:
                cause = causes.STALE_GRADIENT if watched.had_gradient else causes.GRADIENT_BY_HAND
                if watched.tensor.requires_grad:
                    cause = causes.LATE_FREEZE
                found.append(self._violation("grad_present", watched.place, cause, "has a gradient"))
                watched.had_gradient = True
        return found

    def _still_required(self, watched: Watched) -> Violation:
        cause = causes.of_flag(watched.tensor, self._contract.around(watched.place)) or causes.STILL_REQUIRED
        return self._violation("requires_grad", watched.place, cause, "requires a gradient")

    def _replaced(self) -> list[Violation]:
        """Tensors that hang behind the line by now, and did not when the phase began; and those that are gone."""
        try:
            now = draw_contract(self._subject, self._contract.patterns)
        except PatternError:
            now = Contract((), [], [], {}, [])  # nothing of what was frozen is left; each tensor is found to be gone
        else:
            self._membership = Membership(now)
            self._contract = replace(self._contract, links=now.links)
        there = {place.name: place for place in now.frozen}
        known = {place.name for place in self._contract.frozen}
        found = []
        for watched in self._watched:
            found += self._another(watched, there.get(watched.place.name))
        detail = "was not there when the phase began"
        newcomers = [place for place in now.frozen if place.kind != "attr" and place.name not in known]
        return found + [self._violation("identity_changed", p, causes.REPLACED, detail) for p in newcomers]

    def _another(self, watched: Watched, place: Place | None) -> list[Violation]:
        """Whether another tensor hangs by now where a frozen one hung; `place` is what has its name now."""
        current = None if place is None else place.look()
        # What a module remembers of its last forward is a new tensor each time; only parameters and buffers stay.
        if current is watched.tensor or watched.place.kind == "attr":
            return []
        detail = "is gone" if current is None else "is another tensor than when the phase began"
        is_same_module = place is None or place.owner is watched.place.owner
        cause = causes.of_replacement(watched.place) if is_same_module else causes.REPLACED
        return [self._violation("identity_changed", watched.place, cause, detail)]

    def _train_mode(self) -> list[Violation]:
        return [
            self.record.breach("train_mode", name, causes.TRAIN_MODE, f"{type(norm).__name__} is in train mode")
            for name, norm in self._frozen_norms
            if norm.training
        ]

    def _optimizer_membership(self) -> list[Violation]:
        breaches = self._membership.look(self._optimizers)
        return [self._violation(kind, place, self._why(kind, place), _MEMBERSHIP[kind]) for kind, place in breaches]

    def _why(self, kind: str, place: Place) -> str:
        """The cause of a breach of membership."""
        if kind == "in_optimizer":
            return causes.ADDED_LATER if self._has_begun else causes.EARLY_OPTIMIZER
        if kind == "in_several_groups":
            return causes.TWICE
        is_first = self._free_at_first.get(place.name) is place.look()
        return causes.LATE_THAW if is_first else causes.TRAINED_REPLACED

    def _violation(self, kind: str, place: Place, cause: str, detail: str, since: int | None = None) -> Violation:
        return self.record.breach(kind, place.name, cause, detail, since)
