"""The freeze of a phase: the user's patterns, those of every phase, and parameters that no active task reaches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from mtl.config import RunConfig
from mtl.config.errors import ConfigError
from mtl.config.phase import WrittenPhase, patterns_of
from mtl.config.yaml_source import KeyPath
from mtl.data import Order
from mtl.freeze import FreezeError, FreezePlan, plan_freeze
from mtl.model.teachers import TEACHERS
from mtl.optim.balance.balance import Balance
from mtl.patterns import ModuleTree, PatternError, PatternLike, partition, select, text_of
from mtl.patterns.module_tree import describe
from mtl.phases.active_tasks import classic_patterns
from mtl.phases.metrics import RunMetrics
from mtl.runtime.text import condense, shorten

_ALL_TAKEN_BACK = "the patterns select nothing in the end: all that they select is taken back"


@dataclass(frozen=True)
class WrittenPattern:
    """A pattern as a user wrote it.

    Attributes:
        key: Where: `freeze`, `train`, `freeze_always`, or `NOT_TRAIN_IN_MULTI_TASK`.
        text: The pattern, or several that stand for one list of names.
        places: Its places among the patterns that hold.
        where: File and line.
    """

    key: str
    text: str
    places: range
    where: str


@dataclass(frozen=True)
class ResolveContext:
    """The model, tasks and configuration that phases are resolved against.

    Attributes:
        config: The run.
        root: One module around all that has parameters, under the names that users write: trunk, heads, balance,
            teachers.
        fixed: Patterns of what the model itself keeps from training, and of the teachers.
        metrics: The metrics by name.
        balance_of: The place in `root.balance` of each written phase's balancing method, by the phase's key path.
        tasks_of: The tasks of each written phase, by the phase's key path.
        reached: Full names of the parameters that each task's loss depends on.
        order_of: The order of the training images, by the tasks that are trained.
    """

    config: RunConfig
    root: nn.Module
    fixed: Sequence[str]
    metrics: RunMetrics
    balance_of: Mapping[KeyPath, int]
    tasks_of: Mapping[KeyPath, tuple[str, ...]]
    reached: Mapping[str, frozenset[str]]
    order_of: Callable[[Collection[str]], Order]

    @cached_property
    def tree(self) -> ModuleTree:
        """The description of `root`."""
        return describe(self.root)


@dataclass(frozen=True)
class PhaseFreeze:
    """The freeze of a phase.

    Attributes:
        patterns: All patterns that hold: the phase's own, those of every phase, what the model itself keeps fixed, the
            teachers, and what no active task reaches.
        written: Those of them that a user wrote, as they were written.
        plan: What they freeze.
        unreached: Parameters that would train, but that no active task's loss depends on.
    """

    patterns: list[PatternLike]
    written: tuple[WrittenPattern, ...]
    plan: FreezePlan
    unreached: tuple[str, ...]

    @property
    def written_at(self) -> list[str]:
        """Of each of `patterns`, file and line; or why it is there, if no user wrote it."""
        by_place = {place: each.where for each in self.written for place in each.places}
        reasons = dict.fromkeys(self.unreached, "no active task reaches it") | {TEACHERS: "a teacher never trains"}
        return [
            by_place.get(place, reasons.get(text_of(each), "fixed by the model"))
            for place, each in enumerate(self.patterns)
        ]


def frozen_always(context: ResolveContext) -> list[str]:
    """The modules and tensors that every phase freezes, statistics too; patterns take back among themselves only."""
    patterns = patterns_of(context.config.freeze_always)
    parameters, buffers = _names_in(context.root)
    try:
        split = partition(patterns, parameters, buffers, context.tree)
    except PatternError as error:
        raise context.config.mistake(("freeze_always", error.index), str(error)) from error
    refuse_teachers(context, patterns, ("freeze_always",), trains=False)
    always = condense([*split.frozen, *split.frozen_buffers], [*parameters, *buffers])
    if patterns and not always:
        raise context.config.mistake(("freeze_always",), _ALL_TAKEN_BACK)
    try:
        plan_freeze(context.root, list(always))
    except FreezeError as error:
        raise context.config.mistake(("freeze_always",), str(error)) from error
    return always


def refuse_teachers(context: ResolveContext, patterns: Sequence[PatternLike], key: KeyPath, trains: bool) -> None:
    """Raises `ConfigError` if patterns ask for a teacher to train.

    Args:
        context: What they are resolved against.
        patterns: What is frozen, or trained.
        key: Their key path.
        trains: Whether they list what is trained: then none may select a teacher; else none may take one back.
    """
    every_name = [name for names in _names_in(context.root) for name in names]
    taught = [name for name in every_name if name.startswith(f"{TEACHERS}.")]
    try:
        found = select(patterns if trains else [TEACHERS, *patterns], every_name, context.tree) if taught else None
    except PatternError:
        return  # It is refused for that.
    selected = set(found.names) if found else set()
    asked = next((name for name in taught if (name in selected) == trains), None)
    if found is None or asked is None:
        return
    index = found.decided_by[asked] - (0 if trains else 1)
    would = f"pattern {text_of(patterns[index])!r} would train {asked}, and a teacher never trains"
    instead = f"leave it out, or add {'!' if trains else ''}{TEACHERS} after it"
    raise context.config.mistake((*key, index), f"{would}; {instead}")


def _names_in(root: nn.Module) -> tuple[list[str], list[str]]:
    """The names of all parameters and of all buffers, aliases included."""
    return (
        [name for name, _ in root.named_parameters(remove_duplicate=False)],
        [name for name, _ in root.named_buffers(remove_duplicate=False)],
    )


class PhaseResolver:
    """Resolves one aspect of one written phase."""

    def __init__(self, context: ResolveContext, written: WrittenPhase) -> None:
        """Args:
        context: What the phase is resolved against.
        written: The phase.
        """
        self.context = context
        self.config = context.config
        self.root = context.root
        self.tree = context.tree
        self.written = written
        self.phase_config = written.config

    def mistake_about(self, key: str, message: str, *below: str) -> ConfigError:
        """A mistake at a key that the phase may set itself: there if it does, else at that of the run."""
        return self.config.mistake((*self.config.path_of(self.written, key), *below), message)


class FreezeResolver(PhaseResolver):
    """Works out what one written phase freezes; `resolve` is the way in."""

    def __init__(self, context: ResolveContext, written: WrittenPhase, always: list[str]) -> None:
        """Args: as for any resolver, and
        always: From `frozen_always`.
        """
        super().__init__(context, written)
        self.always = always

    def resolve(self, balance: int) -> PhaseFreeze:
        """Resolves the freeze.

        Args:
            balance: The place of the balancing method in `root.balance`; the others rest.

        Raises:
            ConfigError: A pattern cannot be read or selects nothing, the line cannot be drawn there, or nothing trains.
        """
        for key in ("freeze", "train"):
            patterns = patterns_of(getattr(self.phase_config, key) or [])
            refuse_teachers(self.context, patterns, (*self.written.path, key), trains=key == "train")
        own = self._own_patterns()
        resting = [
            name
            for name, _ in self.root.named_parameters()
            if name.startswith("balance.") and not name.startswith(f"balance.{balance}.")
        ]
        freeze = [*own, *self.always, *classic_patterns(self.config), *self.context.fixed, *resting]
        plan, unreached = self._plan(freeze, len(own))
        freeze += unreached if self.config.unreached == "freeze" else []
        every_name = [name for names in _names_in(self.root) for name in names]
        if self.phase_config.freeze and not select(own, every_name, self.tree).names:
            raise self.config.mistake((*self.written.path, "freeze"), _ALL_TAKEN_BACK)
        if unreached and self.config.unreached == "error":
            raise self._unreached_mistake(unreached)
        self._check_that_something_trains(plan, unreached, balance)
        return PhaseFreeze(freeze, self._as_written(len(own)), plan, unreached)

    def _own_patterns(self) -> list[PatternLike]:
        """The tensors that the phase's own patterns freeze.

        `train` becomes the modules and tensors that cover all parameters but those that it lists. Statistics go with
        the parameters next to them, as ever, but those that it lists by name.
        """
        if self.phase_config.evaluate_only:
            return ["**"]
        if self.phase_config.train is None:
            return patterns_of(self.phase_config.freeze or [])
        parameters, buffers = _names_in(self.root)
        try:
            listed = set(select(patterns_of(self.phase_config.train), [*parameters, *buffers], self.tree).names)
        except PatternError as error:
            raise self.config.mistake((*self.written.path, "train", error.index), str(error)) from error
        # Statistics without any parameter next to them go with none.
        with_parameters = {name.rpartition(".")[0] for name in parameters}
        alone = [name for name in buffers if name.rpartition(".")[0] not in with_parameters]
        rest = condense([name for name in [*parameters, *alone] if name not in listed], [*parameters, *alone])
        split = partition(rest, parameters, buffers, self.tree)
        return [*rest, *(f"!{name}" for name in split.frozen_buffers if name in listed)]

    def _as_written(self, num_own: int) -> tuple[WrittenPattern, ...]:
        key, path = self.phase_config.patterns_key, self.written.path
        written: list[WrittenPattern] = []
        if key == "freeze":
            texts = [text_of(pattern) for pattern in patterns_of(self.phase_config.freeze or [])]
            written = [
                WrittenPattern(key, text, range(n, n + 1), self.config.where((*path, key, n)))
                for n, text in enumerate(texts)
            ]
        elif key == "train":
            text = ", ".join(text_of(pattern) for pattern in patterns_of(self.phase_config.train or []))
            written = [WrittenPattern(key, text, range(num_own), self.config.where((*path, key)))]
        start = num_own
        if self.always:
            text = ", ".join(text_of(pattern) for pattern in patterns_of(self.config.freeze_always))
            places = range(start, start + len(self.always))
            written.append(WrittenPattern("freeze_always", text, places, self.config.where(("freeze_always",))))
        start += len(self.always)
        for number, text in enumerate(self.config.MODEL.NOT_TRAIN_IN_MULTI_TASK, start):
            where = self.config.where(("MODEL", "NOT_TRAIN_IN_MULTI_TASK", number - start))
            written.append(WrittenPattern("NOT_TRAIN_IN_MULTI_TASK", text, range(number, number + 1), where))
        return tuple(written)

    def _plan(self, freeze: list[PatternLike], num_own: int) -> tuple[FreezePlan, tuple[str, ...]]:
        """What is frozen, and the parameters that would train but that no active task reaches."""
        key = self.phase_config.patterns_key
        try:
            names = partition(freeze, *_names_in(self.root), self.tree)
            tasks = self.context.tasks_of[self.written.path]
            reached = frozenset[str]().union(*(self.context.reached[task] for task in tasks))
            unreached = tuple(n for n in names.trainable if n not in reached and not n.startswith("balance."))
            also = unreached if self.config.unreached == "freeze" else ()
            return plan_freeze(self.root, [*freeze, *also]), unreached
        except PatternError as error:
            place: KeyPath = (*self.written.path, key, error.index)
            if error.index >= num_own:
                place = ("MODEL", "NOT_TRAIN_IN_MULTI_TASK", error.index - num_own - len(self.always))
            raise self.config.mistake(place, str(error)) from error
        except FreezeError as error:
            raise self.config.mistake((*self.written.path, key), str(error)) from error

    def _unreached_mistake(self, names: Sequence[str]) -> ConfigError:
        shown = shorten(condense(names, _names_in(self.root)[0]), 6)
        would = f"phase {self.phase_config.name!r} would train {len(names)} tensors that no active task reaches"
        return self.config.mistake(self.written.path, f"{would}: {shown}; freeze them, or set unreached to freeze")

    def _check_that_something_trains(self, plan: FreezePlan, unreached: Sequence[str], balance: int) -> None:
        key = (*self.written.path, self.phase_config.patterns_key)
        own_balance = [name for name in plan.names.frozen if name.startswith(f"balance.{balance}.")]
        balancing: Balance = self.root.get_submodule(f"balance.{balance}")  # type: ignore[assignment]
        if balancing.param_groups and own_balance and not self.phase_config.evaluate_only:
            raise self.config.mistake(
                key,
                "balance cannot be frozen, since its method steps its own weights: leave it out of freeze, or add it to"
                " train",
            )
        training = [name for name in plan.names.trainable if name not in unreached and not name.startswith("balance.")]
        if self.phase_config.evaluate_only or training:
            return
        why = "no active task reaches what is not frozen" if unreached else "every parameter is frozen"
        why += " (freeze_always freezes in every phase)" if self.always and not unreached else ""
        message = f"phase {self.phase_config.name!r} trains nothing: {why}"
        raise self.config.mistake(key, f"{message}; a phase that shall only evaluate says evaluate_only: true")
