"""Which parameters the optimizers hold: no frozen one, and every trainable one in exactly one param group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from mtl.audit.report import Finding
from mtl.audit.watch import causes
from mtl.audit.watch.contract import Contract
from mtl.audit.watch.findings import FindingBuilder
from mtl.audit.watch.optimizers import HoldsParameters, ids_held, param_groups
from mtl.audit.watch.places import TensorPlace
from mtl.audit.watch.rotation import AT_FIRST, PER_STEP, Rotation

_DETAILS = {
    "in_optimizer": "is held by an optimizer, whose decay or momentum could move it",
    "not_in_optimizer": "is not frozen and requires a gradient, but no optimizer holds it",
    "in_several_groups": "is held by more than one param group",
}

# The registry of a parameter's module, its key there, and the parameter.
_Row = tuple[Mapping[str, Tensor | None], str, Tensor]


class OptimizerWatch:
    """Compares the optimizers of one phase with its contract; they may be rebuilt in mid-phase."""

    def __init__(
        self,
        contract: Contract,
        optimizers: Sequence[HoldsParameters],
        were_frozen: Collection[int],
        idle: Collection[str],
        findings: FindingBuilder,
    ) -> None:
        """Args:
        contract: The phase's contract.
        optimizers: The optimizers; the list may grow and shrink.
        were_frozen: The identities of tensors that an earlier phase froze, or that required no gradient at the begin.
        idle: Names of parameters that need not be in an optimizer.
        findings: Builds findings.
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

    def begin(self) -> None:
        """Records what the optimizers hold; a parameter that they get later was added in mid-phase."""
        self._held_at_first = ids_held(self._optimizers)
        self._has_begun = True

    def is_outdated(self, step: int) -> bool:
        """Whether a parameter was replaced by another tensor."""
        return self._membership.is_outdated(step)

    def is_due(self, step: int) -> bool:
        """Whether to check after a step."""
        return self._membership.is_due(step)

    def update(self, contract: Contract) -> None:
        """Compares the optimizers with the present contract from now on."""
        self._membership = Membership(contract)

    def forget(self) -> None:
        """Makes the next check report everything again."""
        self._membership.forget()

    def add(self, optimizer: HoldsParameters) -> None:
        """Records an optimizer that was built in mid-phase: it may replace others with the same parameters."""
        self._replaced |= {id(other) for other in self._sharing(optimizer)}

    def record_step(self, optimizer: Optimizer, last_steps: Mapping[int, int]) -> None:
        """Records a step; if a replaced optimizer and its successor both step, they step the same parameters."""
        if id(optimizer) not in self._replaced:
            return
        others = (each for each in self._sharing(optimizer) if id(each) not in self._replaced)
        if any(id(each) in last_steps for each in others):
            self._replaced.discard(id(optimizer))
            self.forget()

    def check(self, with_gradients: Collection[int]) -> list[Finding]:
        """Parameters that the optimizers hold and should not, or should hold and do not.

        Args:
            with_gradients: The identities of frozen tensors that have had a gradient; others are not stepped.
        """
        found: list[Finding] = []
        for kind, place in self._membership.check(self._optimizers, self._replaced):
            if kind == "not_in_optimizer" and place.name in self._idle:
                continue
            is_harmless = kind == "in_optimizer" and id(place.current()) not in with_gradients
            build = self._findings.hazard if is_harmless else self._findings.violation
            found.append(build(kind, place, self._cause(kind, place), _DETAILS[kind]))
        return found

    def _cause(self, kind: str, place: TensorPlace) -> str:
        if kind == "in_optimizer":
            is_early = not self._has_begun or id(place.current()) in self._held_at_first
            return causes.EARLY_OPTIMIZER if is_early else causes.ADDED_LATER
        if kind == "in_several_groups":
            return causes.TWICE
        tensor = place.current()
        assert tensor is not None
        if self._has_begun and self._free_at_first.get(place.name) is not tensor:
            return causes.TRAINED_REPLACED
        places = [*self._contract.frozen, *self._contract.free]
        model = [each for each in map(TensorPlace.current, places) if each is not None]
        return causes.of_absence(tensor, param_groups(self._optimizers), model, id(tensor) in self._were_frozen)

    def _sharing(self, optimizer: HoldsParameters) -> list[HoldsParameters]:
        """The other optimizers that hold one of the same parameters."""
        mine = ids_held([optimizer])
        others = [other for other in self._optimizers if other is not optimizer]
        return [other for other in others if not mine.isdisjoint(ids_held([other]))]


class Membership:
    """Compares the optimizers' parameters with the contract, whenever one of the two has changed."""

    def __init__(self, contract: Contract) -> None:
        full = [place for place in contract.frozen if place.is_full]
        self._frozen = [(place, tensor) for place in full if (tensor := place.current()) is not None]
        # A parameter in a Python list is not expected in an optimizer: a teacher may be hidden there on purpose.
        free = [place for place in contract.free if place.kind == "param" and not place.is_hidden]
        self._free = [(place, tensor) for place in free if (tensor := place.current()) is not None]
        rows: list[_Row] = [(place.registry, place.key, tensor) for place, tensor in self._free]
        self._rotation: Rotation[_Row] = Rotation(rows, 16)
        self._checked: tuple[list[int], list[bool]] | None = None

    @property
    def free(self) -> dict[str, Tensor]:
        """The parameters that are not frozen, by every name."""
        return {place.name: tensor for place, tensor in self._free}

    def is_outdated(self, step: int) -> bool:
        """Whether a parameter was replaced by another tensor; many parameters are checked in rotation."""
        return any(key not in held or held[key] is not tensor for held, key, tensor in self._rotation.due(step))

    def is_due(self, step: int) -> bool:
        """Whether to check after a step: the more parameters, the less often."""
        return self._checked is None or step <= AT_FIRST or step % (1 + len(self._free) // PER_STEP) == 0

    def forget(self) -> None:
        """Makes the next check report everything again."""
        self._checked = None

    def check(
        self, optimizers: Sequence[HoldsParameters], replaced: Collection[int] = ()
    ) -> Iterator[tuple[str, TensorPlace]]:
        """Yields the kind of each breach with its place; nothing if nothing has changed since the last check.

        Args:
            optimizers: The optimizers.
            replaced: The identities of optimizers that others have replaced; parameters that only they hold are held.
        """
        held = [id(p) for group in param_groups(optimizers) for p in group["params"]]
        require_grad = [tensor.requires_grad for _, tensor in self._free]
        if (held, require_grad) == self._checked:
            return
        self._checked = held, require_grad
        times = Counter(held)
        yield from (("in_optimizer", place) for place, tensor in self._frozen if times[id(tensor)])
        if not optimizers:
            return
        active = param_groups([each for each in optimizers if id(each) not in replaced])
        stepping = Counter(id(p) for group in active for p in group["params"])
        for place, tensor in self._free:
            if stepping[id(tensor)] > 1:
                yield "in_several_groups", place
            elif tensor.requires_grad and not times[id(tensor)]:
                yield "not_in_optimizer", place
