"""Who steps what in a phase: the optimizers, held against the contract."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch.optim import Optimizer

from mtl.audit.report import Finding
from mtl.audit.watch import causes
from mtl.audit.watch.contract import Contract
from mtl.audit.watch.findings import Findings
from mtl.audit.watch.membership import HoldsParameters, Membership, ids_held, param_groups
from mtl.audit.watch.places import Place

_DETAILS = {
    "in_optimizer": "is held by an optimizer, whose decay or momentum could move it",
    "not_in_optimizer": "is not frozen and requires a gradient, but no optimizer holds it",
    "in_several_groups": "is held by more than one param group",
}


class Holders:
    """The optimizers of one phase, which may be rebuilt in it."""

    def __init__(
        self,
        contract: Contract,
        optimizers: Sequence[HoldsParameters],
        were_frozen: Collection[int],
        idle: Collection[str],
        findings: Findings,
    ) -> None:
        """Args:
        contract: The phase's contract.
        optimizers: The optimizers; the list may grow and shrink.
        were_frozen: The identities of what was frozen in an earlier phase, or required no gradient at this one's begin.
        idle: Names of parameters that need not be in an optimizer.
        findings: Makes findings.
        """
        self._idle = idle
        self._contract = contract
        self._optimizers = optimizers
        self._were_frozen = were_frozen
        self._findings = findings
        self._membership = Membership(contract)
        self._free_at_first = self._membership.free
        self._has_begun = False
        self._held_at_first: set[int] = set()
        self._replaced: set[int] = set()

    @property
    def free_ids(self) -> set[int]:
        """The identities of the parameters that are not frozen."""
        return {id(tensor) for tensor in self._membership.free.values()}

    def begun(self) -> None:
        """From now on, what an optimizer holds and did not hold before was given to it in mid-phase."""
        self._held_at_first = ids_held(self._optimizers)
        self._has_begun = True

    def is_outdated(self, step: int) -> bool:
        """Whether another tensor hangs by now where a parameter hung."""
        return self._membership.is_outdated(step)

    def is_due(self, step: int) -> bool:
        """Whether to look after a step."""
        return self._membership.is_due(step)

    def renew(self, contract: Contract) -> None:
        """Holds the optimizers against the contract as it is by now."""
        self._membership = Membership(contract)

    def forget(self) -> None:
        """Has the next look say all again."""
        self._membership.forget()

    def note_watched(self, optimizer: HoldsParameters) -> None:
        """Notes an optimizer that was built in mid-phase: it may take the place of others that hold the same."""
        self._replaced |= {id(other) for other in self._sharing(optimizer)}

    def note_step(self, optimizer: Optimizer, last_steps: Mapping[int, int]) -> None:
        """Notes a step of one that may have been replaced: if its successor has stepped too, both step the same."""
        others = (each for each in self._sharing(optimizer) if id(each) not in self._replaced)
        if id(optimizer) in self._replaced and any(id(each) in last_steps for each in others):
            self._replaced.discard(id(optimizer))
            self.forget()

    def look(self, with_gradients: Collection[int]) -> list[Finding]:
        """What optimizers hold and should not, or should and do not.

        Args:
            with_gradients: The identities of frozen tensors that have had a gradient; others are not stepped.
        """
        found: list[Finding] = []
        for kind, place in self._membership.look(self._optimizers, self._replaced):
            if kind == "not_in_optimizer" and place.name in self._idle:
                continue
            is_harmless = kind == "in_optimizer" and id(place.look()) not in with_gradients
            make = self._findings.hazard if is_harmless else self._findings.violation
            found.append(make(kind, place, self._why(kind, place), _DETAILS[kind]))
        return found

    def _why(self, kind: str, place: Place) -> str:
        if kind == "in_optimizer":
            is_early = not self._has_begun or id(place.look()) in self._held_at_first
            return causes.EARLY_OPTIMIZER if is_early else causes.ADDED_LATER
        if kind == "in_several_groups":
            return causes.TWICE
        tensor = place.look()
        assert tensor is not None
        if self._has_begun and self._free_at_first.get(place.name) is not tensor:
            return causes.TRAINED_REPLACED
        model = [each for each in map(Place.look, [*self._contract.frozen, *self._contract.free]) if each is not None]
        return causes.of_absence(tensor, param_groups(self._optimizers), model, id(tensor) in self._were_frozen)

    def _sharing(self, optimizer: HoldsParameters) -> list[HoldsParameters]:
        """The other optimizers that hold one of the same parameters."""
        mine = ids_held([optimizer])
        others = [other for other in self._optimizers if other is not optimizer]
        return [other for other in others if not mine.isdisjoint(ids_held([other]))]
