"""Where a run goes on from, whether its configuration lets it, and the state that it finds there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mtl.checkpoint.files import CheckpointError, DamagedCheckpoint, read_state
from mtl.checkpoint.load import load_checkpoint
from mtl.checkpoint.newest import load_newest, newest_first
from mtl.checkpoint.run_files import RunFileError, read_audit
from mtl.config import RunConfig
from mtl.config.changes import CHOSEN
from mtl.distributed.world import ALONE, World
from mtl.optim.balance.gradient_weights import check_same_method
from mtl.optim.lr_schedule import LrScheduleState
from mtl.patterns import text_of
from mtl.phases.resolve import Phase
from mtl.phases.scheduler import PhaseChange, TaskScheduler
from mtl.runtime.console import logger
from mtl.training.best_checkpoints import BestWeights
from mtl.training.history import History, as_of_today, differences_from, history_from
from mtl.training.run_dir import goes_on_in_place
from mtl.training.setup import Parts

_NEEDED = (
    *("step", "epoch", "change", "audit", "scores", "metrics_bytes", "train_s", "wandb_id", "features", "num_skipped"),
    "lr_schedule",
)


@dataclass(frozen=True)
class Origin:
    """What a run goes on from.

    Attributes:
        folder: A folder of checkpoints, of which the newest one that is whole is taken; or one checkpoint.
        is_one: Whether it is one checkpoint.
        in_place: Whether it is the run's own.
    """

    folder: Path
    is_one: bool
    in_place: bool


@dataclass(frozen=True)
class Resumption:
    """Where a run stood when it wrote a checkpoint, whose weights the model has by now.

    Attributes:
        folder: The checkpoint.
        in_place: Whether it is the run's own, which goes on in its directory.
        state: Plain data: counters, schedules, the audit's state.
        memory: What has tensors in it: moments, random numbers.
        history: The run's history, with what changes now.
    """

    folder: Path
    in_place: bool
    state: Mapping[str, Any]
    memory: Mapping[str, Any]
    history: History

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def change(self) -> PhaseChange | None:
        """The end of the phase in which it stood, if it had come."""
        change = self.state["change"]
        return change and PhaseChange(**change)

    @property
    def lr_schedule(self) -> LrScheduleState | None:
        course = self.state["lr_schedule"]
        return course and LrScheduleState(step=course["step"], scale=course["scale"], best=course["best"])


def find_origin(config: RunConfig) -> Origin | None:
    """What a run is to go on from; None if it begins.

    Raises:
        ConfigError: There is nothing to go on from where `resume` says; or the audit ended the run, of which going on
            from before would leave no trace, and `resume_override` is not given.
    """
    if config.resume is None:
        return None
    in_place = goes_on_in_place(config)
    if in_place and not config.resume_override and (found := _what_ended_it(config)):
        raise config.mistake(
            ("resume",),
            f"{found}; mend what did it and begin another run; resume_override=true goes on from before",
        )
    if config.resume == "auto":
        folder = config.run_dir / "checkpoints"
        return Origin(folder, is_one=False, in_place=True) if in_place and newest_first(folder) else None
    path = Path(config.resume)
    if newest_first(path / "checkpoints"):
        return Origin(path / "checkpoints", is_one=False, in_place=in_place)
    try:
        read_state(path)
    except CheckpointError as error:
        raise config.mistake(("resume",), str(error)) from error
    return Origin(path, is_one=True, in_place=in_place)


def settled(config: RunConfig, origin: Origin) -> RunConfig:
    """The configuration with which a run goes on: what was found out at its begin is what it was.

    Raises:
        ConfigError: It is another one than the run began with, and `resume_override` is not given or cannot help.
    """
    saved = _newest_state(config, origin)[1]["config"]
    found = differences_from(saved, config)
    fixed = [each for each in found if each.kind == "fixed"]
    if fixed:
        # From a checkpoint of another run, this one has a name of its own already.
        advice = "begin a new one, with another name" if origin.in_place else "without resume, a run begins with it"
        raise config.mistake(("resume",), f"{_listed(fixed)}; a run cannot go on with another value; {advice}")
    in_vain = [each for each in found if each.kind == "at-begin"]
    if in_vain:
        raise config.mistake(("resume",), f"{_listed(in_vain)}; it is read only where a run begins: leave it as it was")
    found = [each for each in found if each.kind == "weighty"]
    if found and not config.resume_override:
        raise config.mistake(
            ("resume",),
            f"{_listed(found)}; the configuration is not the one that the run began with;"
            " resume_override=true goes on with the new one",
        )
    return config.with_changes(**{key: saved[key] for key in CHOSEN if getattr(config, key) == "auto"})


def what_is_overridden(config: RunConfig, origin: Origin | None) -> list[str]:
    """What a run goes on in spite of, since `resume_override` is given, in words."""
    if not config.resume_override:
        return []
    ended = _what_ended_it(config) if goes_on_in_place(config) else None
    lines = [f"{ended}; what was saved before that is taken up"] if ended else []
    if origin is not None:
        saved = _newest_state(config, origin)[1]["config"]
        found = [each for each in differences_from(saved, config) if each.kind != "free"]
        lines += [f"goes on with another {_listed(found)}"] if found else []
    return lines


def _what_ended_it(config: RunConfig) -> str | None:
    """The violation with which the audit ended the run, and the file that says so."""
    for file in sorted(config.run_dir.glob("audit*.json")):
        try:
            report = read_audit(file)
        except RunFileError:
            # It says nothing; checkpoints have the audit's state of their own.
            continue
        is_end = report.get("ended_the_run", False)
        found = [each for phase in report["phases"] for each in phase["violations"]] if is_end else []
        if found:
            first = found[0]
            what = f"{first['name']}: {first['kind']}, step {first['step']} of phase {first['phase']!r}"
            return f"the audit ended this run: {what}, see {file}"
    return None


def _newest_state(config: RunConfig, origin: Origin) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that says where it stands, and what it says, its configuration as of today."""
    folders = [origin.folder] if origin.is_one else newest_first(origin.folder)
    refused = []
    for folder in folders:
        try:
            state = read_state(folder)
            return folder, {**state, "config": as_of_today(state["config"])}
        except (CheckpointError, KeyError) as error:
            refused.append(str(error) if isinstance(error, CheckpointError) else f"{folder} is of another version")
        except ValidationError as error:
            refused.append(f"{folder} was written with a configuration of another version: {error.error_count()} keys")
    raise config.mistake(("resume",), "; ".join(refused))


