"""The content of `results.json`: sessions, ends of phases, trivial predictor, best weights."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch

from mtl.phases.scheduler import PhaseChange
from mtl.runtime.machine import machine
from mtl.runtime.provenance import provenance
from mtl.training.setup import RunSetup
from mtl.training.validation import Scores


class RunRecord:
    """Survives a restart with the steps that it records: every checkpoint has the record up to it."""

    def __init__(self) -> None:
        self._sessions: list[dict[str, Any]] = []
        self._ends: list[dict[str, Any]] = []

    def begin_session(self, step: int, device: torch.device, tracked_at: str | None) -> None:
        """Records that a process trains from here on.

        Args:
            step: Steps done before.
            device: Where it computes.
            tracked_at: The address of the run in a tracking service, if it has one.
        """
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self._sessions.append(
            {
                "step": step,
                "began": datetime.now(UTC).isoformat(timespec="seconds"),
                "device": str(device),
                "gpu": name,
                "machine": machine(),
                "tracked_at": tracked_at,
                **provenance(),
            }
        )

    def phase_ended(self, change: PhaseChange, step: int, epoch: int, train_s: float, kept: Mapping[str, Any]) -> None:
        """Records the end of a phase.

        Args:
            change: Which one, and why.
            step: Steps done in the run.
            epoch: Epochs done in the run.
            train_s: Seconds of training and validation in the run so far.
            kept: What of the trunk was computed once, from `KeptCount.to_json`.
        """
        self._ends.append({**vars(change), "step": step, "epoch": epoch, "train_s": train_s, "kept": dict(kept)})

    def state_dict(self) -> dict[str, Any]:
        return {"sessions": list(self._sessions), "ends": list(self._ends)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the record of a checkpoint; one that is older than records has none."""
        self._sessions, self._ends = list(state.get("sessions", ())), list(state.get("ends", ()))

    def to_json(
        self, setup: RunSetup, scores: Mapping[str, Scores], best: Mapping[str, Any], train_s: float
    ) -> dict[str, Any]:
        """The content of `results.json`.

        Args:
            setup: The run.
            scores: Metrics at the end of each phase, by the phase's name.
            best: The best `val/score` and its step.
            train_s: Seconds of training and validation so far.
        """
        return {
            "tasks": task_goals(setup),
            "trivial": setup.trivial,
            "phases": [end | {"scores": scores.get(end["ended"], {})} for end in self._ends],
            "best": dict(best),
            "train_s": train_s,
            "sessions": list(self._sessions),
        }


def task_goals(setup: RunSetup) -> dict[str, Any]:
    """By task its main metric, and which values of each metric are better; None where that is not known."""
    goals: dict[str, Any] = {}
    for name, task in setup.labelled.items():
        metrics = task.every_metric()
        known = {metric: metrics.direction(metric) for metric in setup.trivial[name]}
        goals[name] = {
            "metric": task.goal.metric,
            "perfect": task.goal.perfect,
            "directions": known | {task.goal.metric: task.goal.direction},
        }
    return goals
