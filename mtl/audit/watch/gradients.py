"""Gradients and `requires_grad` flags of frozen tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mtl.audit.report import Finding
from mtl.audit.watch import causes
from mtl.audit.watch.contract import Contract
from mtl.audit.watch.findings import FindingBuilder
from mtl.audit.watch.frozen_tensor import FrozenTensor


class GradientWatch:
    """Checks that frozen tensors neither have nor require a gradient.

    Attributes:
        with_gradients: The identities of frozen tensors that have had a gradient: an optimizer could move these.
    """

    def __init__(self, contract: Contract, findings: FindingBuilder, on_new: Callable[[], None]) -> None:
        """Args:
        contract: The phase's contract.
        findings: Builds findings.
        on_new: Called when one more tensor is found with a gradient.
        """
        self.with_gradients: set[int] = set()
        self._contract = contract
        self._findings = findings
        self._on_new = on_new

    def at_begin(self, tensors: Sequence[FrozenTensor], num_steps: int) -> list[Finding]:
        """Gradients from before the phase, or from before a resumed phase was stopped."""
        found: list[Finding] = []
        for frozen in tensors:
            if frozen.tensor.grad is not None:
                detail = f"has a gradient before the {'next' if num_steps else 'first'} step"
                found.append(self._findings.violation("grad_present", frozen.place, causes.STALE_GRADIENT, detail))
                self._record(frozen)
        return found

    def check(self, tensors: Sequence[FrozenTensor]) -> list[Finding]:
        """Gradients."""
        found: list[Finding] = []
        for frozen in tensors:
            if frozen.tensor.grad is not None:
                cause = causes.STALE_GRADIENT if frozen.had_gradient else causes.GRADIENT_BY_HAND
                if frozen.tensor.requires_grad:
                    cause = causes.LATE_FREEZE
                found.append(self._findings.violation("grad_present", frozen.place, cause, "has a gradient"))
                self._record(frozen)
        return found

    def check_flags(self, tensors: Sequence[FrozenTensor]) -> list[Finding]:
        """Flags that are on; alone, as after a detach, one is a hazard, but with a gradient it breaks the freeze."""
        found: list[Finding] = []
        for frozen in tensors:
            if frozen.tensor.requires_grad:
                modules = self._contract.around(frozen.place)
                cause = causes.of_flag(frozen.tensor, modules) or causes.STILL_REQUIRED
                build = self._findings.violation if frozen.had_gradient else self._findings.hazard
                found.append(build("requires_grad", frozen.place, cause, "requires a gradient"))
        return found

    def resume(self, tensors: Sequence[FrozenTensor]) -> None:
        """Continues from tensors whose state was loaded."""
        self.with_gradients = {id(frozen.tensor) for frozen in tensors if frozen.had_gradient}

    def _record(self, frozen: FrozenTensor) -> None:
        if not frozen.had_gradient:
            frozen.had_gradient = True
            self.with_gradients.add(id(frozen.tensor))
            self._on_new()