def _listed(found: list[Any]) -> str:
    shown = "; ".join(str(each) for each in found[:5])
    return shown + (f"; and {len(found) - 5} more" if len(found) > 5 else "")


def resume_from(origin: Origin, parts: Parts, world: World = ALONE) -> Resumption:
    """Loads the weights of a checkpoint, and finds out where its run stood.

    Raises:
        ConfigError: It is no checkpoint, or one of a run with another model or other phases, or one that is over; or no
            checkpoint is whole.
    """
    try:
        newest, there = _newest_state(parts.config, origin)
        with suppress(KeyError, TypeError):
            # What is asked for in vain is said as such, before weights are found not to fit.
            history_from(there, parts.config, parts.phases, newest, origin.in_place)
        folder, state, memory = _load(origin, parts, world)
        try:
            _check(folder, state, parts, origin.in_place)
            _check_balances(folder, memory, parts)
            history = history_from(state, parts.config, parts.phases, folder, origin.in_place)
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{folder} is damaged, or of another version: {error!r}") from error
    except CheckpointError as error:
        raise parts.config.mistake(("resume",), str(error)) from error
    return Resumption(folder, origin.in_place, state, memory, history)


def _load(origin: Origin, parts: Parts, world: World) -> tuple[Path, Mapping[str, Any], Mapping[str, Any]]:
    """The checkpoint, and what is in it; all processes take the one that the first one finds."""
    if origin.is_one:
        return origin.folder, *load_checkpoint(origin.folder, parts.root)
    if not world.leads:
        folder = Path(world.same_from_rank_0(None))
        return folder, *load_checkpoint(folder, parts.root)
    folder, state, memory, refused = load_newest(origin.folder, parts.root)
    for reason in refused:
        logger.warning(f"resume: {reason}; an older checkpoint is taken")
    world.same_from_rank_0(str(folder))
    return folder, state, memory


def _check(folder: Path, state: Mapping[str, Any], parts: Parts, in_place: bool) -> None:
    names = [phase.name for phase in parts.phases]
    if state["phases"] != names:
        raise CheckpointError(
            f"{folder} is of a run with the phases {', '.join(state['phases'])}; this one has {', '.join(names)}"
        )
    scheduler = TaskScheduler([phase.length for phase in parts.phases])
    try:
        scheduler.load_state_dict(state["scheduler"])
        BestWeights(phase.restore for phase in parts.phases).load_state_dict(state["best"])
    except ValueError as error:
        done = state["scheduler"]
        phase = names[min(done["index"], len(names) - 1)]
        raise CheckpointError(
            f"{folder} stands in phase {phase!r} after {done['epochs']} epochs and {done['steps']} steps;"
            " this configuration has no such place"
        ) from error
    if scheduler.index is None and not in_place:
        raise CheckpointError(f"{folder} is the end of its run: no phase is left; one inside a phase can be taken up")
    active = parts.phases[state["phase_index"]]
    freeze = [text_of(pattern) for pattern in active.freeze.patterns]
    if [state["frozen"], state["freeze"]] != [frozen_names(active), freeze]:
        raise CheckpointError(f"{folder} stands inside a phase {active.name!r} that froze other parameters than here")
    within = state["within_epoch"]
    if within and [within["batch_size"], within["accumulate"]] != [active.batch_size, active.optim.accumulate]:
        raise CheckpointError(
            f"{folder} stands inside an epoch with batches of {within['batch_size']} and {within['accumulate']} batches"
            f" a step; with {active.batch_size} and {active.optim.accumulate} the rest of that epoch would be another"
        )
    missing = [key for key in _NEEDED if key not in state]
    if missing:
        raise KeyError(missing[0])


def _check_balances(folder: Path, memory: Mapping[str, Any], parts: Parts) -> None:
    """Raises `CheckpointError` if the balancing methods are others than those that remember something there."""
    balances: Any = parts.root.get_submodule("balance").children()
    try:
        for balance, there in zip(balances, memory["balance"], strict=True):
            check_same_method(balance.state(), there)
    except ValueError as error:
        raise CheckpointError(f"{folder} was balanced otherwise: {error}") from error


def frozen_names(phase: Phase) -> list[str]:
    """The parameters and buffers that a phase freezes."""
    plan = phase.freeze.plan
    return [*plan.names.frozen, *plan.names.frozen_buffers]
