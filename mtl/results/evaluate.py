"""The metrics of a trained model, on the data of its run or on other data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mtl.config import ConfigError, DistillConfig, RunConfig, SettingError, mistake_of
from mtl.config.file_data import SplitName
from mtl.data import Loading, Source, Split, SplitWorkers, TaughtSplit, Teaching
from mtl.data.renumbered import RenumberedSplit
from mtl.model.teachers import build_teachers, load_teachers
from mtl.phases.data_source import open_source
from mtl.results.trained import TrainedModel
from mtl.runtime.text import count, hint
from mtl.tasks import Task, labels_of
from mtl.training.validation import Scores, score, validate, validate_constant


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        split: On which split.
        num_images: Of how many images.
        metrics: By task and name.
        trivial: Those of the trivial predictor, whose constants come from the training data of the run; without tasks
            of which that had no labels.
        score: `val/score` of the tasks in `trivial` on these images.
    """

    split: SplitName
    num_images: int
    metrics: Scores
    trivial: Scores
    score: float


def evaluate(
    model: TrainedModel, split: SplitName = "val", tasks: Collection[str] | None = None, quiet: bool = True
) -> Evaluation:
    """Measures a trained model, as validation in training does: the same bits on the same data and device.

    Args:
        model: Its configuration names the data, which may be another one than that it was trained on.
        split: `val` or `test`.
        tasks: The tasks that are measured; all if not given, but those that the data has no labels of (`unlabelled`).
        quiet: Whether to show no progress bar while data is read.

    Raises:
        ConfigError: The data cannot be had, has no such split or lacks a task's label, or names classes that the model
            does not know.
        DataError: Something of it cannot be read, or a label does not fit its task.
        SettingError: There is no such task.
    """
    labelled = [name for name, each in model.config.tasks.items() if not each.unlabelled]
    own = {name: model.tasks[name] for name in model.names_of(labelled if tasks is None else tasks)}
    config = model.config.with_changes(tasks={name: model.config.tasks[name] for name in own})
    images = _load(model, config, own, split, quiet)
    network = model.network
    if config.compile:
        network.recompile()
    metrics = validate(
        network,
        own,
        images,
        _batch_size(model),
        next(model.parameters()).device,
        model.autocast,
        lambda batch, names: network.encode(batch.images, names),
        loading=Loading(workers=SplitWorkers(config.data.num_workers)),
    )
    constants = {name: constant for name, constant in model.constants.items() if name in own}
    known = {name: own[name] for name in constants}
    trivial = validate_constant(known, constants, images, config.data.batch_size)
    return Evaluation(split, len(images), metrics, trivial, score(known, metrics, trivial))


def _batch_size(model: TrainedModel) -> int:
    """Images in a batch of the phase that the weights come from: another size may round otherwise."""
    own = [phase.config for phase in model.config.written_phases if phase.config.name == model.origin.phase]
    return (own[0].batch_size if own else None) or model.config.data.batch_size


def _load(model: TrainedModel, config: RunConfig, tasks: Mapping[str, Task], which: SplitName, quiet: bool) -> Split:
    source = open_source(config)
    if source.channels != model.channels and (source.channels, model.channels) != (1, 3):
        expected = f"expected images of {count(model.channels, 'channel')}, as the model takes them"
        raise config.mistake(("data", "name"), f"{expected}, got {source.channels}")
    label_of = labels_of(config)
    try:
        split = source.load_split(which, {name: tasks[name] for name in label_of}, label_of, quiet)
    except SettingError as error:
        raise mistake_of(config, error) from error
    split = _as_the_run_names_them(model, source, split, label_of)
    has_teachers = any(isinstance(each, DistillConfig) for each in config.tasks.values())
    return _taught(model, config, source, split) if has_teachers else split


def _as_the_run_names_them(model: TrainedModel, source: Source, split: Split, label_of: Mapping[str, str]) -> Split:
    """The split with the run's numbers of classes, where the data numbers classes of the same names otherwise."""
    mistakes, numbers = list[str](), dict[str, list[int]]()
    for name, there in source.class_names(label_of).items():
        known = model.class_names[name]
        unknown = [each for each in there if known and each not in known]
        if unknown:
            near = hint(unknown[0], known)
            message = f"the data has a class {unknown[0]!r}, which the model has not learned{near}"
            mistakes += model.config.mistake(("tasks", name), message).mistakes
        elif there and list(there) != known[: len(there)]:
            numbers[name] = [known.index(each) for each in there]
    if mistakes:
        raise ConfigError(mistakes)
    return RenumberedSplit(split, numbers) if numbers else split


def _taught(model: TrainedModel, config: RunConfig, source: Source, split: Split) -> Split:
    """The split with the embeddings of teachers, which the run's checkpoint holds."""
    device = next(model.parameters()).device
    try:
        teachers = build_teachers(config, source.channels, with_weights=False)
    except SettingError as error:
        raise mistake_of(config, error) from error
    load_teachers(teachers, model.origin.run_dir / "checkpoints" / model.origin.checkpoint)
    given = {name: Teaching(own.to(device), own.width, own.digest()) for name, own in teachers.items()}
    loading = Loading(device=device, workers=SplitWorkers(config.data.num_workers))
    return TaughtSplit(split, given, config.data.batch_size, loading)
