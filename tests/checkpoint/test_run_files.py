"""The files of a run: each has one reader, and what is wrong with one is said in a line that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.checkpoint.run_files import RunFileError, read_audit, read_config_text, read_metrics, read_state_file

ROW = {"step": 1, "epoch": 0, "phase": "warm", "train/loss": 0.5}
PHASE: dict[str, Any] = {
    "name": "warm",
    "completed": True,
    "freeze": ["trunk"],
    "frozen": {"count": 1, "root": "0", "fingerprints": {"trunk.w": "0"}},
    "trainable": {"count": 1, "changed": 1},
    "checks": {"steps": 1, "tripwires": 1, "fingerprints": 1},
    "violations": [],
}


def text_of(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- metrics.jsonl


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, len(text_of(ROW, ROW, ROW))))
def test_rows_that_were_cut_anywhere_are_those_that_are_whole(
    tmp_path_factory: pytest.TempPathFactory, length: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "cut.jsonl"
    text = text_of(ROW, ROW, ROW)[:length]
    file.write_text(text)
    num_whole = text.count("\n") + (text.rpartition("\n")[2] == json.dumps(ROW))
    assert read_metrics(file) == [ROW] * num_whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (text_of(ROW) + '{"step": 2, "tr\n' + text_of(ROW), "metrics.jsonl:2: expected one row as JSON, got '{"),
        (text_of(ROW) + '{"step": 2, {"step": 3}\n', "metrics.jsonl:2: expected one row as JSON"),
        (text_of(ROW) + "[1]\n", r"metrics.jsonl:2: expected keys and values, got \[1\]"),
        ("3\n" + text_of(ROW), "metrics.jsonl:1: expected keys and values, got 3"),
        (text_of(ROW) + "\n" + text_of(ROW), "metrics.jsonl:2: expected one row"),
        (text_of(ROW) + "nonsense", "metrics.jsonl:2: expected one row as JSON, got 'nonsense'"),
        (text_of({"step": "1", "phase": "warm"}), "metrics.jsonl:1: step: expected a valid integer, got '1'"),
        (text_of(ROW, {"phase": "warm"}), "metrics.jsonl:2: step: this key is missing"),
    ],
)
def test_a_line_that_is_no_row_is_named_with_its_number(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(text)
    with pytest.raises(RunFileError, match=message) as caught:
        read_metrics(file)
    assert str(file) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_last_row_of_bytes_that_are_no_text_is_left_out_and_another_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(text_of(ROW).encode() + b'{"step": \xff')
    assert read_metrics(file) == [ROW]
    file.write_bytes(b'{"step": \xff\n' + text_of(ROW).encode())
    with pytest.raises(RunFileError, match=r"metrics\.jsonl:1: "):
        read_metrics(file)


# --- audit.json


def audit(**changes: Any) -> dict[str, Any]:
    return {"ok": True, "phases": [PHASE]} | changes


def test_keys_that_nobody_reads_may_be_there_or_not(tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    for content in (audit(), audit(new=3), audit(phases=[PHASE | {"hazards": []}]), audit(ended_the_run=True)):
        file.write_text(json.dumps(content))
        assert read_audit(file) == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"expected keys and values, got \[\]"),
        (None, "expected keys and values, got None"),
        ({}, "ok: this key is missing"),
        ({"ok": True}, "phases: this key is missing"),
        (audit(ok="yes"), "ok: expected a valid boolean, got 'yes'"),
        (audit(phases={}), "phases: expected a valid list, got {}"),
        (audit(phases=[3]), "phases.0: .* got 3"),
        (audit(phases=[PHASE, {"name": "b"}]), "phases.1.completed: this key is missing"),
        (audit(phases=[PHASE | {"name": None}]), "phases.0.name: expected a valid string, got None"),
        (audit(phases=[PHASE | {"frozen": []}]), "phases.0.frozen: "),
        (
            audit(phases=[PHASE | {"frozen": {"count": 1, "root": "0"}}]),
            "phases.0.frozen.fingerprints: this key is miss",
        ),
        (audit(phases=[PHASE | {"violations": [{"kind": "x"}]}]), "phases.0.violations.0.name: this key is missing"),
    ],
)
def test_an_audit_of_another_form_is_named_with_the_key(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "audit.json"
    file.write_text(json.dumps(content))
    with pytest.raises(RunFileError, match=f"^{file}: {message}") as caught:
        read_audit(file)
    assert len(str(caught.value).splitlines()) == 1


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, len(json.dumps(audit())) - 1))
def test_an_audit_that_was_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    file = tmp_path_factory.getbasetemp() / "cut-audit.json"
    file.write_text(json.dumps(audit())[:length])
    with pytest.raises(RunFileError, match=r"cut-audit\.json: cannot be read: .*; it is cut short, or is not JSON"):
        read_audit(file)


# --- all of them


@pytest.mark.parametrize("read", [read_audit, read_state_file, read_metrics, read_config_text])
def test_a_file_that_is_missing_a_folder_or_no_text_is_named(tmp_path: Path, read: Any) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\n\x00")
    for name, message in (("nowhere", "no such file"), ("folder", "cannot be read: Is a directory"), ("bytes", "")):
        with pytest.raises(RunFileError, match=f"^{tmp_path / name}:.*{message}"):
            read(tmp_path / name)


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    file.write_text("[" * 100_000)
    with pytest.raises(RunFileError, match="cannot be read"):
        read_state_file(file)
    with pytest.raises(RunFileError, match="expected one row"):
        read_metrics(file)
