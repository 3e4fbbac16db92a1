"""The keys that each file of a run has to hold, as far as they are read; more may be there."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class RunFileContent(BaseModel):
    """The keys that a file has to hold, as far as they are read; more may be there."""

    model_config = ConfigDict(strict=True, extra="allow")


class RowContent(RunFileContent):
    step: int
    phase: str


class FrozenContent(RunFileContent):
    count: int
    root: str
    fingerprints: dict[str, str]


class TrainableContent(RunFileContent):
    count: int
    changed: int


class ChecksContent(RunFileContent):
    steps: int
    tripwires: int
    fingerprints: int


class ViolationContent(RunFileContent):
    kind: str
    name: str
    phase: str
    step: int
    cause: str
    detail: str


class PhaseContent(RunFileContent):
    name: str
    completed: bool
    freeze: list[str]
    frozen: FrozenContent
    trainable: TrainableContent
    checks: ChecksContent
    violations: list[ViolationContent]


class AuditContent(RunFileContent):
    ok: bool
    phases: list[PhaseContent]
    ended_the_run: bool = False


class StateContent(RunFileContent):
    digests: dict[str, str] = {}
    phase: str = ""
    tied: dict[str, str] = {}
    shards: dict[str, dict[str, Any]] = {}


class ChangeContent(RunFileContent):
    step: int
    key: str
    old: Any
    new: Any


class HistoryContent(RunFileContent):
    command: str | None
    changes: list[ChangeContent]


class TaskFormContent(RunFileContent):
    classes: list[str]
    num_outputs: int
    constant: list[float | None] | None


class DataContent(RunFileContent):
    digests: dict[str, dict[str, str | None]]


class FormContent(RunFileContent):
    channels: int
    tasks: dict[str, TaskFormContent]


class PlanPhaseContent(RunFileContent):
    name: str
    length: str
    freeze: list[str]
    train: list[str] = []
    flops: dict[str, float]


class PlanContent(RunFileContent):
    trunk: str
    phases: list[PlanPhaseContent]


class TaskGoalContent(RunFileContent):
    metric: str
    directions: dict[str, str | None]


class PhaseEndContent(RunFileContent):
    ended: str
    reason: str
    step: int
    train_s: float
    scores: dict[str, dict[str, float | None]]


class BestScoreContent(RunFileContent):
    score: float | None
    step: int


class SessionContent(RunFileContent):
    step: int
    began: str
    device: str
    machine: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None


class ResultsContent(RunFileContent):
    tasks: dict[str, TaskGoalContent]
    trivial: dict[str, dict[str, float | None]]
    phases: list[PhaseEndContent]
    best: BestScoreContent
    train_s: float
    sessions: list[SessionContent]


class OutputDifferenceContent(RunFileContent):
    task: str
    split: str
    image: int
    images: int
    max_difference: float | None


class UnchangedContent(RunFileContent):
    run: str
    before: str
    after: str
    images: int
    tasks: dict[str, str]
    equal: bool
    differences: list[OutputDifferenceContent]
