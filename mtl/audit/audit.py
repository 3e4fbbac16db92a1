"""`GradientAudit`: checks the contract of each phase between steps, and proves it at the phase's end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.audit.epochs import Patterns
from mtl.audit.policy import Policy, Reporter
from mtl.audit.report import Finding, PhaseRecord, Report
from mtl.audit.watch.contract import AuditTarget
from mtl.audit.watch.hooks import Hooks
from mtl.audit.watch.optimizers import HoldsParameters, checked, optimizers_inside, without
from mtl.audit.watch.phase import PhaseWatch
from mtl.patterns import as_list

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FORMAT = 1  # of the state


class GradientAudit:
    """Proves that frozen tensors stay bit-identical and receive no gradient, and that trainable parameters train.

    Between steps it checks cheap signs of a change (tripwires), the bytes of small buffers, and a few parameters' bytes
    in rotation, with no host sync on a GPU; `verify` and the end of a phase compare the bytes of every frozen tensor. A
    version counter that moved triggers a comparison of bytes, and is never itself a verdict. Changes between two phases
    are not observed. It keeps a copy of every frozen tensor on the host.
    """

    def __init__(
        self,
        model: nn.Module,
        freeze: Patterns = (),
        optimizers: Sequence[HoldsParameters] = (),
        policy: Policy = "raise",
        also: Mapping[str, nn.Module] | None = None,
        ema: nn.Module | None = None,
        whole: bool = False,
        strict: bool = False,
    ) -> None:
        """Args:
            model: The audited module; of a wrapper (DDP, torch.compile), the module inside it.
            freeze: Patterns (`mtl.patterns`) of frozen tensors, unless `phase` has others; rows: `head.weight[0:10]`.
            optimizers: Every optimizer that steps parameters of the model; without any, training is not checked.
            policy: What a violation does: raise `AuditError`, warn, only collect, or restore frozen bits, flags, modes.
            also: Other modules that are trained, such as losses with parameters, by the prefix of their names.
            ema: An averaged copy of the model, whose copies of frozen tensors must keep their bits too (`ema.*`).
            whole: Whether the report has fingerprints of full tensors where they are sharded (FSDP); every process
                then has to begin every phase. Comparisons are of each process's shards.
            strict: Whether a hazard, which could break the freeze or makes a frozen module's output vary, is a
                violation; if not, it is listed in the report and warned of once (under `collect`, only listed).

        Raises:
            ValueError: The policy is none of these.
            TypeError: `optimizers` is no list of optimizers.
        """
        self._reporter = Reporter(policy, strict)
        self.report = Report()
        self._target = AuditTarget(model, dict(also or {}), ema)
        self._freeze, self._full_digests = as_list(freeze), whole
        self._optimizers, self._attached = checked(optimizers), list[Optimizer]()
        self._open: PhaseWatch | None = None
        self._hooks: Hooks | None = None
        self._stopped: dict[str, Any] | None = None
        # By identity; held, so that no other tensor can get the same address.
        self._were_frozen: dict[int, Tensor] = {}

    def watch(self, optimizer: HoldsParameters) -> None:
        """Adds an optimizer that was built after the audit.

        In mid-phase it may replace another one with the same parameters: while only one of the two steps, no parameter
        counts as held by both. `unwatch` the old one if it is gone.
        """
        new = checked([optimizer])
        if self._open is not None:
            self._open.add_optimizer(optimizer)
        self._optimizers += new
        if self._hooks is not None:
            self._hooks.register(optimizer)

    def unwatch(self, optimizer: HoldsParameters) -> None:
        """Removes an optimizer, such as one that was rebuilt.

        Raises:
            ValueError: It was not watched.
        """
        gone = without(self._optimizers, optimizer)
        self._attached[:] = [each for each in self._attached if id(each) not in gone]
        if self._hooks is not None:
            self._hooks.unregister(gone)

    def attach(self, *optimizers: Optimizer) -> None:
        """Audits every step of these optimizers by hooks: a loop then needs no call of the audit but `phase`.

        Optimizers that step in turn share the count, which is that of the most frequent one. They have no hook while no
        phase is open. Of a wrapper, the optimizers inside it are hooked.

        Raises:
            TypeError: The steps of one of them cannot be hooked.
        """
        inner = [each for optimizer in checked(optimizers) for each in optimizers_inside(optimizer)]
        self._attached += inner
        for optimizer in inner:
            self.watch(optimizer)

    @contextmanager
    def phase(
        self,
        name: str,
        freeze: Patterns | None = None,
        optimizers: Sequence[HoldsParameters] | None = None,
        idle: Patterns = (),
        written_at: Sequence[str] = (),
    ) -> Iterator[PhaseRecord]:
        """A phase as a `with` block, which an exception leaves unproven; arguments and errors of `begin` and `end`."""
        record = self.begin(name, freeze, optimizers, idle, written_at)
        watch = self._open
        try:
            yield record
            if self._open is watch:  # not ended by hand
                self.end()
        finally:
            if self._open is watch:
                self.abandon()

    def begin(
        self,
        name: str,
        freeze: Patterns | None = None,
        optimizers: Sequence[HoldsParameters] | None = None,
        idle: Patterns = (),
        written_at: Sequence[str] = (),
    ) -> PhaseRecord:
        """Opens a phase and fingerprints its frozen tensors; or resumes the phase of a loaded state.

        Args:
            name: The phase's name in the report.
            freeze: Patterns of this phase, if they differ from the audit's.
            optimizers: Optimizers of this phase and of later ones, if they differ from before.
            idle: Patterns of trainable parameters that are allowed not to train.
            written_at: Where each pattern was written, such as `configs/scenes.yaml:34`, for messages.

        Raises:
            PatternError: A pattern cannot be read or selects nothing.
            ValueError: A frozen tensor's bytes cannot be read, `ema` has none of the frozen tensors, a name in `also`
                is taken, or the loaded state is of another phase.
            AuditError: Under the policy `raise`, the contract is broken already.
            RuntimeError: Another phase is open.
        """
        if self._open is not None:
            raise RuntimeError(f"phase {self._open.record.name!r} is still open")
        if optimizers is not None:
            self._optimizers = checked(optimizers)
        patterns = self._freeze if freeze is None else as_list(freeze)
        watch = PhaseWatch(
            *(name, self._target, patterns, as_list(idle), self._optimizers, self._full_digests, written_at),
            were_frozen=self._were_frozen.keys(),
        )
        self._start(watch)
        return watch.record

    def end(self) -> None:
        """Closes the phase: compares every frozen byte, and checks that the trainable parameters trained.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        watch = self._watch()
        try:
            self._handle(watch.at_end())
            watch.record.completed = True
            self._were_frozen |= {id(tensor): tensor for tensor in watch.frozen_tensors()}
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Closes the phase, if one is open, with nothing proven: its record is not completed."""
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = self._open = None

    def after_backward(self) -> None:
        """Call between `backward()` and `step()`: no frozen tensor may have a gradient.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        self._handle(self._watch().after_backward())

    def after_step(self) -> None:
        """Call after `step()`: counts the step, and checks every frozen tensor's flags, identity and version.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        self._handle(self._watch().after_step())
        if self._hooks is not None:
            self._hooks.stop_counting_backwards()

    def look_every(self, steps: int) -> None:
        """For the rest of the phase, checks every N-th step only; `verify` and the phase's end compare all bytes."""
        self._watch().every = steps

    @property
    def proven(self) -> Mapping[str, str]:
        """Fingerprints of the frozen tensors whose bytes were compared after the last step; none if one differed."""
        return self._open.proven if self._open is not None and self.holds else {}

    @property
    def num_unchecked(self) -> int:
        """How many of the next steps come before one in which a check is due; see `look_every`."""
        return self._watch().num_unchecked

    @contextmanager
    def unchecked(self, optimizer: Optimizer, number: int) -> Iterator[None]:
        """A block of steps in which no check is due, and no hook is called; they are counted when it ends.

        Args:
            optimizer: The only one that steps in it.
            number: How many steps; at most `num_unchecked`.
        """
        watch, hooks = self._watch(), self._hooks
        assert hooks is not None and number <= watch.num_unchecked
        with hooks.suspended(self._optimizers):
            yield
        watch.count_steps(optimizer, number)

    @property
    def holds(self) -> bool:
        """Whether a phase is open and has no violation so far."""
        return self._open is not None and not self._open.record.violations

    def verify(self, bytes_only: bool = False, counted: bool = True) -> None:
        """Compares every frozen byte with its original; call it before a checkpoint, too.

        Args:
            bytes_only: Whether to skip the search for modules and tensors that were added or replaced.
            counted: Whether the report counts it; one that passes does not depend on any that are not counted.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        self._handle(self._watch().verify(bytes_only, counted))

    def check_signs(self) -> None:
        """Compares the bytes of frozen tensors that show a sign of a write, such as a version counter that moved.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        self._handle(self._watch().check_signs())

    def agree(self, group: ProcessGroup | None = None, buffers: bool = False) -> None:
        """Compares this rank's tensors with those of all others, bit for bit.

        Every rank calls it after the same step, and each records the violations of all.

        Args:
            group: The ranks, with a backend for the CPU (gloo); all by default.
            buffers: Whether to compare buffers that are not frozen: synchronised ones, or none of BatchNorm.

        Raises:
            AuditError: Under the policy `raise`, they differ.
        """
        self._handle(self._watch().agree(group, buffers))

    def state_dict(self) -> dict[str, Any]:
        """The audit's state between two steps, in mid-phase too, as plain data for JSON.

        Waits for pending reads. It has fingerprints only: save the tensors with it, and one state for each process.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        if self._open is None:
            return {"format": _FORMAT, "phases": self.report.state_dict(), "open": deepcopy(self._stopped)}
        self._handle(self._open.finish_reads())
        return {"format": _FORMAT, "phases": self.report.state_dict()[:-1], "open": self._open.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the state of an audit in another process; call it before any phase.

        If a phase was open there, the next `begin` resumes it, and must have its name, contract and param groups; every
        frozen byte is compared with its original. The report is that of a run which never stopped. The policy `restore`
        cannot restore what was changed in between.

        Raises:
            RuntimeError: There was a phase already.
            ValueError: It is no state of this version.
        """
        if self.report.phases:
            raise RuntimeError("expected an audit without phases to load a state into; load it before any phase")
        if state.get("format") != _FORMAT:
            raise ValueError(f"expected an audit's state of format {_FORMAT}, got {state.get('format')!r}")
        self.report.load_state_dict(state["phases"])
        self._stopped = deepcopy(state["open"])

    def _start(self, watch: PhaseWatch) -> None:
        found = watch.resume(self._stopped) if self._stopped is not None else []
        self._open, self._stopped = watch, None
        self._reporter.begin(watch.record)
        self.report.phases.append(watch.record)
        try:
            self._hooks = Hooks(watch, self._attached, self.after_backward, self._after_hooked_step)
            self._hooks.register_all(self._optimizers)
            self._handle(found + watch.at_begin())
        except BaseException:
            self.abandon()
            raise

    def _after_hooked_step(self, is_attached: bool, optimizer: Optimizer) -> None:
        is_new = self._watch().record_step(optimizer)
        if is_attached:
            self._handle(self._watch().after_step(is_new))

    def _watch(self) -> PhaseWatch:
        if self._open is None:
            raise RuntimeError("no phase is open: the audit works inside `with audit.phase(name):`")
        return self._open

    def _handle(self, found: Sequence[Finding]) -> None:
        watch = self._watch()
        self._reporter.handle(watch.record, found, watch.restore)
