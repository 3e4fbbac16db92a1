"""The fault suite as a table: what the audit says of every loop, and what other checkers say.

    [PYTHONPATH=DIRECTORY] python scripts/bench/audit_table.py > table.md

`torcheck` and `torchtest` are taken from the import path, if they are there; `torcheck` asks for an old torch, so that
both are best unpacked into a directory of their own. Each is used in good faith: it is given the names of all that
was meant to be frozen, and of all others that they have to change. `torchtest` compares one training step; the
whole phase is given to it as that step, which spares it false alarms. For all three, any complaint counts as caught.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl.audit.watch.contract import AuditTarget
from mtl.patterns import select

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/audit"))

from audit_faults import Scene, quiet
from audit_suite import CORRECT, FAULTS, HAZARDS, Entry, audited

Named = list[tuple[str, Tensor]]
# A checker runs one phase of a scene, and says whether it complains.
Checker = Callable[[Scene, Sequence[str]], bool]


class NotRunnable(Exception):  # noqa: N818
    """Why a checker cannot be applied to a loop."""


def main() -> None:
    checkers: dict[str, Checker | None] = {
        "torcheck": by_torcheck if is_there("torcheck") else None,
        "torchtest": by_torchtest if is_there("torchtest") else None,
        "requires_grad": by_flags,
    }
    for title, entries in (("Planted faults", FAULTS), ("Hazards", HAZARDS), ("Correct loops", CORRECT)):
        sys.stdout.write(f"## {title}\n\n| family | loop | mtl | {' | '.join(checkers)} |\n")
        sys.stdout.write(f"|---|---|---|{'---|' * len(checkers)}\n")
        counts: dict[str, Counter[str]] = {name: Counter() for name in ("mtl", *checkers)}
        families = list(dict.fromkeys(entry.family for entry in entries))
        for entry in sorted(entries, key=lambda entry: families.index(entry.family)):
            said = {"mtl": by_audit(entry)}
            for name, checker in checkers.items():
                said[name] = verdict(entry, checker)
            for name, words in said.items():
                counts[name][words.partition(":")[0]] += 1
            sys.stdout.write(f"| {entry.family} | {entry.name} | {' | '.join(said.values())} |\n")
        sys.stdout.write(f"\n{len(entries)} loops\n\n")
        for name, count in counts.items():
            sys.stdout.write(f"- {name}: {', '.join(f'{number} {words}' for words, number in count.most_common())}\n")
        sys.stdout.write("\n")


def is_there(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def by_audit(entry: Entry) -> str:
    """The kinds found; a fault is caught, and a hazard listed, only if all that was expected is among them."""
    if entry.needs and not is_there(entry.needs):
        return f"not runnable: needs {entry.needs}"
    try:
        report = audited(entry)
    except Exception as error:  # noqa: BLE001
        return f"not runnable: {type(error).__name__}"
    violations = report.violations
    kinds = ", ".join(sorted({violation.kind for violation in violations}))
    if not entry.expected:
        if violations:
            return f"false alarm: {kinds}"
        listed = ", ".join(sorted({hazard.kind for hazard in report.hazards}))
        return f"listed: {listed}" if listed else "silent"
    found = {(violation.kind, violation.name) for violation in violations}
    if entry.expected <= found:
        return f"caught: {kinds}"
    return f"named otherwise: {kinds}" if violations else "missed"


def verdict(entry: Entry, checker: Checker | None) -> str:
    if checker is None:
        return "not installed"
    if entry.needs and not is_there(entry.needs):
        return f"not runnable: needs {entry.needs}"
    try:
        with quiet(entry):
            warnings.simplefilter("ignore")
            complains = watched(entry.setup(), checker)
    except NotRunnable as error:
        return f"not runnable: {error}"
    except Exception as error:  # noqa: BLE001
        return f"not runnable: {type(error).__name__}"
    if entry.expected:
        return "caught" if complains else "missed"
    if entry.hazards:
        return "complains" if complains else "silent"
    return "false alarm" if complains else "silent"


def watched(scene: Scene, checker: Checker) -> bool:
    """Runs all phases; whether there was a complaint in any."""
    for phase in scene.phases:
        phase.enter()
        if checker(scene, scene.freeze if phase.freeze is None else phase.freeze):
            return True
    return False


def declared(scene: Scene, freeze: Sequence[str]) -> tuple[Named, Named]:
    """The parameters that were meant to be frozen, and all others, as far as `named_parameters` sees them."""
    if any("[" in pattern for pattern in freeze):
        raise NotRunnable("rows of a tensor")
    places = AuditTarget(scene.model, scene.also, None).inventory().places
    names = set(select(freeze, [place.name for place in places]).names) if freeze else set()
    visible = [
        (place.name, tensor)
        for place in places
        if place.kind == "param" and not place.is_hidden and (tensor := place.current()) is not None
    ]
    return [each for each in visible if each[0] in names], [each for each in visible if each[0] not in names]


def by_flags(scene: Scene, freeze: Sequence[str]) -> bool:
    """Looks at `requires_grad` before and after the phase."""

    def wrong() -> bool:
        frozen, free = declared(scene, freeze)
        return any(p.requires_grad for _, p in frozen) or not all(p.requires_grad for _, p in free)

    before = wrong()
    scene.run()
    return before or wrong()


def by_torcheck(scene: Scene, freeze: Sequence[str]) -> bool:
    """Looks after every step of every optimizer, at what that optimizer holds."""
    from torcheck.registry import Registry

    frozen, free = declared(scene, freeze)
    registry = Registry()
    optimizers = list(scene.seen_optimizers())
    for optimizer in optimizers:
        registry.register(optimizer)
    held = {id(tensor) for tensor in registry.tensor_to_optimizer}
    # It knows parameters by their optimizer alone: a frozen one that none holds cannot be given to it.
    for name, tensor in frozen:
        if id(tensor) in held:
            registry.add_tensor(tensor, name, changing=False)
    if not all(id(tensor) in held for _, tensor in free):
        return True
    for name, tensor in free:
        registry.add_tensor(tensor, name, changing=True)
    try:
        scene.run()
    except RuntimeError as error:
        if "errors are detected while training" not in str(error):
            raise
        return True
    finally:
        registry.disable_optimizers(*optimizers)
    return False


class _Stub:
    """Stands for model, loss, optimizer and batch of torchtest's own training step, which runs the scene instead."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.backward = run

    def __call__(self, *_: Any) -> _Stub:
        return self

    def to(self, _: Any) -> _Stub:
        return self

    def nothing(self) -> None:
        """Neither train(), zero_grad() nor step() of its own."""

    train = zero_grad = step = nothing


def by_torchtest(scene: Scene, freeze: Sequence[str]) -> bool:
    """Compares all parameters from before the phase with those after it."""
    from torchtest import torchtest

    frozen, free = declared(scene, freeze)
    inner = _Stub(scene.run)
    batch = [inner, inner]
    same = _Stub(lambda: torchtest.assert_vars_same(inner, inner, inner, batch, "cpu", frozen))
    try:
        torchtest.assert_vars_change(same, same, same, [same, same], "cpu", free)
    except torchtest.VariablesChangeException:
        return True
    return False


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
