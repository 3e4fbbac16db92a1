"""What is looked at during one phase: each method looks, and says what it found."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.audit.report import Finding, PhaseRecord, Violation
from mtl.audit.watch import causes
from mtl.audit.watch.constancy import Constancy
from mtl.audit.watch.contract import Contract, Links, Subject, draw_contract, shared_memory
from mtl.audit.watch.findings import Findings
from mtl.audit.watch.frozen_bytes import ByteWatch
from mtl.audit.watch.frozen_tensor import Watched
from mtl.audit.watch.identity import Identity
from mtl.audit.watch.judgement import FEW, Judge
from mtl.audit.watch.liveness import Liveness, Steps
from mtl.audit.watch.membership import HoldsParameters, was_skipped
from mtl.audit.watch.optimizers import Holders
from mtl.audit.watch.ranks import compare_ranks
from mtl.audit.watch.tripwires import Tripwires
from mtl.patterns import PatternError, PatternLike, text_of
from mtl.runtime.fingerprint import root

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        written_at: Sequence[str] = (),
        were_frozen: Collection[int] = (),
    ) -> None:
        """Args: as `GradientAudit` and its `phase` have them; `were_frozen` has what earlier phases froze, by identity.

        Raises:
            PatternError: A pattern cannot be read or selects nothing.
        """
        self._subject = subject
        self._optimizers = optimizers
        self._contract = draw_contract(subject, patterns)
        self._watched = [
            Watched(place, tensor, whole) for place in self._contract.frozen if (tensor := place.look()) is not None
        ]
        self._whole = [watched for watched in self._watched if watched.place.is_held_whole]
        self._tripwires = Tripwires(self._whole)
        self._constancy = Constancy(self._contract)
        self._liveness = Liveness(self._contract, idle)
        digests = {watched.place.name: watched.whole_digest for watched in self._watched}
        self.record = PhaseRecord(
            name, [text_of(p) for p in patterns], digests, root(digests), num_trainable=self._liveness.num_trainable
        )
        self._findings = Findings(self.record, self._contract, written_at)
        self._were_frozen = {*were_frozen, *(id(each.tensor) for each in self._liveness.trainees if each.was_fixed)}
        self._holders = Holders(self._contract, optimizers, self._were_frozen, self._liveness.idle, self._findings)
        self._frozen_earlier = were_frozen
        self._links = Links(self._contract)
        self._identity = Identity(self._watched, self._findings)
        self._bytes = ByteWatch(self._watched, self.record, optimizers, self._findings)
        self._modules = {id(module) for module in self._contract.modules.values()}
        self._with_gradients: set[int] = set()
        self._is_rebuilt = False
        self._found_within: list[Finding] = []
        self._num_unstepped = 0
        self._has_looked = False

    def note_step(self, optimizer: Optimizer) -> bool:
        """Takes note of a step of one optimizer, right behind it.

        Returns:
            Whether it is one that no other optimizer has done yet: several of them may share the steps of a loop.
        """
        if was_skipped(optimizer):
            return False
        is_empty = all(p.grad is None for group in optimizer.param_groups for p in group["params"])
        step = self.record.num_steps + 1
        if not is_empty:
            self._holders.note_step(optimizer, self._liveness.steps.last)
        self._liveness.note_step(optimizer, step, is_empty)
        noted = self._liveness.num_noted
        if not is_empty and not self._has_looked:
            self._liveness.look_at_gradients(noted)
            self._liveness.look_at_rates([optimizer], step)
            if noted > step:
                # Nobody calls after_step.
                self._liveness.look_at_bytes(noted)
        return noted > self.record.num_steps

    def note_watched(self, optimizer: HoldsParameters) -> None:
        """Takes note of an optimizer that was built in mid-phase."""
        self._holders.note_watched(optimizer)

    def note_registration(self, module: nn.Module) -> None:
        """Takes note that something new was registered on a module."""
        self._is_rebuilt |= id(module) in self._modules

    @property
    def steps(self) -> Steps:
        """What was seen of the optimizers."""
        return self._liveness.steps

    def note_writes(self) -> None:
        """Inside a backward: looks at the bytes of what shows a sign of a write; the next look says what was found."""
        self._found_within += self._bytes.look_at(list(self._tripwires.tripped(self.record.num_steps + 1)))

    def trained(self) -> list[Tensor]:
        """What is meant to train and asks for a gradient."""
        return self._liveness.asking()

    def at_begin(self) -> list[Finding]:
        """What can be wrong before the first step."""
        found: list[Finding] = []
        for frozen, free in shared_memory(self._contract):
            detail = f"lies in the same memory as {free.name}, which is not frozen"
            found.append(self._findings.violation("shared_storage", frozen, causes.SHARED, detail))
        for watched in self._whole:
            if watched.tensor.grad is not None:
                detail = f"has a gradient before the {'next' if self.record.num_steps else 'first'} step"
                found.append(self._findings.violation("grad_present", watched.place, causes.STALE_GRADIENT, detail))
                self._note_gradient(watched)
        found += self._flags(self._whole) + self._holders.look(self._with_gradients) + self._modes()
        self._holders.begun()
        return found

    def after_backward(self) -> list[Finding]:
        """Gradients, modes, and what was written to before the backward."""
        step = self.record.num_steps + 1
        self._num_unstepped += 1
        if not self._is_due(step):
            return []
        self.record.num_tripwire_checks += self._tripwires.num_looked_at(step) + len(self._constancy.norms)
        # Whoever steps with a closure has no gradient here, but after the step.
        self._has_looked |= self._liveness.look_at_gradients(step)
        self._liveness.look_at_rates(self._optimizers, step)
        tripped = list(self._tripwires.tripped(step))
        found, self._found_within = self._found_within, []
        found += self._gradients(tripped) + self._flags(tripped)
        return found + self._bytes.look_at(tripped) + self._modes(step)

    def after_step(self, is_new: bool = True) -> list[Finding]:
        """Counts the step, if it is a new one; flags, identities, signs, and what the rotation has read."""
        record = self.record
        record.num_steps += is_new
        step, has_looked, self._has_looked = record.num_steps, self._has_looked, False
        self._num_unstepped = 0
        if not self._is_due(step):
            return []
        record.num_tripwire_checks += self._tripwires.num_looked_at(step) + len(self._constancy.norms)
        if not has_looked:
            self._liveness.look_at_gradients(step)
            self._liveness.look_at_rates(self._optimizers, step)
        self._liveness.look_at_bytes(step)
        tripped = list(self._tripwires.tripped(step))
        found = self._gradients(tripped)
        if self._is_rebuilt or self._links.are_cut(step) or self._holders.is_outdated(step):
            found += self._rebuilt()
        else:
            found += [finding for each in tripped for finding in self._identity.of(each, each.place)]
        found += self._flags(tripped) + self._identity.of_attributes() + self._bytes.look(tripped)
        # Those after the backward are the ones that its forward had.
        found += [] if has_looked else self._modes(step)
        return found + self._holders.look(self._with_gradients) if self._holders.is_due(step) else found

    def _is_due(self, step: int) -> bool:
        return step <= FEW or step % self.every == 0

    def verify(self, bytes_only: bool = False, counted: bool = True) -> list[Finding]:
        """Every byte of every frozen tensor, whatever the signs say."""
        found = [] if bytes_only else self._rebuilt()
        return found + self._bytes.verify(counted) + self._modes() + self._holders.look(self._with_gradients)

    def at_end(self) -> list[Finding]:
        """Every byte once more, and whether what was meant to train did."""
        self.record.num_steps = max(self.record.num_steps, self._liveness.num_noted)
        found = self._found_within + self.verify()
        self._liveness.settle()
        changed = self._liveness.changed(self.record.num_steps)
        self.record.num_trained = self._liveness.num_trained(changed)
        judge = Judge(
            self._liveness.trainees, self._liveness.steps, self._contract, self._optimizers, self._frozen_earlier
        )
        for verdict in judge.verdicts(changed, self.record.num_steps):
            said = (verdict.kind, verdict.place, verdict.cause, verdict.detail)
            found.append(
                self._findings.hazard(*said) if verdict.is_hazard else self._findings.violation(*said, since=0)
            )
        backwards = max(self._num_unstepped, self._liveness.steps.num_backwards)
        if backwards and not self.record.num_steps:
            self.record.unproven = causes.NO_STEP_SEEN.format(number=backwards)
        return found

    def frozen_tensors(self) -> list[Tensor]:
        """What is frozen whole."""
        return [watched.tensor for watched in self._whole]

    def put_back(self) -> None:
        """Puts back what can be put back: bits, flags and modes; a tensor that was replaced is only reported."""
        tied = self._holders.free_ids
        for watched in self._watched:
            # What is frozen under one name and free under another has no bits that are right.
            if id(watched.tensor) not in tied or watched.place.rows is not None:
                watched.put_back()
        for _, norm in self._constancy.norms:
            norm.eval()
        self._bytes.restart()

    def agree(self, group: ProcessGroup | None, buffers: bool) -> list[Finding]:
        """What is not the same on all ranks, and what other ranks have found."""
        apart, found = compare_ranks(self._contract, self.record.violations, group, buffers)
        if not apart:
            self.agreed_at = self.record.num_steps
        step, phase = self.record.num_steps, self.record.name
        differing = [
            Violation("ranks_differ", each.name, phase, step, each.cause, each.detail, self.agreed_at) for each in apart
        ]
        return [*found, *differing]

    def settle(self) -> list[Finding]:
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

    def go_on(self, state: Mapping[str, Any]) -> list[Finding]:
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
        found = self._bytes.go_on(state["bytes"])
        self._with_gradients = {id(each.tensor) for each in self._whole if each.had_gradient}
        return found

    def _gradients(self, watched: Sequence[Watched]) -> list[Finding]:
        found: list[Finding] = []
        for each in watched:
            if each.tensor.grad is not None:
                cause = causes.STALE_GRADIENT if each.had_gradient else causes.GRADIENT_BY_HAND
                if each.tensor.requires_grad:
                    cause = causes.LATE_FREEZE
                found.append(self._findings.violation("grad_present", each.place, cause, "has a gradient"))
                self._note_gradient(each)
        return found

    def _note_gradient(self, watched: Watched) -> None:
        if not watched.had_gradient:
            watched.had_gradient = True
            self._with_gradients.add(id(watched.tensor))
            # Whoever holds it could move it from now on.
            self._holders.forget()

    def _flags(self, watched: Sequence[Watched]) -> list[Finding]:
        """Flags that are on; one alone moves nothing, as behind a detach, but with a gradient it breaks the freeze."""
        found: list[Finding] = []
        for each in watched:
            if each.tensor.requires_grad:
                cause = causes.of_flag(each.tensor, self._contract.around(each.place)) or causes.STILL_REQUIRED
                make = self._findings.violation if each.had_gradient else self._findings.hazard
                found.append(make("requires_grad", each.place, cause, "requires a gradient"))
        return found

    def _rebuilt(self) -> list[Finding]:
        """Draws the contract once more: what has come, what is gone, and what else trains by now."""
        self._is_rebuilt = False
        try:
            now = draw_contract(self._subject, self._contract.patterns)
        except PatternError:
            # A pattern selects nothing any more: what it froze is gone, and the rest is known by name.
            left = [place for place in self._subject.inventory().places if place.name in self.record.fingerprints]
            return self._identity.compare(Contract((), left, [], {}, [], {}))
        self._holders.renew(now)
        self._findings.know(now)
        self._liveness.adopt(now, self.record.num_steps)
        self._links = Links(now)
        self._modules |= {id(module) for module in now.modules.values()}
        return self._identity.compare(now)

    def _modes(self, step: int = 0) -> list[Finding]:
        """What is not constant by the modes of modules; of many, in turn, unless no step is given."""
        return [self._findings.hazard_of(*said) for said in self._constancy.look(step)]
