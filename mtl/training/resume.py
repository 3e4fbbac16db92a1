"""Where a run resumes from, whether its configuration allows it, and the checkpoint that it loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mtl.checkpoint.files import CheckpointError, DamagedCheckpoint, read_state
from mtl.checkpoint.load import load_checkpoint, load_newest, newest_first
from mtl.checkpoint.run_files import RunFileError, read_audit
from mtl.config import RunConfig
from mtl.config.changes import CHOSEN
from mtl.distributed.world import ALONE, World
from mtl.optim.balance.state import check_same_method
from mtl.optim.lr_schedule import LrScheduleState
from mtl.patterns import text_of
from mtl.phases.resolve import Phase
from mtl.phases.scheduler import PhaseChange, TaskScheduler
from mtl.runtime.console import logger
from mtl.training.history import History, as_of_today, differences_from, history_from
from mtl.training.run_dir import resumes_in_place
from mtl.training.setup import RunSetup

_NEEDED = (
    *("step", "epoch", "change", "audit", "scores", "metrics_bytes", "train_s", "wandb_id", "features", "num_skipped"),
    *("lr_schedule", "best"),
)


@dataclass(frozen=True)
class ResumeSource:
    """Where a run resumes from.

    Attributes:
        folder: A folder of checkpoints, of which the newest one that is whole is loaded; or one checkpoint.
        is_one: Whether it is one checkpoint.
        in_place: Whether it is the run's own.
        newest: The newest checkpoint there whose state can be read.
        state: That state, with its configuration as of today.
    """

    folder: Path
    is_one: bool
    in_place: bool
    newest: Path
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Resumption:
    """A checkpoint whose weights are in the model.

    Attributes:
        folder: The checkpoint.
        in_place: Whether it is the run's own, which continues in its directory.
        state: Plain data: counters, schedules, the audit's state.
        memory: Everything with tensors in it: optimizer state, random numbers.
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
        """The end of the phase that it is in, if that had come."""
        change = self.state["change"]
        return change and PhaseChange(**change)

    @property
    def lr_schedule(self) -> LrScheduleState | None:
        saved = self.state["lr_schedule"]
        return saved and LrScheduleState(step=saved["step"], scale=saved["scale"], best=saved["best"])


def resumed_config(config: RunConfig) -> tuple[RunConfig, ResumeSource | None]:
    """Where a run resumes from, and the configuration that it resumes with: what `auto` chose at its start stays.

    Returns:
        The configuration as it is, and None, if the run starts from scratch.

    Raises:
        ConfigError: There is no checkpoint where `resume` says; the audit ended the run, or the configuration is not
            the one that the run began with, and `resume_override` is not given or cannot help.
    """
    source = _find(config)
    if source is None:
        return config, None
    saved = source.state["config"]
    found = differences_from(saved, config)
    fixed = [each for each in found if each.kind == "fixed"]
    if fixed:
        # From a checkpoint of another run, this one has a name of its own already.
        advice = "begin a new one, with another name" if source.in_place else "without resume, a run begins with it"
        raise config.mistake(("resume",), f"{_listed(fixed)}; a run cannot resume with another value; {advice}")
    in_vain = [each for each in found if each.kind == "at-begin"]
    if in_vain:
        raise config.mistake(("resume",), f"{_listed(in_vain)}; it is read only where a run begins: leave it as it was")
    found = [each for each in found if each.kind == "weighty"]
    if found and not config.resume_override:
        raise config.mistake(
            ("resume",),
            f"{_listed(found)}; the configuration is not the one that the run began with;"
            " resume_override=true resumes with the new one",
        )
    return config.with_changes(**{key: saved[key] for key in CHOSEN if getattr(config, key) == "auto"}), source


def _find(config: RunConfig) -> ResumeSource | None:
    """Where a run resumes from; None if it starts from scratch.

    Raises:
        ConfigError: There is nothing to resume from where `resume` says; or the audit ended the run, of which resuming
            from before would leave no trace, and `resume_override` is not given.
    """
    if config.resume is None:
        return None
    in_place = resumes_in_place(config)
    if in_place and not config.resume_override and (found := _what_ended_it(config)):
        raise config.mistake(
            ("resume",),
            f"{found}; mend what did it and begin another run; resume_override=true resumes from before",
        )
    if config.resume == "auto":
        folder = config.run_dir / "checkpoints"
        if not in_place or not (folders := newest_first(folder)):
            return None
        return ResumeSource(folder, False, True, *_newest_state(config, folders))
    path = Path(config.resume)
    if folders := newest_first(path / "checkpoints"):
        return ResumeSource(path / "checkpoints", False, in_place, *_newest_state(config, folders))
    return ResumeSource(path, True, in_place, *_newest_state(config, [path]))


def what_is_overridden(config: RunConfig, source: ResumeSource | None) -> list[str]:
    """The differences that a run ignores since `resume_override` is given, in words."""
    if not config.resume_override:
        return []
    ended = _what_ended_it(config) if resumes_in_place(config) else None
    lines = [f"{ended}; it resumes from what was saved before that"] if ended else []
    if source is not None:
        found = [each for each in differences_from(source.state["config"], config) if each.kind != "free"]
        lines += [f"with another {_listed(found)}"] if found else []
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


