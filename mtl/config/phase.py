"""The configuration of phases: what is frozen, for how long, and how the rest is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.cache import CacheMode
from mtl.config.names import PhaseName
from mtl.config.optim import BalanceConfig, LrScheduleConfig, OptimizerConfig, word_for
from mtl.config.types import (
    Count,
    CountedConfig,
    Finite,
    NotNegative,
    NotNegativeByPattern,
    Patterns,
    Positive,
    PositiveByPattern,
    Strict,
    one_as_list,
)
from mtl.config.yaml_source import KeyPath
from mtl.patterns import Counted, PatternLike
from mtl.runtime.best import Direction

# What has no meaning in a phase that trains nothing.
_OF_TRAINING = ("freeze", "train", "tasks", "lr", "layer_decay", "optimizer", "lr_schedule", "weight_decay", "balance")


def check_one_of(model: Strict, keys: Sequence[str]) -> None:
    """Raises pydantic's kind of error unless exactly one of some keys has a value."""
    given = [key for key in keys if getattr(model, key) not in (None, False)]
    if len(given) != 1:
        but = f", not {' and '.join(given)}" if given else ""
        raise PydanticCustomError("one_of", f"Input should have exactly one of {', '.join(keys)}{but}")


class UntilConfig(Strict):
    """A condition that ends a phase.

    It has exactly one of `plateau`, `metric`, `wall_time_s`, `epochs`, `steps`, `any` and `all`; the other keys belong
    to one of these.

    Attributes:
        plateau: A metric; the condition holds when it has had no new best for `patience` epochs.
        metric: A metric; the condition holds when its latest value is `at_least` or `at_most` the given one.
        wall_time_s: Seconds spent in the phase.
        epochs: Epochs done in the phase; useful inside `all`.
        steps: Steps done in the phase; useful inside `all`.
        any: Conditions of which at least one has to hold.
        all: Conditions that have to hold at the same time.
        patience: Epochs in a row without a new best; 1 if not set. Refused without `plateau`.
        min_delta: The margin by which a value has to beat the best one; 0 if not set. Refused without `plateau`.
        direction: Which values are better. Refused without `plateau`; required by it only for a metric of your own
            whose class does not say so.
        at_least: The value that `metric` has to reach. Refused without `metric`, and with `at_most`.
        at_most: The value that `metric` has to fall to. Refused without `metric`, and with `at_least`.
    """

    plateau: str | None = None
    metric: str | None = None
    wall_time_s: Positive | None = None
    epochs: Count | None = None
    steps: Count | None = None
    any: Annotated[list[UntilConfig], Field(min_length=1)] | None = None
    all: Annotated[list[UntilConfig], Field(min_length=1)] | None = None
    patience: Count | None = None
    min_delta: NotNegative | None = None
    direction: Direction | None = None
    at_least: Finite | None = None
    at_most: Finite | None = None

    @model_validator(mode="after")
    def _is_one_condition(self) -> UntilConfig:
        kinds = ["plateau", "metric", "wall_time_s", "epochs", "steps", "any", "all"]
        check_one_of(self, kinds)
        for key in ("patience", "min_delta", "direction"):
            if getattr(self, key) is not None and self.plateau is None:
                raise PydanticCustomError("until", f"Input should have {key} only with plateau")
        marks = [key for key in ("at_least", "at_most") if getattr(self, key) is not None]
        if self.metric is not None and len(marks) != 1:
            raise PydanticCustomError("until", "Input should have either at_least or at_most with metric")
        if self.metric is None and marks:
            raise PydanticCustomError("until", f"Input should have {marks[0]} only with metric")
        return self


class RestoreConfig(Strict):
    """Which weights a phase begins with.

    Attributes:
        which: `last`: the weights as they are. `best`: parameters, buffers and optimizer state of the run's best epoch
            so far.
        metric: The metric that decides which epoch is the best; `val/score` if not set. Refused with `last`.
        direction: Which values of `metric` are better. Required only for a metric of your own whose class does not say
            so. Refused with `last`.
    """

    which: Literal["best", "last"]
    metric: str | None = None
    direction: Direction | None = None

    @model_validator(mode="after")
    def _metric_goes_with_best(self) -> RestoreConfig:
        if self.which == "last" and not self.metric == self.direction is None:
            raise PydanticCustomError("restore", "Input should have metric and direction only with best")
        return self


