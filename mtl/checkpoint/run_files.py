"""The files of a run, read: metrics, audit, plan, results, history, state and configuration, one reader each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mtl.checkpoint.run_contents import (
    AuditContent,
    DataContent,
    FormContent,
    HistoryContent,
    PlanContent,
    ResultsContent,
    RowContent,
    RunFileContent,
    StateContent,
    UnchangedContent,
)
from mtl.runtime.files import JsonFileError, read_json
from mtl.runtime.text import short_repr

METRICS, AUDIT, STATE, CONFIG = "metrics.jsonl", "audit.json", "state.json", "config.yaml"
HISTORY, DATA, PLAN, RESULTS, UNCHANGED = "history.json", "data.json", "plan.json", "results.json", "unchanged.json"
# Of a checkpoint that one process wrote; of a sharded one, see `tensor_file.shards`.
MODEL_FILE, FROZEN_FILE, OPTIMIZER_FILE = "model.safetensors", "frozen.safetensors", "optimizer.safetensors"


class RunFileError(ValueError):
    """A file of a run that is missing, damaged, or not what a run writes; the message names the file."""


def read_unchanged(file: Path) -> dict[str, Any]:
    """The content of an `unchanged.json`: whether outputs of old tasks are those that they were.

    Raises:
        RunFileError: As for `read_history`.
    """
    return _read_object(file, UnchangedContent)


def read_history(file: Path) -> dict[str, Any]:
    """The content of a `history.json`: the command that began a run, and what was changed since.

    Raises:
        RunFileError: There is no such file, it is damaged, or is no history.
    """
    return _read_object(file, HistoryContent)


def read_audit(file: Path) -> dict[str, Any]:
    """The content of an `audit.json`, or of the `audit.rank-N.json` of one process.

    Raises:
        RunFileError: There is no such file, it is damaged, or is not the report of an audit.
    """
    return _read_object(file, AuditContent)


def read_data_record(file: Path) -> dict[str, Any]:
    """The record that a run kept of its data.

    Raises:
        RunFileError: As for `read_audit`.
    """
    return _read_object(file, DataContent)


def read_model_form(file: Path) -> dict[str, Any]:
    """The record of a run's data, with all that decides the form of its model next to the configuration.

    Raises:
        RunFileError: As for `read_audit`; or a version of `mtl` wrote it that did not record this.
    """
    try:
        return _read_object(file, FormContent)
    except RunFileError as error:
        earlier = "; an earlier version of mtl, which did not record it, may have written it: `resume` adds it"
        raise RunFileError(f"{error}{earlier if 'missing' in str(error) else ''}") from None


def read_plan(file: Path) -> dict[str, Any]:
    """The content of a `plan.json`: what each phase freezes, trains and costs.

    Raises:
        RunFileError: As for `read_audit`.
    """
    return _read_object(file, PlanContent)


def read_results(file: Path) -> dict[str, Any]:
    """The content of a `results.json`: trivial predictor, end of each phase, best score, sessions.

    Raises:
        RunFileError: As for `read_audit`.
    """
    return _read_object(file, ResultsContent)


def read_state_file(file: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`.

    Raises:
        RunFileError: There is no such file, it is damaged, or is not the state of a run.
    """
    return _read_object(file, StateContent)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; half a last row, which a killed process may leave, is left out.

    Raises:
        RunFileError: There is no such file, or a line is not a row; names the line.
    """
    with _named(file):
        *lines, last = file.read_bytes().split(b"\n")
    rows = [_row(file, number, line) for number, line in enumerate(lines, 1)]
    if last.strip():
        try:
            rows.append(_row(file, len(lines) + 1, last))
        except RunFileError:
            if not last.lstrip().startswith(b"{"):
                raise
    return rows


def read_config_text(file: Path) -> str:
    """The text of a run's `config.yaml`; `mtl.config.load_config` reads it as settings.

    Raises:
        RunFileError: There is no such file, or it is not text.
    """
    try:
        with _named(file):
            return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunFileError(f"{file}: cannot be read: it is not text: {error}") from error


def _row(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RunFileError(f"{file}:{number}: expected one row as JSON, got {short_repr(line)} ({error})") from error
    return _checked(row, RowContent, f"{file}:{number}")


def _read_object(file: Path, model: type[RunFileContent]) -> dict[str, Any]:
    with _named(file):
        content = read_json(file)
    return _checked(content, model, str(file))


def _checked(content: object, model: type[RunFileContent], where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise RunFileError(f"{where}: expected keys and values, got {short_repr(content)}")
    try:
        model.model_validate(content)
    except ValidationError as error:
        raise RunFileError(f"{where}: {_first_mistake(error)}") from error
    return content


def _first_mistake(error: ValidationError) -> str:
    """The first thing that is wrong: which key, what was expected, what came."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{key}: this key is missing"
    expected = first["msg"].replace("Input should be", "expected")
    return f"{key}: {expected}, got {short_repr(first['input'])}"


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors of reading a file as `RunFileError`, with its name."""
    try:
        yield
    except JsonFileError as error:
        raise RunFileError(str(error)) from error
    except FileNotFoundError:
        raise RunFileError(f"{file}: no such file") from None
    except OSError as error:
        raise RunFileError(f"{file}: cannot be read: {error.strerror}") from error
