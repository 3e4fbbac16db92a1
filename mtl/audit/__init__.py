"""The gradient audit: an independent witness that what was frozen stayed bit-identical and received no gradient.

It is given patterns, looks at tensors, and imports nothing from the code that freezes. It works in any training loop:

    audit = GradientAudit(model, freeze=["trunk"], optimizers=[optimizer])
    with audit.phase("warm-heads"):
        for x, y in loader:
            loss(model(x), y).backward()
            audit.after_backward()
            optimizer.step()
            audit.after_step()
            optimizer.zero_grad()
    assert audit.report.ok
"""

from mtl.audit.attach import attach
from mtl.audit.audit import GradientAudit
from mtl.audit.report import AuditError, Finding, Hazard, PhaseRecord, Report, Violation
from mtl.audit.watch.membership import HoldsParameters
from mtl.audit.watch.ranks import found_anywhere
from mtl.runtime.fingerprint import fingerprint

__all__ = [
    "AuditError",
    "Finding",
    "GradientAudit",
    "Hazard",
    "HoldsParameters",
    "PhaseRecord",
    "Report",
    "Violation",
    "attach",
    "fingerprint",
    "found_anywhere",
]
