"""The keys that each file of a run has to hold, as far as they are read; more may be there."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Content(BaseModel):
    """The keys that a file has to hold, as far as they are read; more may be there."""

    model_config = ConfigDict(strict=True, extra="allow")


class Row(Content):
    step: int
    phase: str


class Frozen(Content):
    count: int
    root: str
    fingerprints: dict[str, str]


class Trainable(Content):
    count: int
    changed: int


class Checks(Content):
    steps: int
    tripwires: int
    fingerprints: int


class Violation(Content):
    kind: str
    name: str
    phase: str
    step: int
    cause: str
    detail: str


class Phase(Content):
    name: str
    completed: bool
    freeze: list[str]
    frozen: Frozen
    trainable: Trainable
    checks: Checks
    violations: list[Violation]


class Audit(Content):
    ok: bool
    phases: list[Phase]
    ended_the_run: bool = False


class State(Content):
    digests: dict[str, str] = {}
    phase: str = ""
    tied: dict[str, str] = {}
    shards: dict[str, dict[str, Any]] = {}


class Change(Content):
    step: int
    key: str
    old: Any
    new: Any


class History(Content):
    command: str | None
    changes: list[Change]


class TaskForm(Content):
    classes: list[str]
    num_outputs: int
    constant: list[float | None] | None


class Data(Content):
    digests: dict[str, dict[str, str | None]]


class Form(Content):
    channels: int
    tasks: dict[str, TaskForm]


class PlanPhase(Content):
    name: str
    length: str
    freeze: list[str]
    train: list[str] = []
    flops: dict[str, float]


class Plan(Content):
    trunk: str
    phases: list[PlanPhase]


class TaskGoal(Content):
    metric: str
    directions: dict[str, str | None]


class PhaseEnd(Content):
    ended: str
    reason: str
    step: int
    train_s: float
    scores: dict[str, dict[str, float | None]]


class BestScore(Content):
    score: float | None
    step: int


class Session(Content):
    step: int
    began: str
    device: str
    machine: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None


class Results(Content):
    tasks: dict[str, TaskGoal]
    trivial: dict[str, dict[str, float | None]]
    phases: list[PhaseEnd]
    best: BestScore
    train_s: float
    sessions: list[Session]


class OutputDifference(Content):
    task: str
    split: str
    image: int
    images: int
    max_difference: float | None


class Unchanged(Content):
    run: str
    before: str
    after: str
    images: int
    tasks: dict[str, str]
    equal: bool
    differences: list[OutputDifference]