def _newest_state(config: RunConfig, folders: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """The first of some checkpoints whose state can be read, and that state, its configuration as of today."""
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


def resume_from(source: ResumeSource, setup: RunSetup, world: World = ALONE) -> Resumption:
    """Loads the weights of a checkpoint into the model, and reads the state of its run.

    Raises:
        ConfigError: It is no checkpoint, or one of a run with another model or other phases, or one that is over; or no
            checkpoint is whole.
    """
    config, phases, in_place = setup.config, setup.phases, source.in_place
    try:
        with suppress(KeyError, TypeError):
            # What is asked for in vain is said as such, before weights are found not to fit.
            history_from(source.state, config, phases, source.newest, in_place)
        digests = {task: teacher.digest() for task, teacher in setup.teachers.items()}
        folder, state, memory = _load(source, setup, world)
        _check_teachers(folder, digests, setup)
        try:
            _check(folder, state, setup, in_place)
            _check_balances(folder, memory, setup)
            history = history_from(state, config, phases, folder, in_place)
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{folder} is damaged, or of another version: {error!r}") from error
    except CheckpointError as error:
        raise config.mistake(("resume",), str(error)) from error
    return Resumption(folder, in_place, state, memory, history)


def _load(source: ResumeSource, setup: RunSetup, world: World) -> tuple[Path, Mapping[str, Any], Mapping[str, Any]]:
    """The checkpoint and its content; all ranks load the one that rank 0 finds."""
    if source.is_one:
        return source.folder, *load_checkpoint(source.folder, setup.root)
    if not world.is_main:
        folder = Path(world.broadcast(None))
        return folder, *load_checkpoint(folder, setup.root)
    folder, state, memory, refused = load_newest(source.folder, setup.root)
    for reason in refused:
        logger.warning(f"resume: {reason}; an older checkpoint is loaded")
    world.broadcast(str(folder))
    return folder, state, memory


def _check(folder: Path, state: Mapping[str, Any], setup: RunSetup, in_place: bool) -> None:
    names = [phase.name for phase in setup.phases]
    if state["phases"] != names:
        raise CheckpointError(
            f"{folder} is of a run with the phases {', '.join(state['phases'])}; this one has {', '.join(names)}"
        )
    scheduler = TaskScheduler([phase.length for phase in setup.phases])
    try:
        scheduler.load_state_dict(state["scheduler"])
    except ValueError as error:
        done = state["scheduler"]
        phase = names[min(done["index"], len(names) - 1)]
        raise CheckpointError(
            f"{folder} is in phase {phase!r} after {done['epochs']} epochs and {done['steps']} steps;"
            " this configuration has no such place"
        ) from error
    if scheduler.index is None and not in_place:
        raise CheckpointError(
            f"{folder} is the end of its run: no phase is left; a checkpoint inside a phase can be resumed"
        )
    active = setup.phases[state["phase_index"]]
    freeze = [text_of(pattern) for pattern in active.freeze.patterns]
    if [state["frozen"], state["freeze"]] != [frozen_names(active), freeze]:
        raise CheckpointError(
            f"{folder} is inside a phase {active.name!r} that froze other parameters than it does here"
        )
    within = state["within_epoch"]
    if within and [within["batch_size"], within["accumulate"]] != [active.batch_size, active.optim.accumulate]:
        raise CheckpointError(
            f"{folder} is inside an epoch with batches of {within['batch_size']} and {within['accumulate']} batches"
            f" a step; with {active.batch_size} and {active.optim.accumulate} the rest of that epoch would be another"
        )
    missing = [key for key in _NEEDED if key not in state]
    if missing:
        raise KeyError(missing[0])


def _check_teachers(folder: Path, before: Mapping[str, str], setup: RunSetup) -> None:
    """Raises `CheckpointError` if loading a checkpoint has changed teachers, which had these digests before."""
    others = [task for task, teacher in setup.teachers.items() if teacher.digest() != before[task]]
    if others:
        what = f"{folder} was trained with another teacher of {', '.join(others)}"
        raise CheckpointError(f"{what}: its weights have changed since; give it those, or begin another run")


def _check_balances(folder: Path, memory: Mapping[str, Any], setup: RunSetup) -> None:
    """Raises `CheckpointError` if the balancing methods are others than those whose state is there."""
    balances: Any = setup.root.get_submodule("balance").children()
    try:
        for balance, there in zip(balances, memory["balance"], strict=True):
            check_same_method(balance.state(), there)
    except ValueError as error:
        raise CheckpointError(f"{folder} was balanced otherwise: {error}") from error


def frozen_names(phase: Phase) -> list[str]:
    """The parameters and buffers that a phase freezes."""
    plan = phase.freeze.plan
    return [*plan.names.frozen, *plan.names.frozen_buffers]
