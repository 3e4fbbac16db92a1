"""The checks of one phase: each method makes some of them, and returns its findings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.audit.report import Finding, PhaseRecord
from mtl.audit.watch import causes
from mtl.audit.watch.constancy import Constancy
from mtl.audit.watch.contract import AuditTarget, Contract, ModuleLinks, build_contract, shared_memory
from mtl.audit.watch.findings import FindingBuilder
from mtl.audit.watch.frozen_bytes import ByteWatch
from mtl.audit.watch.frozen_tensor import record_frozen
from mtl.audit.watch.gradients import GradientWatch
from mtl.audit.watch.identity import Identity
from mtl.audit.watch.judgement import FEW, Judge
from mtl.audit.watch.liveness import Liveness, StepCounts
from mtl.audit.watch.membership import OptimizerWatch
from mtl.audit.watch.optimizers import HoldsParameters, was_skipped
from mtl.audit.watch.ranks import compare_ranks
from mtl.audit.watch.tripwires import Tripwires
from mtl.patterns import PatternError, PatternLike, text_of
from mtl.runtime.fingerprint import root

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PhaseWatch:
    """The contract of one phase, and the state of its tensors when it began.

    Attributes:
        record: The checks and their result.
        every: Between steps, it checks after the first few and then after every N-th.
        equal_at: The last step after which all ranks had the same tensors.
    """

    every: int = 1
    equal_at: int = 0

    def __init__(
        self,
        name: str,
        target: AuditTarget,
        patterns: Sequence[PatternLike],
        idle: Sequence[PatternLike],
        optimizers: Sequence[HoldsParameters],
        full_digests: bool,
        written_at: Sequence[str],
        were_frozen: Collection[int],
    ) -> None:
        """Args: as for `GradientAudit.begin`; `were_frozen` has the identities of tensors frozen in earlier phases."""
        self._target = target
        self._optimizers = optimizers
        self._contract = build_contract(target, patterns)
        self._frozen = record_frozen(self._contract.frozen, full_digests)
        self._full = [frozen for frozen in self._frozen if frozen.place.is_full]
        self._tripwires = Tripwires(self._full)
        self._constancy = Constancy(self._contract)
        self._liveness = Liveness(self._contract, idle)
        digests = {frozen.place.name: frozen.full_digest for frozen in self._frozen}
        self.record = PhaseRecord(
            name, [text_of(p) for p in patterns], digests, root(digests), num_trainable=self._liveness.num_trainable
        )
        self._findings = findings = FindingBuilder(self.record, self._contract, written_at)
        self._frozen_earlier = were_frozen
        fixed = {*were_frozen, *(id(each.tensor) for each in self._liveness.trainables if each.was_fixed)}
        self._membership = OptimizerWatch(self._contract, optimizers, fixed, self._liveness.idle, findings)
        self._gradients = GradientWatch(self._contract, findings, on_new=self._membership.forget)
        self._links = ModuleLinks(self._contract)
        self._identity = Identity(self._frozen, findings)
        self._bytes = ByteWatch(self._frozen, self.record, optimizers, findings)
        self._modules = {id(module) for module in self._contract.modules.values()}
        self._is_rebuilt = self._has_checked_gradients = False
        self._found_in_backward: list[Finding] = []
        self._num_unstepped = 0

    def record_step(self, optimizer: Optimizer) -> bool:
        """Records a step of one optimizer, right after it.

        Returns:
            Whether no other optimizer has done this step of the loop yet: several may share one.
        """
        if was_skipped(optimizer):
            return False
        is_empty = all(p.grad is None for group in optimizer.param_groups for p in group["params"])
        step = self.record.num_steps + 1
        if not is_empty:
            self._membership.record_step(optimizer, self._liveness.steps.last)
        self._liveness.record_step(optimizer, step, is_empty)
        observed = self._liveness.num_observed
        if not is_empty and not self._has_checked_gradients and self._is_due(step):
            self._liveness.check_gradients(observed)
            self._liveness.record_rates([optimizer], step)
            if observed > step:
                # The loop does not call after_step.
                self._liveness.read_bytes(observed)
        return observed > self.record.num_steps

    @property
    def proven(self) -> Mapping[str, str]:
        """The fingerprints of all frozen tensors, if every byte was compared after the last step; else none."""
        return self.record.fingerprints if self._bytes.verified_at == self.record.num_steps else {}

    @property
    def num_unchecked(self) -> int:
        """How many of the next steps come before one in which a check is due."""
        next_step = self.record.num_steps + 1
        return next(number for number in range(self.every) if self._is_due(next_step + number))

    def count_steps(self, optimizer: Optimizer, number: int) -> None:
        """Counts steps of the loop, and of its optimizer, in which no check was due."""
        self.record.num_steps += number
        self._liveness.record_step(optimizer, self.record.num_steps, is_empty=False, number=number)

    def add_optimizer(self, optimizer: HoldsParameters) -> None:
        """Records an optimizer that was built in mid-phase."""
        self._membership.add(optimizer)

    def record_registration(self, module: nn.Module) -> None:
        """Records that a parameter, buffer or child was registered on a module."""
        self._is_rebuilt |= id(module) in self._modules

    @property
    def steps(self) -> StepCounts:
        """The counts of optimizer steps and backwards."""
        return self._liveness.steps

    def check_writes(self) -> None:
        """Inside a backward: checks the bytes of tensors that may be written; the next check has the findings."""
        self._found_in_backward += self._bytes.check_suspects(list(self._tripwires.tripped(self.record.num_steps + 1)))

    def requiring_grad(self) -> list[Tensor]:
        """The trainable tensors that require a gradient."""
        return self._liveness.requiring_grad()

    def at_begin(self) -> list[Finding]:
        """The violations that can be found before the first step."""
        found: list[Finding] = []
        for place, free in shared_memory(self._contract):
            detail = f"lies in the same memory as {free.name}, which is not frozen"
            found.append(self._findings.violation("shared_storage", place, causes.SHARED, detail))
        found += self._gradients.at_begin(self._full, self.record.num_steps)
        found += self._gradients.check_flags(self._full) + self._check_optimizers() + self._check_modes()
        self._membership.begin()
        return found

    def after_backward(self) -> list[Finding]:
        """Checks gradients, modes, and writes before the backward."""
        step = self.record.num_steps + 1
        self._num_unstepped += 1
        if not self._is_due(step):
            return []
        self.record.num_tripwire_checks += self._tripwires.num_due(step) + len(self._constancy.norms)
        # A loop that steps with a closure has no gradient here, but after the step.
        self._has_checked_gradients |= self._liveness.check_gradients(step)
        self._liveness.record_rates(self._optimizers, step)
        tripped = list(self._tripwires.tripped(step))
        found, self._found_in_backward = self._found_in_backward, []
        found += self._gradients.check(tripped) + self._gradients.check_flags(tripped)
        return found + self._bytes.check_suspects(tripped) + self._check_modes(step)

    def after_step(self, is_new: bool = True) -> list[Finding]:
        """Counts the step, if it is a new one; checks flags, identities, versions, and the bytes read in rotation."""
        record = self.record
        record.num_steps += is_new
        step, has_checked, self._has_checked_gradients = record.num_steps, self._has_checked_gradients, False
        self._num_unstepped = 0
        if not self._is_due(step):
            return []
        record.num_tripwire_checks += self._tripwires.num_due(step) + len(self._constancy.norms)
        if not has_checked:
            self._liveness.check_gradients(step)
            self._liveness.record_rates(self._optimizers, step)
        self._liveness.read_bytes(step)
        tripped = list(self._tripwires.tripped(step))
        found = self._gradients.check(tripped)
        if self._is_rebuilt or self._links.are_cut(step) or self._membership.is_outdated(step):
            found += self._check_rebuilt()
        else:
            found += [finding for each in tripped for finding in self._identity.check(each, each.place)]
        found += self._gradients.check_flags(tripped)
        found += self._identity.check_attributes() + self._bytes.after_step(tripped)
        # The modes after the backward are those of its forward.
        found += [] if has_checked else self._check_modes(step)
        return found + self._check_optimizers() if self._membership.is_due(step) else found

    def check_signs(self) -> list[Finding]:
        """Between two steps: compares the bytes of all tensors that may have been written."""
        # In a phase's first steps, all are due.
        tripped = list(self._tripwires.tripped(0))
        return self._bytes.check_suspects(tripped) + self._bytes.finish_reads()

    def verify(self, bytes_only: bool = False, counted: bool = True) -> list[Finding]:
        """Compares every byte of every frozen tensor."""
        found = [] if bytes_only else self._check_rebuilt()
        return found + self._bytes.verify(counted) + self._check_modes() + self._check_optimizers()

    def at_end(self) -> list[Finding]:
        """Compares every byte, and judges whether the trainable parameters trained."""
        self.record.num_steps = max(self.record.num_steps, self._liveness.num_observed)
        found = self._found_in_backward + self.verify()
        self._liveness.finish_reads()
        changed = self._liveness.changed(self.record.num_steps)
        self.record.num_trained = self._liveness.num_trained(changed)
        judge = Judge(self._liveness, self._contract, self._optimizers, self._frozen_earlier)
        for verdict in judge.verdicts(changed, self.record.num_steps):
            what = (verdict.kind, verdict.place, verdict.cause, verdict.detail)
            found.append(
                self._findings.hazard(*what) if verdict.is_hazard else self._findings.violation(*what, since=0)
            )
        backwards = max(self._num_unstepped, self._liveness.steps.num_backwards)
        if backwards and not self.record.num_steps:
            self.record.unproven = causes.NO_STEP_SEEN.format(number=backwards)
        return found

    def frozen_tensors(self) -> list[Tensor]:
        """The frozen tensors, without those of which only rows are frozen."""
        return [frozen.tensor for frozen in self._full]

    def restore(self) -> None:
        """Restores bits, flags and modes; a tensor that was replaced is only reported."""
        tied = self._membership.free_ids
        for frozen in self._frozen:
            # A tensor that is frozen under one name and free under another has no right bits.
            if id(frozen.tensor) not in tied or frozen.place.rows is not None:
                frozen.restore()
        for _, norm in self._constancy.norms:
            norm.eval()
        self._bytes.restart()

    def agree(self, group: ProcessGroup | None, buffers: bool) -> list[Finding]:
        """Tensors that differ between ranks, and the violations of other ranks."""
        differing, found = compare_ranks(self._contract, self.record.violations, group, buffers)
        if not differing:
            self.equal_at = self.record.num_steps
        return [*found, *(self._findings.ranks_differ(each, self.equal_at) for each in differing)]

    def finish_reads(self) -> list[Finding]:
        """Waits for pending reads of frozen bytes, and compares them."""
        return self._bytes.finish_reads()

    def state_dict(self) -> dict[str, Any]:
        """The state between two steps, as plain data; call `finish_reads` first."""
        return {
            "record": self.record.state_dict(),
            "bytes": self._bytes.state_dict(),
            "liveness": self._liveness.state_dict(self._optimizers),
            "every": self.every,
            "agreed_at": self.equal_at,
        }

    def resume(self, state: Mapping[str, Any]) -> list[Finding]:
        """Resumes the phase of a state instead of starting a new one.

        Raises:
            ValueError: It is the state of another phase or contract.
        """
        difference = self.record.difference_from(state["record"])
        if difference := difference or self._liveness.difference_from(state["liveness"], self._optimizers):
            raise ValueError(
                f"the phase {self.record.name!r} cannot be resumed: {difference}; begin it as before, or start another"
                " run"
            )
        self.record.load_state_dict(state["record"])
        self._liveness.load_state_dict(state["liveness"], self._optimizers)
        self.every, self.equal_at = state["every"], state["agreed_at"]
        found = self._bytes.resume(state["bytes"])
        self._gradients.resume(self._full)
        return found

    def _is_due(self, step: int) -> bool:
        return step <= FEW or step % self.every == 0

    def _check_rebuilt(self) -> list[Finding]:
        """Builds the contract again: finds added, removed and replaced tensors, and new trainable ones."""
        self._is_rebuilt = False
        try:
            now = build_contract(self._target, self._contract.patterns)
        except PatternError:
            # A pattern selects nothing any more: its tensors are gone, and the others are known by name.
            left = [place for place in self._target.inventory().places if place.name in self.record.fingerprints]
            return self._identity.compare(Contract((), left, [], {}, [], {}))
        self._membership.update(now)
        self._findings.add_patterns(now)
        self._liveness.add_new(now, self.record.num_steps)
        self._links = ModuleLinks(now)
        self._modules |= {id(module) for module in now.modules.values()}
        return self._identity.compare(now)

    def _check_optimizers(self) -> list[Finding]:
        return self._membership.check(self._gradients.with_gradients)

    def _check_modes(self, step: int = 0) -> list[Finding]:
        """Modules whose modes make their output vary; many modules are checked in rotation, unless no step is given."""
        return [self._findings.module_hazard(*what) for what in self._constancy.check(step)]
