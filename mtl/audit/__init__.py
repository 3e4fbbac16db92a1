"""The gradient audit: an independent witness that frozen tensors stayed bit-identical and received no gradient.

It is given patterns, reads tensors, and imports nothing from the code that freezes. It works in any training loop:

    audit = GradientAudit(model, freeze=["trunk"], optimizers=[optimizer])
    with audit.phase("warm-heads"):
        for x, y in loader:
            loss(model(x), y).backward()
            audit.after_backward()
            optimizer.step()
            audit.after_step()
            optimizer.zero_grad()
    assert audit.report.ok

`audit` has the object a loop calls, `policy` what a violation does, `report` the findings as data; `fit`, `lightning`
and `huggingface` audit a framework's Trainer. `watch/` has the checks of one phase, `offline/` the proofs from files.
"""

from mtl.audit.audit import GradientAudit
from mtl.audit.fit import attach
from mtl.audit.report import AuditError, Finding, Hazard, PhaseRecord, Report, Violation
from mtl.audit.watch.optimizers import HoldsParameters
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
