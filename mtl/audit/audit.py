"""`GradientAudit`: the contract of each phase, checked between steps and proven at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.audit.report import Finding, PhaseRecord, Report
from mtl.audit.watch.contract import Subject
from mtl.audit.watch.hooks import Hooks
from mtl.audit.watch.membership import HoldsParameters, checked, optimizers_inside
from mtl.audit.watch.phase import PhaseWatch
from mtl.audit.watch.reporting import Policy, Reporter
from mtl.patterns import PatternLike, as_list

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FORMAT = 1  # of the state


class GradientAudit:
    """Proves that frozen tensors stay bit-identical and receive no gradient, and that all others train.

    Between steps it looks at cheap signs (tripwires), at the bytes of small buffers, and at those of some parameters in
    turn, with no host sync on a GPU; whenever it is asked to `verify`, and when a phase ends, it compares the bytes of
    every frozen tensor. A tensor's version counter makes it look at the bytes, but is never itself a verdict. What
    happens between two phases is not watched. It keeps a copy of every frozen tensor on the host.
    """

    def __init__(
        self,
        model: nn.Module,
        freeze: PatternLike | Sequence[PatternLike] = (),
        optimizers: Sequence[HoldsParameters] = (),
        policy: Policy = "raise",
        also: Mapping[str, nn.Module] | None = None,
        ema: nn.Module | None = None,
        whole: bool = False,
        strict: bool = False,
    ) -> None:
        """Args:
            model: The module whose tensors are watched; of a wrapper (DDP, torch.compile), the module inside it.
            freeze: Patterns (see `mtl.patterns`) of what must not move; `phase` may name others. Rows of a tensor are
                `head.weight[0:10]`.
            optimizers: Every optimizer that steps parameters of the model; with none, it is not asked what trains.
            policy: What a violation does: raise `AuditError`, warn and go on, only collect, or restore: put the frozen
                bits, flags and modes back and go on.
            also: Modules beside the model that take part in training, such as losses that learn; the names of their
                tensors begin with the names given here.
            ema: An averaged copy of the model: what is frozen in the model must keep its bits there as well (`ema.*`).
            whole: Of tensors that are spread over processes (FSDP), whether the report has the fingerprints that one
                process alone would take; every process then has to begin every phase. Compared are each one's parts.
            strict: Whether a hazard, which could break the freeze or makes what is frozen vary, is a violation. If not,
                it is listed in the report and warned of once (under `collect`, only listed).

        Raises:
            ValueError: The policy is none of these.
            TypeError: What is given as optimizers is no list of such.
        """
        if policy not in get_args(Policy):
            raise ValueError(f"expected the policy raise, warn, collect or restore, got {policy!r}")
        self.report = Report()
        self._subject = Subject(model, dict(also or {}), ema)
        self._freeze = as_list(freeze)
        self._optimizers = checked(optimizers)
        self._whole = whole
        self._open: PhaseWatch | None = None
        self._stopped: dict[str, Any] | None = None
        self._reporter = Reporter(policy, strict)
        self._hooks: Hooks | None = None
        self._attached: list[Optimizer] = []
        # By identity; held, so that no other tensor takes the place of one in memory.
        self._were_frozen: dict[int, Tensor] = {}

    def watch(self, optimizer: HoldsParameters) -> None:
        """Adds an optimizer that was built after the audit.

        In mid-phase, it may take the place of another one that holds the same parameters: as long as only one of the
        two steps from then on, no parameter is said to be in both. `unwatch` that one if it is gone.
        """
        new = checked([optimizer])
        if self._open is not None:
            self._open.note_watched(optimizer)
        self._optimizers += new
        if self._hooks is not None:
            self._hooks.listen(optimizer)

    def unwatch(self, optimizer: HoldsParameters) -> None:
        """Leaves an optimizer out from now on, as one that was rebuilt.

        Raises:
            ValueError: It was not watched.
        """
        inner = optimizers_inside(optimizer) if optimizer not in self._optimizers else [optimizer]
        gone = {id(each) for each in inner}
        if not any(id(each) in gone for each in self._optimizers):
            raise ValueError("expected an optimizer that is watched, got another one")
        # In place: an open phase looks at these very lists.
        self._optimizers[:] = [each for each in self._optimizers if id(each) not in gone]
        self._attached[:] = [each for each in self._attached if id(each) not in gone]
        if self._hooks is not None:
            self._hooks.drop(gone)

    def attach(self, *optimizers: Optimizer) -> None:
        """Looks at every step of these optimizers by itself: a loop then needs nothing of the audit but `phase`.

        Optimizers that step in turn share the count: its steps are those of the one that has stepped most often. While
        no phase is open nothing is looked at, and no hook is left on the optimizers. Of a wrapper that only passes
        steps on, the optimizers inside it are listened to.

        Raises:
            TypeError: The steps of one of them cannot be seen.
        """
        inner = [each for optimizer in checked(optimizers) for each in optimizers_inside(optimizer)]
        self._attached += inner
        for optimizer in inner:
            self.watch(optimizer)

    @contextmanager
    def phase(
        self,
        name: str,
        freeze: PatternLike | Sequence[PatternLike] | None = None,
        optimizers: Sequence[HoldsParameters] | None = None,
        idle: PatternLike | Sequence[PatternLike] = (),
        written_at: Sequence[str] = (),
    ) -> Iterator[PhaseRecord]:
        """A phase as a `with` block; an exception inside it leaves it unproven.

        Args, Raises: as for `begin` and `end`.
        """
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
        freeze: PatternLike | Sequence[PatternLike] | None = None,
        optimizers: Sequence[HoldsParameters] | None = None,
        idle: PatternLike | Sequence[PatternLike] = (),
        written_at: Sequence[str] = (),
    ) -> PhaseRecord:
        """Opens a phase: draws its contract and takes the fingerprints; or goes on with one that was stopped.

        Args:
            name: The phase's name in the report.
            freeze: Patterns of this phase, if they are others than the audit's.
            optimizers: Optimizers of this phase, if they are others than before; they stay for later phases.
            idle: Patterns of what is not frozen, and may stay as it is all the same.
            written_at: Where each pattern was written, such as `configs/scenes.yaml:34`, for messages.

        Raises:
            PatternError: A pattern cannot be read or selects nothing.
            ValueError: A frozen tensor has no bytes that can be read, the average has nothing of what is frozen, a
                name in `also` is taken, or the phase that was stopped was another one.
            AuditError: Under the policy `raise`, the contract is broken already.
            RuntimeError: Another phase is open.
        """
        if self._open is not None:
            raise RuntimeError(f"phase {self._open.record.name!r} is still open")
        if optimizers is not None:
            self._optimizers = checked(optimizers)
        patterns = self._freeze if freeze is None else as_list(freeze)
        watch = PhaseWatch(
            *(name, self._subject, patterns, as_list(idle), self._optimizers, self._whole, written_at),
            were_frozen=self._were_frozen.keys(),
        )
        found = watch.go_on(self._stopped) if self._stopped is not None else []
        self._open, self._stopped = watch, None
        self._reporter.begin(watch.record)
        self.report.phases.append(watch.record)
        try:
            self._hang_hooks(watch)
            self._settle(found + watch.at_begin())
        except BaseException:
            self.abandon()
            raise
        return watch.record

    def end(self) -> None:
        """Closes the phase: compares every byte, and asks whether what was meant to train did.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        watch = self._watch()
        try:
            self._settle(watch.at_end())
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
        self._settle(self._watch().after_backward())

    def after_step(self) -> None:
        """Call after `step()`: counts the step, and looks at every frozen tensor's flags, identity and version.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        self._settle(self._watch().after_step())
        if self._hooks is not None:
            self._hooks.note_step()

    def look_every(self, steps: int) -> None:
        """From now on in this phase, looks between steps at every so many only, if the frozen part is not run at all.

        Its bytes are compared whenever `verify` is called and when the phase ends, as ever.
        """
        self._watch().every = steps

    @property
    def holds(self) -> bool:
        """Whether a phase is open, and nothing was found in it so far."""
        return self._open is not None and not self._open.record.violations

    def verify(self, bytes_only: bool = False, counted: bool = True) -> None:
        """Compares every frozen byte with the first ones, whatever the signs say; call it before a checkpoint, too.

        Args:
            bytes_only: Whether not to look for modules and tensors that were added or replaced, too.
            counted: Whether the report counts it; one that is right does not depend on any that are not counted.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        self._settle(self._watch().verify(bytes_only, counted))

    def agree(self, group: ProcessGroup | None = None, buffers: bool = False) -> None:
        """Compares this process's tensors with those of all others: they must be the same in every bit.

        Every process calls it after the same step, and each records the same: what another one has found, too. See
        `mtl.audit.watch.ranks`.

        Args:
            group: The processes, with a backend for the CPU (gloo); all of them by default.
            buffers: Whether to compare buffers that are not frozen: synchronised ones, or none of BatchNorm.

        Raises:
            AuditError: Under the policy `raise`, they differ.
        """
        self._settle(self._watch().agree(group, buffers))

    def state_dict(self) -> dict[str, Any]:
        """All that is known, between two steps, as plain data for JSON; in the middle of a phase, too.

        Waits for what is being read. It has fingerprints only: save the tensors with it, and one for each process.

        Raises:
            AuditError: Under the policy `raise`, the contract is broken.
        """
        if self._open is None:
            return {"format": _FORMAT, "phases": self.report.state(), "open": deepcopy(self._stopped)}
        self._settle(self._open.settle())
        return {"format": _FORMAT, "phases": self.report.state()[:-1], "open": self._open.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what an audit in another process knew: call it before any phase.

        If a phase was open there, the next to begin goes on with it, and must have its name, contract and param groups;
        every frozen byte is compared with the first ones. The report is that of a run which was never stopped. The
        policy `restore` cannot put back what was changed in between.

        Raises:
            RuntimeError: There was a phase already.
            ValueError: It is no state of this version.
        """
        if self.report.phases:
            raise RuntimeError("expected an audit without phases, to take over those of a state; load it at first")
        if state.get("format") != _FORMAT:
            raise ValueError(f"expected an audit's state of format {_FORMAT}, got {state.get('format')!r}")
        self.report.take_over(state["phases"])
        self._stopped = deepcopy(state["open"])

    def _hang_hooks(self, watch: PhaseWatch) -> None:
        self._hooks = Hooks(watch, self._attached, self.after_backward, self._note_step)
        for optimizer in self._optimizers:
            self._hooks.listen(optimizer)
        if self._optimizers:
            self._hooks.listen_to_backwards()

    def _note_step(self, is_attached: bool, optimizer: Optimizer) -> None:
        is_new = self._watch().note_step(optimizer)
        if is_attached:
            self._settle(self._watch().after_step(is_new))

    def _watch(self) -> PhaseWatch:
        if self._open is None:
            raise RuntimeError("no phase is open: the audit works inside `with audit.phase(name):`")
        return self._open

    def _settle(self, found: Sequence[Finding]) -> None:
        watch = self._watch()
        self._reporter.settle(watch.record, found, watch.put_back)
