"""A finished run as a report reads it: its files, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtl.checkpoint.run_files import (
    AUDIT,
    CONFIG,
    DATA,
    HISTORY,
    METRICS,
    PLAN,
    RESULTS,
    STATE,
    UNCHANGED,
    RunFileError,
    read_audit,
    read_config_text,
    read_data_record,
    read_history,
    read_metrics,
    read_plan,
    read_results,
    read_state_file,
    read_unchanged,
)
from mtl.config import ConfigError
from mtl.config.yaml_source import read_source

SCORE = "val/score"
LAST_STATE = f"checkpoints/last/{STATE}"
# Without these, a folder is no finished run.
NEEDED = (CONFIG, METRICS, AUDIT, LAST_STATE)

Metrics = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class PhaseSpan:
    """A phase as it was trained.

    Attributes:
        name: The phase.
        begin: Steps of the run done before it.
        end: Steps of the run done after it.
        epochs: How often it was validated.
        train_s: Seconds of training and validation; None if the run did not record it.
        reason: Why it ended; None if the run did not record it, or it has not ended.
        kept: What of the trunk was computed once, from `KeptCount`; None if the run did not record it.
        scores: Metrics at its end by task and name; empty if it has not ended.
    """

    name: str
    begin: int
    end: int
    epochs: int
    train_s: float | None
    reason: str | None
    kept: Mapping[str, Any] | None
    scores: Metrics


@dataclass(frozen=True)
class RunFiles:
    """The content of a run's files, as plain data; empty where the run has no such file.

    Attributes:
        folder: The run directory.
        rows: Of `metrics.jsonl`.
        audit: Of `audit.json`.
        rank_audits: Of each `audit.rank-N.json`, by the number of the rank.
        state: Of the last checkpoint's `state.json`.
        config_text: The text of `config.yaml`.
        config: The same as data.
        plan: Of `plan.json`.
        history: Of `history.json`.
        results: Of `results.json`.
        data: Of `data.json`.
        unchanged: Of `unchanged.json`.
    """

    folder: Path
    rows: list[dict[str, Any]]
    audit: dict[str, Any]
    rank_audits: dict[int, dict[str, Any]]
    state: dict[str, Any]
    config_text: str
    config: dict[str, Any]
    plan: dict[str, Any]
    history: dict[str, Any]
    results: dict[str, Any]
    data: dict[str, Any]
    unchanged: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.folder.name))

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if SCORE in row]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of training steps."""
        return [row for row in self.rows if "train/grad_norm" in row]

    @property
    def trivial(self) -> Metrics:
        """Metrics of the trivial predictor; empty if the run did not record them."""
        found: Metrics = self.results.get("trivial", {})
        return found

    def direction(self, task: str, metric: str) -> str | None:
        """`higher` or `lower` is better; None if that is not known."""
        found: str | None = self.results.get("tasks", {}).get(task, {}).get("directions", {}).get(metric)
        return found

    def main_metric(self, task: str) -> str | None:
        """The metric that stands for a task; None if the run did not record it."""
        found: str | None = self.results.get("tasks", {}).get(task, {}).get("metric")
        return found

    @property
    def metrics(self) -> dict[str, list[str]]:
        """The names of the metrics of each task, from the validations."""
        found: dict[str, list[str]] = {}
        for row in self.validations:
            for key in row:
                first, *rest = key.split("/", 1)
                if first != "val":
                    continue
                # A metric has no slash in it; a task might.
                task, _, metric = rest[0].rpartition("/")
                if not task:  # of the whole run, such as its best score
                    continue
                if metric not in found.setdefault(task, []):
                    found[task].append(metric)
        return found

    @property
    def best(self) -> dict[str, Any] | None:
        """The validation of the best weights by `val/score`; None if it never was finite."""
        rows = [row for row in self.validations if row[SCORE] is not None]
        return max(rows, key=lambda row: (row[SCORE], -row["step"]), default=None)

    @property
    def spans(self) -> list[PhaseSpan]:
        """The phases that have begun, in order."""
        names = list(dict.fromkeys([*(row["phase"] for row in self.rows), *(p["name"] for p in self.audit["phases"])]))
        ends = {end["ended"]: end for end in self.results.get("phases", ())}
        spans: list[PhaseSpan] = []
        step, before = 0, 0.0
        for name in names:
            own = [row["step"] for row in self.rows if row["phase"] == name]
            end = ends.get(name, {})
            took = end["train_s"] - before if "train_s" in end else None
            scores = end.get("scores") or self.state.get("scores", {}).get(name, {})
            epochs = sum(row["phase"] == name for row in self.validations)
            last = max(own, default=step)
            spans.append(PhaseSpan(name, step, last, epochs, took, end.get("reason"), end.get("kept"), scores))
            step, before = last, end.get("train_s", before)
        return spans

    def with_setup(self, results: Mapping[str, Any], plan: Mapping[str, Any]) -> RunFiles:
        """With what a set-up of the same configuration says in place of what an earlier version did not record."""
        parts = [phase.get("parts") for phase in self.plan.get("phases", ())]
        is_known = bool(parts) and all(parts)
        return replace(self, results={**results, **self.results}, plan=self.plan if is_known else dict(plan))


def what_is_missing(folder: Path) -> list[str]:
    """The files without which a folder is no finished run, as far as they are not there."""
    return [name for name in NEEDED if not (folder / name).is_file()]


def read_run(folder: Path) -> RunFiles:
    """Reads the files of a finished run.

    Raises:
        RunFileError: One that it needs is missing, or one is damaged.
    """
    text = read_config_text(folder / CONFIG)
    try:
        config = read_source(folder / CONFIG).data
    except ConfigError as error:
        raise RunFileError(str(error)) from error
    others = sorted(folder.glob("audit.rank-*.json"))
    return RunFiles(
        folder=folder,
        rows=read_metrics(folder / METRICS),
        audit=read_audit(folder / AUDIT),
        rank_audits={int(file.suffixes[-2].rpartition("-")[2]): read_audit(file) for file in others},
        state=read_state_file(folder / LAST_STATE),
        config_text=text,
        config=config,
        plan=read_plan(folder / PLAN) if (folder / PLAN).is_file() else {},
        history=read_history(folder / HISTORY) if (folder / HISTORY).is_file() else {},
        results=read_results(folder / RESULTS) if (folder / RESULTS).is_file() else {},
        data=read_data_record(folder / DATA) if (folder / DATA).is_file() else {},
        unchanged=read_unchanged(folder / UNCHANGED) if (folder / UNCHANGED).is_file() else {},
    )


def flat(config: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """A configuration as dotted keys and values in words; phases are named, not numbered."""
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        elif key == "phases" and isinstance(value, list):
            for number, phase in enumerate(value):
                own = phase if isinstance(phase, Mapping) else {}
                rest = {inner: each for inner, each in own.items() if inner != "name"}
                found |= flat(rest, f"{name}.{own.get('name', number)}.")
        else:
            found[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found
