"""From a trained run and a few lines about new tasks to a configuration that adds them and trains nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl.checkpoint.files import CheckpointError
from mtl.checkpoint.run_files import CONFIG
from mtl.checkpoint.trained_run import TrainedRun, open_trained_run
from mtl.config import ConfigError, DistillConfig, RunConfig, config_of
from mtl.config.yaml_source import (
    COMMAND_LINE,
    ConfigSource,
    KeyPath,
    apply_override,
    dotted,
    merge_sources,
    read_source,
)
from mtl.phases.setup import build_meta_setup
from mtl.runtime.plugin import search_in
from mtl.runtime.text import condense, shorten
from mtl.training.data_record import search_as_the_run_did

# The run's settings that carry over: the model, the data and the machine. How it trains is for the new tasks to say.
_KEPT = ("trunk", "tasks", "data", "evaluate", "seed", "device", "memory_format", "precision", "tracking")
# Of the data, where other data takes its place.
_KEPT_OF_DATA = ("image_size", "batch_size")


def open_finished_run(folder: Path) -> TrainedRun:
    """The best checkpoint of a run that is over, or the last one if no validation gave a score.

    Raises:
        CheckpointError: There is none, it is damaged or of another version, or the run is not over.
    """
    last = open_trained_run(folder, "last")
    if not last.is_at_end:
        command = f"mtl train {folder / CONFIG} resume=auto"
        raise CheckpointError(
            f"{folder} is not finished: its last checkpoint, of step {last.step}, is of phase {last.state['phase']!r};"
            f" finish it first: {command}"
        )
    return open_trained_run(folder)


def config_with_tasks(
    run: TrainedRun, file: Path, overrides: Sequence[str], name: str | None, command: str
) -> RunConfig:
    """The configuration of a run that adds tasks to a trained model: all that the model has already is frozen.

    Args:
        run: The trained run.
        file: A YAML file with the new tasks; and their data, phases, and whatever else is not as in the run.
        overrides: Dotted `key=value` pairs.
        name: The name of the new run; if not given, what the file says, or that of the run and the new tasks.
        command: The command that trains it, for a shell.

    Raises:
        ConfigError: A file cannot be read or has a mistake; it adds no task, or one that the model has; or it sets or
            trains what the model has.
    """
    # Of the data, the command line changes what the file says; of the rest, what it comes to with the run's.
    of_data = [override for override in overrides if override.split("=")[0].split(".")[0] == "data"]
    before, added = read_source(run.folder / CONFIG), read_source(file, of_data)
    search_as_the_run_did(run.folder)
    search_in(file.parent)
    new = added.data.get("tasks")
    if not isinstance(new, dict) or not new:
        where = added.where(("tasks",))
        raise ConfigError([f"{where}: tasks: expected the tasks to add, such as {{object: {{type: classification}}}}"])
    is_other_data = "name" in _table(added.data.get("data"))
    old = list(run.config.tasks)
    if set(_table(before.data.get("tasks"))) != set(old):
        where = before.where(("tasks",))
        raise ConfigError([f"{where}: tasks: the run was trained with {', '.join(old)}; the file was edited since"])
    by = f"add-task {run.folder}"
    source = _part(before, _KEPT, _KEPT_OF_DATA if is_other_data else None)
    source.places[()] = added.where(())
    generated: dict[KeyPath, Any] = {
        ("name",): f"{run.folder.resolve().name}-{'-'.join(new)}",
        ("runs_dir",): str(run.folder.parent),
        ("phases",): [{"name": "-".join(new), "epochs": max(1, run_epochs(run))}],
    }
    for path, value in generated.items():
        source.data[str(path[0])], source.places[path] = value, by
    merge_sources(source, added)
    others = [override for override in overrides if override not in of_data]
    for override in [*others, *([] if name is None else [f"name={name}"])]:
        apply_override(source, override)
    asked = {path: place for path, place in source.places.items() if place == COMMAND_LINE}
    _refuse_what_is_there(dict(added.places) | asked, run)
    _freeze_what_is_there(source, old, by)
    if is_other_data:
        _without_labels(source, run, by)
    _take_weights(source, run, old, by)
    config = config_of(source, command)
    _check_that_nothing_old_trains(config, run, old)
    return config


def run_epochs(run: TrainedRun) -> int:
    """The epochs that a run has trained in all its phases."""
    return int(open_trained_run(run.folder, "last").state["epoch"])


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _part(source: ConfigSource, keys: Sequence[str], of_data: Sequence[str] | None) -> ConfigSource:
    """A configuration with some of its keys, and of `data` only some, with their places."""
    data = {key: value for key, value in source.data.items() if key in keys}
    places = {path: place for path, place in source.places.items() if path and path[0] in keys}
    if of_data is not None:
        data["data"] = {key: value for key, value in _table(data.get("data")).items() if key in of_data}
        places = {p: where for p, where in places.items() if p[0] != "data" or len(p) == 1 or p[1] in of_data}
    return ConfigSource(data, places)


def _refuse_what_is_there(own: Mapping[KeyPath, str], run: TrainedRun) -> None:
    """Raises `ConfigError` if something is set of the trunk, or of a task that the model has.

    Args:
        own: The places of all keys that are not the run's.
        run: The run.
    """
    mistakes, tasks, kept = list[str](), run.config.tasks, f"of {run.folder}, as it is; leave this out"
    for path, place in own.items():
        if len(path) > 1 and path[:-1] in own and path[:-1] != ("tasks",):
            continue  # It is said of the whole.
        if path[:1] == ("trunk",):
            mistakes.append(f"{place}: {dotted(path)}: the trunk is that {kept}")
        elif path[:1] == ("tasks",) and len(path) > 2 and path[1] in tasks:
            mistakes.append(f"{place}: {dotted(path)}: the task is that {kept}")
        elif path[:1] == ("tasks",) and len(path) == 2 and path[1] in tasks:
            there = f"{run.folder} has the task {path[1]!r} already, with {', '.join(tasks)}"
            mistakes.append(f"{place}: {dotted(path)}: {there}; give the new one another name, and label: {path[1]}")
    if mistakes:
        raise ConfigError(mistakes)


def _old_parts(tasks: Sequence[str]) -> list[str]:
    return ["trunk", *(f"heads.{task}" for task in tasks)]


def _freeze_what_is_there(source: ConfigSource, old: Sequence[str], by: str) -> None:
    """Freezes trunk and old heads in every phase that does not say itself what it freezes or trains."""
    for path, phase in _phases(source.data.get("phases"), ("phases",)):
        if not {"freeze", "train", "evaluate_only"} & phase.keys():
            phase["freeze"] = _old_parts(old)
            source.places[*path, "freeze"] = by


def _phases(entries: Any, path: KeyPath) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """The phases, those inside a repeat too, as far as they are tables."""
    for place, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict) and isinstance(entry.get("phases"), list):
            yield from _phases(entry["phases"], (*path, place, "phases"))
        elif isinstance(entry, dict):
            yield (*path, place), entry


def _without_labels(source: ConfigSource, run: TrainedRun, by: str) -> None:
    """Other data says nothing of the old tasks: their heads are kept, and nothing is measured of them."""
    for task, own in run.config.tasks.items():
        if isinstance(own, DistillConfig):
            continue
        table = {key: value for key, value in source.data["tasks"][task].items() if key not in ("label", "data")}
        names = list(run.class_names(task)) if hasattr(own, "class_names") else []
        table |= {"unlabelled": True} | ({"class_names": names} if names else {})
        source.data["tasks"][task] = table
        for key in ("unlabelled", "class_names"):
            source.places["tasks", task, key] = by


def _take_weights(source: ConfigSource, run: TrainedRun, old: Sequence[str], by: str) -> None:
    """`init_from` with trunk and old heads, in front of what else is taken."""
    others = source.data.get("init_from", [])
    others = others if isinstance(others, list) else [others]
    for path in [path for path in source.places if path[:1] == ("init_from",)]:
        place = source.places.pop(path)
        inner = path[1:] if len(path) > 1 and isinstance(path[1], int) else (0, *path[1:])
        source.places["init_from", int(inner[0]) + 1, *inner[1:]] = place
    which = run.which if run.which in ("best", "last") else int(run.which)
    first = {"run": str(run.folder), "which": which, "names": _old_parts(old)}
    source.data["init_from"], source.places["init_from",] = [first, *others], by
    trunk = {key: value for key, value in _table(source.data.get("trunk")).items() if key != "checkpointing"}
    source.data["trunk"] = {**trunk, "weights": "none"}


def _check_that_nothing_old_trains(config: RunConfig, run: TrainedRun, old: Sequence[str]) -> None:
    """Raises `ConfigError` at every phase that would train, or leave free, something that the model has already."""
    setup, mistakes = build_meta_setup(config), list[str]()
    starts = tuple(f"{part}." for part in _old_parts(old))
    for phase in setup.phases:
        names = phase.freeze.plan.names
        free = [name for name in (*names.trainable, *names.free_buffers) if name.startswith(starts)]
        if free:
            shown = shorten(condense(free, [*names.frozen, *names.frozen_buffers, *names.trainable]), 4)
            path = (*phase.written.path, phase.config.patterns_key)
            what = f"this would train {shown}, and {run.folder} has trained them: their outputs are not to change"
            mistakes += config.mistake(path, f"{what}; freeze {', '.join(_old_parts(old))}, or leave it out").mistakes
    if mistakes:
        raise ConfigError(list(dict.fromkeys(mistakes)))
