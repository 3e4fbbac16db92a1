"""Every planted fault is named as what it is, and no correct loop is."""

from __future__ import annotations

import pytest

from audit_suite import CORRECT, FAULTS, HAZARDS, Entry, audited


def parameters(entries: list[Entry]) -> list[object]:
    return [pytest.param(entry, id=f"{entry.family}: {entry.name}", marks=marks_of(entry)) for entry in entries]


def marks_of(entry: Entry) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.slow] if entry.slow else []
    # Strict: whoever closes a gap has to take its mark away.
    return [*marks, pytest.mark.xfail(strict=True, reason=entry.gap)] if entry.gap else marks


@pytest.mark.parametrize("entry", parameters(FAULTS))
def test_a_planted_fault_is_named(entry: Entry) -> None:
    if entry.needs:
        pytest.importorskip(entry.needs)
    report = audited(entry)
    assert entry.expected <= {(violation.kind, violation.name) for violation in report.violations}
    assert not report.ok


@pytest.mark.parametrize("entry", parameters(CORRECT))
def test_a_correct_loop_is_silent(entry: Entry) -> None:
    if entry.needs:
        pytest.importorskip(entry.needs)
    report = audited(entry)
    assert report.violations == []
    assert report.hazards == []
    assert report.ok
    assert all(phase.completed and phase.num_steps and phase.num_trained for phase in report.phases)


@pytest.mark.parametrize("entry", parameters(HAZARDS))
def test_a_hazard_is_listed_and_is_no_violation(entry: Entry) -> None:
    if entry.needs:
        pytest.importorskip(entry.needs)
    report = audited(entry)
    assert report.violations == []
    assert {(hazard.kind, hazard.name) for hazard in report.hazards} == entry.hazards
    assert report.ok


@pytest.mark.parametrize("entry", parameters(HAZARDS))
def test_under_strict_a_hazard_is_a_violation(entry: Entry) -> None:
    if entry.needs:
        pytest.importorskip(entry.needs)
    report = audited(entry, strict=True)
    assert {(violation.kind, violation.name) for violation in report.violations} >= entry.hazards
    assert report.hazards == []
    assert not report.ok


def test_the_tables_are_large_and_their_names_unique() -> None:
    assert len(FAULTS) >= 40
    assert len(CORRECT) >= 20
    for entries in (FAULTS, CORRECT, HAZARDS):
        assert len({(entry.family, entry.name) for entry in entries}) == len(entries)
        assert len({entry.name for entry in entries}) == len(entries)
    assert all(entry.expected for entry in FAULTS)
    assert all(entry.hazards for entry in HAZARDS)