class PhaseConfig(Strict):
    """One phase. Its length is exactly one of `epochs`, `steps`, `until` and `evaluate_only`.

    Attributes:
        name: Its name in logs, plan and audit; no two phases have the same.
        freeze: Patterns of what is frozen; if neither this nor `train` is set, everything trains.
        train: Patterns of what is trained; everything else is frozen. Refused with `freeze`.
        epochs: Length in epochs (passes over the training data).
        steps: Length in optimizer steps.
        until: A condition that ends the phase; requires `max_epochs` or `max_steps`.
        max_epochs: At most this many epochs. Refused without `until`.
        max_steps: At most this many steps. Refused without `until`.
        evaluate_only: Everything is frozen, no step is made, and the model is validated once. Refused with every key
            of what is trained or how: `freeze`, `train`, `tasks`, `lr`, `layer_decay`, `optimizer`, `lr_schedule`,
            `weight_decay`, `balance`, and `optimizer_state: reset`.
        tasks: The tasks whose losses are active; all if not set. All tasks are validated.
        lr: `optim.lr` of this phase.
        layer_decay: `optim.layer_decay` of this phase.
        optimizer: `optim.optimizer` of this phase.
        lr_schedule: `optim.lr_schedule` of this phase; every phase begins its schedule from the start.
        weight_decay: `optim.weight_decay` of this phase.
        balance: The run's `balance` for this phase.
        batch_size: `data.batch_size` of this phase.
        cache: `cache.mode` of this phase.
        optimizer_state: `keep`: each parameter continues with the optimizer state that it last had, also from before it
            was frozen. `reset`: from scratch.
        restore: The weights to begin with.
    """

    name: PhaseName
    freeze: Patterns | None = None
    train: Annotated[Patterns, Field(min_length=1)] | None = None
    epochs: Count | None = None
    steps: Count | None = None
    until: UntilConfig | None = None
    max_epochs: Count | None = None
    max_steps: Count | None = None
    evaluate_only: bool = False
    tasks: Annotated[list[str], Field(min_length=1), BeforeValidator(one_as_list)] | None = None
    lr: PositiveByPattern | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    optimizer: Annotated[OptimizerConfig, word_for("name")] | None = None
    lr_schedule: LrScheduleConfig | None = None
    weight_decay: NotNegativeByPattern | None = None
    balance: Annotated[BalanceConfig, word_for("method")] | None = None
    batch_size: Count | None = None
    cache: CacheMode | None = None
    optimizer_state: Literal["keep", "reset"] = "keep"
    restore: Annotated[RestoreConfig, word_for("which")] = RestoreConfig(which="last")

    @model_validator(mode="after")
    def _is_whole(self) -> PhaseConfig:
        if self.freeze is not None and self.train is not None:
            raise PydanticCustomError("freeze", "Input should have freeze or train, not both")
        if self.tasks is not None and len(set(self.tasks)) < len(self.tasks):
            raise PydanticCustomError("tasks", "Input should have no task twice")
        check_one_of(self, ["epochs", "steps", "until", "evaluate_only"])
        limited = self.max_epochs is not None or self.max_steps is not None
        if self.until is not None and not limited:
            raise PydanticCustomError("length", "Input should have max_epochs or max_steps with until")
        if self.until is None and limited:
            raise PydanticCustomError("length", "Input should have max_epochs and max_steps only with until")
        if self.evaluate_only and self.optimizer_state == "reset":
            raise PydanticCustomError("length", "Input should have no optimizer_state with evaluate_only")
        for key in _OF_TRAINING if self.evaluate_only else ():
            if getattr(self, key) is not None:
                raise PydanticCustomError(
                    "length",
                    f"Input should have no {key} with evaluate_only: everything is frozen, and nothing stepped",
                )
        return self

    @property
    def patterns_key(self) -> str:
        """The key that says what is frozen."""
        return "evaluate_only" if self.evaluate_only else "train" if self.train is not None else "freeze"


class RepeatConfig(Strict):
    """Several phases in turn, more than once. It stands in the list in place of a phase.

    Attributes:
        repeat: How many rounds.
        phases: The phases of a round, or further repeats. The number of the round is added to their names: `heads.1`,
            `trunk.1`, `heads.2`, `trunk.2`, ...
    """

    repeat: Count
    phases: Annotated[list[PhaseEntry], Field(min_length=1)]


PhaseEntry = Annotated[
    Annotated[PhaseConfig, Tag("phase")] | Annotated[RepeatConfig, Tag("repeat")],
    Discriminator(lambda value: "repeat" if _is_repeat(value) else "phase"),
]
RepeatConfig.model_rebuild()


def _is_repeat(value: object) -> bool:
    return isinstance(value, RepeatConfig) or (isinstance(value, dict) and bool({"repeat", "phases"} & value.keys()))


def patterns_of(entries: Sequence[str | CountedConfig]) -> list[PatternLike]:
    """Patterns as they were written, as patterns."""
    return [Counted(e.pattern, e.must_match) if isinstance(e, CountedConfig) else e for e in entries]


@dataclass(frozen=True)
class WrittenPhase:
    """One phase of the run, in the order in which they follow each other.

    Attributes:
        name: Its name, with the round's number if it is repeated.
        config: What the user wrote.
        path: The key path under which it was written.
    """

    name: str
    config: PhaseConfig
    path: KeyPath


def unroll(
    entries: Sequence[PhaseConfig | RepeatConfig], path: KeyPath = ("phases",), rounds: str = ""
) -> Iterator[WrittenPhase]:
    """The phases of a run with every `repeat` written out."""
    for index, entry in enumerate(entries):
        if isinstance(entry, PhaseConfig):
            yield WrittenPhase(entry.name + rounds, entry, (*path, index))
        else:
            for number in range(1, entry.repeat + 1):
                yield from unroll(entry.phases, (*path, index, "phases"), f"{rounds}.{number}")


def num_unrolled(entries: Sequence[PhaseConfig | RepeatConfig]) -> int:
    """How many phases `unroll` gives."""
    return sum(1 if isinstance(entry, PhaseConfig) else entry.repeat * num_unrolled(entry.phases) for entry in entries)
