"""From the phases that a user wrote to phases resolved against a model: what each freezes, trains, and with what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch.nn.modules.batchnorm import _BatchNorm

from mtl.config import ConfigError, SettingError, mistake_of
from mtl.config.optim import OptimConfig, PlateauConfig
from mtl.config.phase import PhaseConfig, WrittenPhase
from mtl.config.precedence import is_written
from mtl.config.yaml_source import KeyPath
from mtl.data import Mixed, Order
from mtl.freeze import FreezePlan
from mtl.optim.balance.balance import Balance
from mtl.optim.lr_schedule import try_out_schedule
from mtl.patterns import PatternError, select
from mtl.patterns.module_tree import named_modules, named_parameters
from mtl.phases.freeze_rules import FreezeResolver, PhaseFreeze, PhaseResolver, ResolveContext, frozen_always
from mtl.phases.groups import GroupResolver
from mtl.phases.metrics import SCORE
from mtl.phases.phase_length import PhaseLength
from mtl.phases.reads import Reads, reads_of
from mtl.runtime.best import Direction


@dataclass(frozen=True)
class Phase:
    """A phase, resolved.

    Attributes:
        name: Its name, with the round's number if it is repeated.
        config: What the user wrote.
        written: The same with its place; rounds of a repeat have one.
        optim: How its parameters are stepped: the run's settings with the phase's own on top.
        length: What the scheduler has to know.
        tasks: The tasks whose losses are active, and train something.
        sharing: Those of them whose losses depend on trainable parameters of the trunk.
        reached: By task, the full names of the parameters that its loss depends on.
        balance: The balancing method, for exactly these tasks.
        looks_at: The parameters whose gradients the method compares, if its `on` names a layer.
        freeze: What it freezes, and why.
        groups: What the optimizer trains, in groups with peak learning rate and weight decay.
        reads: Which of the settings that not every phase reads it reads.
        batch_size: Images in one batch.
        order: The order of the training images.
        steps_per_epoch: Optimizer steps in one pass over the training data.
        num_steps: Its length in optimizer steps, at most.
        plateau_direction: Which values are better of the metric that the learning rate waits for, if it does.
        restore: Metric and direction of the best weights that it begins with; None if it continues with the last ones.
    """

    name: str
    config: PhaseConfig
    written: WrittenPhase
    optim: OptimConfig
    length: PhaseLength
    tasks: tuple[str, ...]
    sharing: tuple[str, ...]
    reached: Mapping[str, frozenset[str]]
    balance: Balance
    looks_at: tuple[str, ...]
    freeze: PhaseFreeze
    groups: list[dict[str, Any]]
    reads: Reads
    batch_size: int
    order: Order
    steps_per_epoch: int
    num_steps: int
    plateau_direction: Direction
    restore: tuple[str, Direction] | None

    @property
    def balances_gradients(self) -> bool:
        """Whether each task has a backward of its own, in which gradients are found that a method then weighs."""
        return self.balance.by_gradients is not None and len(self.sharing) > 1

    @property
    def backward_by_task(self) -> bool:
        """Whether each task has a backward of its own through the trunk."""
        return self.balances_gradients and self.balance.on == "parameters"


def resolve_phases(context: ResolveContext, mistakes: Sequence[str] = ()) -> list[Phase]:
    """Resolves all phases of a run; repeated ones share what they have in common.

    Args:
        context: What they are resolved against; phases without a balancing method are left out.
        mistakes: What has turned out not to work so far.

    Raises:
        ConfigError: Whatever turns out not to work, that of all phases at once.
    """
    resolved: dict[KeyPath, Phase] = {}
    phases, found = [], dict.fromkeys(mistakes)
    try:
        always = frozen_always(context)
    except ConfigError as error:
        found |= dict.fromkeys(error.mistakes)
        always = []
    for written in context.config.written_phases:
        if written.path not in context.balance_of:
            continue
        if written.path not in resolved:
            try:
                resolved[written.path] = _Resolver(context, written, always).phase()
            except ConfigError as error:
                # What is wrong with a setting of the whole run shows in every phase; once is enough.
                places = {_place_of(mistake) for mistake in found}
                found |= dict.fromkeys(mistake for mistake in error.mistakes if _place_of(mistake) not in places)
                continue
        phase = resolved[written.path]
        phases.append(replace(phase, name=written.name, length=replace(phase.length, name=written.name)))
    if found:
        raise ConfigError(list(found))
    return phases


def _place_of(mistake: str) -> tuple[str, ...]:
    """File and line, and the key."""
    return tuple(mistake.split(": ")[:2])


_Result = TypeVar("_Result")


def _attempt(mistakes: list[str], part: Callable[[], _Result]) -> _Result | None:
    """The result of a part of the work; None if it finds mistakes, which are added to the others."""
    try:
        return part()
    except ConfigError as error:
        mistakes.extend(error.mistakes)
        return None


class _Resolver(PhaseResolver):
    """Resolves one written phase."""

    def __init__(self, context: ResolveContext, written: WrittenPhase, always: list[str]) -> None:
        super().__init__(context, written)
        self.always = always
        self.optim = self.config.optim_of(self.phase_config)
        self.order = context.order_of(context.tasks_of[written.path])
        self.batch_size = self.phase_config.batch_size or self.config.data.batch_size
        self.steps_per_epoch = -(-self.order.num_batches(self.batch_size) // self.optim.accumulate)

    def phase(self) -> Phase:
        """Raises `ConfigError` with all that is wrong with the phase."""
        mistakes: list[str] = []
        tasks = self.context.tasks_of[self.written.path]
        place = self.context.balance_of[self.written.path]
        balance: Balance = self.root.get_submodule(f"balance.{place}")  # type: ignore[assignment]
        resolver = FreezeResolver(self.context, self.written, self.always)
        freeze = _attempt(mistakes, lambda: resolver.resolve(place))
        length = _attempt(mistakes, lambda: PhaseLength.from_config(self.written, self.context.metrics))
        plan = None if freeze is None else freeze.plan
        groups = _attempt(mistakes, lambda: GroupResolver(self.context, self.written).resolve(plan, balance))
        num_steps = 0 if length is None else length.num_steps(self.steps_per_epoch)
        direction = _attempt(mistakes, lambda: self._check_lr_schedule(num_steps, length))
        restore = _attempt(mistakes, self._restore)
        _attempt(mistakes, lambda: self._check_batch_size(plan, tasks))
        looks_at = _attempt(mistakes, lambda: self._check_balance(balance, plan))
        _attempt(mistakes, lambda: self._check_mix(balance))
        if mistakes or freeze is None or length is None or groups is None or direction is None or looks_at is None:
            raise ConfigError(mistakes)
        return Phase(
            name=self.written.name,
            config=self.phase_config,
            written=self.written,
            optim=self.optim,
            length=length,
            tasks=tasks,
            sharing=self._sharing(tasks, freeze.plan),
            reached={task: self.context.reached[task] for task in tasks},
            balance=balance,
            looks_at=looks_at,
            freeze=freeze,
            groups=groups.groups,
            reads=reads_of(self.config, self.written, tasks, groups, num_steps, self.steps_per_epoch),
            batch_size=self.batch_size,
            order=self.order,
            steps_per_epoch=self.steps_per_epoch,
            num_steps=num_steps,
            plateau_direction=direction,
            restore=restore,
        )

    def _check_lr_schedule(self, num_steps: int, length: PhaseLength | None) -> Direction:
        """Checks that the rate's schedule and the phase's length go together.

        Returns:
            Which values are better of the metric that the rate waits for.
        """
        schedule = self.optim.lr_schedule
        direction: Direction = "higher"
        if isinstance(schedule, PlateauConfig):
            direction = self.context.metrics.direction(
                schedule.metric, schedule.direction, self.config.path_of(self.written, "lr_schedule")
            )
        if length is None or self.phase_config.evaluate_only:
            return direction
        try:
            try_out_schedule(schedule, num_steps, self.steps_per_epoch)
        except SettingError as error:
            path = self.config.path_of(self.written, "lr_schedule")[:-1]
            raise mistake_of(self.config, error, path) from error
        warmup_steps = getattr(schedule, "warmup_steps", 0)
        if warmup_steps >= num_steps:
            message = f"expected fewer than the phase's {num_steps} steps, got {warmup_steps}"
            raise self.mistake_about("lr_schedule", message, "warmup_steps")
        never = f"is judged after whole passes of {self.steps_per_epoch} steps, but the phase has {num_steps} steps"
        if isinstance(schedule, PlateauConfig) and num_steps < self.steps_per_epoch:
            raise self.mistake_about("lr_schedule", f"a plateau {never}")
        if num_steps < self.steps_per_epoch and length.metrics:
            raise self.config.mistake((*self.written.path, "until"), f"a metric {never}")
        return direction

    def _restore(self) -> tuple[str, Direction] | None:
        restore = self.phase_config.restore
        if restore.which == "last":
            return None
        metric, here = restore.metric or SCORE, (*self.written.path, "restore")
        return metric, self.context.metrics.direction(metric, restore.direction, here)

    def _check_batch_size(self, plan: FreezePlan | None, tasks: Sequence[str]) -> None:
        if self.phase_config.evaluate_only:
            return
        own = self.phase_config.batch_size is not None
        place: KeyPath = (*self.written.path, "batch_size") if own else ("data", "batch_size")
        num_images = self.order.num_images
        if self.batch_size > num_images:
            is_named = is_written(self.config.source, place) or isinstance(self.order, Mixed)
            place = place if is_named else ("data", "num_train")
            message = f"expected batches of at most the {num_images} training images, got {self.batch_size}"
            raise self.config.mistake(place, message)
        norm = None if plan is None or self.batch_size > 1 else self._norm_over_images(plan, tasks)
        if norm is not None:
            message = f"expected batches of two images or more: BatchNorm ({norm}) cannot train on one"
            raise self.config.mistake(place, message)
        if self.optim.accumulate > (num := self.order.num_batches(self.batch_size)):
            message = f"expected at most the {num} batches of an epoch of {self.phase_config.name!r}, got"
            raise self.config.mistake(("optim", "accumulate"), f"{message} {self.optim.accumulate}")

    def _norm_over_images(self, plan: FreezePlan, tasks: Sequence[str]) -> str | None:
        """A norm that is run in train mode, and takes its statistics over the images of a batch."""
        run, held = ("trunk", *(f"heads.{task}" for task in tasks)), set(plan.held_in_eval)
        for name, module in named_modules(self.root):
            if isinstance(module, _BatchNorm) and name not in held and any(name.startswith(f"{part}.") for part in run):
                return name
        return None

    def _check_balance(self, balance: Balance, plan: FreezePlan | None) -> tuple[str, ...]:
        """The parameters that a balancing method looks at, if a layer is named.

        Raises:
            ConfigError: It does not go with the batches of a step, or no trainable parameter is in that layer.
        """
        method, settings = balance.by_gradients, self.phase_config.balance or self.config.balance
        if method is None or self.phase_config.evaluate_only:
            return ()
        accumulate = self.optim.accumulate
        if method.num_batches > 1 and accumulate != method.num_batches:
            message = f"balance {settings.method} compares {method.num_batches} independent batches in a step; expected"
            raise self.config.mistake(("optim", "accumulate"), f"{message} {method.num_batches}, got {accumulate}")
        if balance.on != "parameters" and accumulate > 1:
            place = "features" if balance.on == "features" else "a layer"
            message = f"balance.on={place} compares the gradients of one batch, whose graph it keeps; expected 1, got"
            raise self.config.mistake(("optim", "accumulate"), f"{message} {accumulate}")
        if balance.on in ("parameters", "features") or plan is None:
            return ()
        path = (*(self.written.path if self.phase_config.balance else ()), "balance", "on", "layer")
        names = [name for name in named_parameters(self.root) if name.startswith("trunk.")]
        try:
            selected = select([balance.on], names, self.tree).names
        except PatternError as error:
            raise self.config.mistake(path, str(error)) from error
        found = tuple(name for name in selected if name in plan.names.trainable)
        if not found and len(self._sharing(self.context.tasks_of[self.written.path], plan)) > 1:
            message = f"expected a pattern of parameters of the trunk that train in {self.phase_config.name!r}, got"
            raise self.config.mistake(path, f"{message} {balance.on!r}, which are frozen")
        return found

    def _check_mix(self, balance: Balance) -> None:
        """Raises `ConfigError` if a method that learns from several losses of a step only ever has one."""
        if not balance.param_groups or not isinstance(self.order, Mixed) or self.phase_config.evaluate_only:
            return
        alone = self.order.mix.is_single and self.order.most_tasks == 1 and self.optim.accumulate == 1
        if alone and len(self.order.sizes) > 1:
            method = (self.phase_config.balance or self.config.balance).method
            message = f"a batch has labels of one task only, and balance {method} compares the tasks of a step"
            path: KeyPath = ("data", "mix", "batches" if self.order.mix.by != "round_robin" else "by")
            raise self.config.mistake(path, f"{message}; expected batches: mixed, or another method")

    def _sharing(self, tasks: Sequence[str], plan: FreezePlan) -> tuple[str, ...]:
        trained = {name for name in plan.names.trainable if name.startswith("trunk.")}
        return tuple(task for task in tasks if not trained.isdisjoint(self.context.reached[task]))
