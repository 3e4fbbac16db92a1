"""From a configuration to its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mtl.config import (
    ClassificationConfig,
    ConfigError,
    DepthConfig,
    DistillConfig,
    EdgesConfig,
    KeypointsConfig,
    MultiLabelConfig,
    NormalsConfig,
    OrdinalConfig,
    OwnTaskConfig,
    RegressionConfig,
    RunConfig,
    SaliencyConfig,
    SegmentationConfig,
    SettingError,
    mistake_of,
)
from mtl.config.own import is_own, make_own, own_class
from mtl.tasks.base import Task
from mtl.tasks.binary_maps import Edges, Saliency
from mtl.tasks.class_losses import ClassLoss
from mtl.tasks.classes import ClassTask
from mtl.tasks.classification import Classification
from mtl.tasks.depth import Depth
from mtl.tasks.distill import Distill
from mtl.tasks.entries import EntryTask
from mtl.tasks.keypoints import Keypoints
from mtl.tasks.loss import Loss
from mtl.tasks.multilabel import MultiLabel
from mtl.tasks.normals import Normals
from mtl.tasks.ordinal import Ordinal
from mtl.tasks.parts import add_metrics, build_loss, check_own_metrics, try_out
from mtl.tasks.protocols import add_protocol
from mtl.tasks.regression import Regression
from mtl.tasks.segmentation import Segmentation


def build_tasks(
    config: RunConfig,
    class_names: Mapping[str, Sequence[str]] | None = None,
    widths: Mapping[str, int] | None = None,
) -> dict[str, Task]:
    """The tasks of a configuration, by name, in its order.

    Args:
        config: The run.
        class_names: Of each task whose classes the data set names, these names in order.
        widths: Of each task with a teacher, the numbers in the teacher's embedding.

    Raises:
        ConfigError: A class of the user's own cannot be had, or does not take its options; the number of classes is not
            known; a loss or a metric does not fit; for all tasks at once. Or the protocol measures none of them.
    """
    tasks, mistakes = {}, list[str]()
    for name, own in config.tasks.items():
        try:
            tasks[name] = _build(config, name, (class_names or {}).get(name, ()), widths or {})
            add_metrics(tasks[name], own.metrics, f"tasks.{name}.metrics")
        except SettingError as error:
            mistakes += mistake_of(config, error).mistakes
    if mistakes:
        raise ConfigError(mistakes)
    try:
        add_protocol(tasks, config.evaluate.protocol)
    except SettingError as error:
        raise mistake_of(config, error) from error
    return tasks


def _build(config: RunConfig, name: str, class_names: Sequence[str], widths: Mapping[str, int]) -> Task:
    own, path = config.tasks[name], f"tasks.{name}"
    if isinstance(own, OwnTaskConfig):
        return _build_own(path, own)
    task = _build_type(config, name, class_names, widths)
    if own.loss is not None and is_own(own.loss.name):
        try_out(task, own.loss, f"{path}.loss")
    return task


def _build_type(config: RunConfig, name: str, names: Sequence[str], widths: Mapping[str, int]) -> EntryTask:
    own, path = config.tasks[name], f"tasks.{name}"
    assert not isinstance(own, OwnTaskConfig)

    def loss_of(kind: type[EntryTask]) -> Loss | None:
        return build_loss(own.loss, kind.losses, f"{path}.loss")

    num = 0
    if isinstance(own, SegmentationConfig | ClassificationConfig | OrdinalConfig | MultiLabelConfig):
        num = _num_classes(own.num_classes, names, path)
        # The data set may have fewer than the model.
        names = [*names, *map(str, range(len(names), num))] if names else names

    match own:
        case SegmentationConfig():
            loss = loss_of(Segmentation)
            _check_balance_power(own, loss, path)
            task: EntryTask = Segmentation(num, own.ignore_index, own.balance_power, loss, names)
        case ClassificationConfig():
            task = Classification(num, own.ignore_index, loss_of(Classification), names)
        case DepthConfig():
            losses = Depth.losses_of_logs if own.space == "log" else Depth.losses
            loss = build_loss(own.loss, losses, f"{path}.loss")
            task = Depth(own.space, loss, own.min, own.max, own.num_bins or 64)
        case NormalsConfig():
            task = Normals(loss_of(Normals))
        case OrdinalConfig():
            task = Ordinal(num, own.ignore_index, loss_of(Ordinal), names)
        case MultiLabelConfig():
            task = MultiLabel(num, loss_of(MultiLabel), names)
        case RegressionConfig():
            task = Regression(own.num_outputs, own.scale, loss_of(Regression))
        case EdgesConfig():
            task = Edges(own.ignore_index, loss_of(Edges))
        case SaliencyConfig():
            task = Saliency(own.ignore_index, loss_of(Saliency))
        case KeypointsConfig():
            task = Keypoints(own.num_points, config.data.size, loss_of(Keypoints))
        case DistillConfig():
            task = Distill(widths[name], loss_of(Distill))
    if isinstance(task, ClassTask):
        _check_class_weights(task, path)
    return task


def _num_classes(written: int | None, names: Sequence[str], path: str) -> int:
    """The number of classes, as it is written or as the data set names them."""
    key = f"{path}.num_classes"
    if written is None and not names:
        raise SettingError(key, "expected a number, since the data set does not name the classes of this label")
    if written is not None and names and written < len(names):
        some = ", ".join(names[:3])
        message = f"expected at least the {len(names)} classes of this label ({some}, ...), got {written}"
        raise SettingError(key, message)
    return written or len(names)


def _check_balance_power(own: SegmentationConfig, loss: Loss | None, path: str) -> None:
    if loss is None or "balance_power" not in own.model_fields_set:
        return
    if loss.per == "image" or (isinstance(loss, ClassLoss) and loss.class_weights is not None):
        why = "is one number for each image" if loss.per == "image" else "has class_weights of its own"
        raise SettingError(f"{path}.balance_power", f"this loss does not read it, since it {why}; leave it out")


def _check_class_weights(task: ClassTask, path: str) -> None:
    given = task.class_weight
    if given is not None and len(given) != task.num_outputs:
        raise SettingError(
            f"{path}.loss.options.class_weights",
            f"expected {task.num_outputs} weights, one for each class, got {len(given)}",
        )


def _build_own(path: str, own: OwnTaskConfig) -> Task:
    kind = own_class(own.type, f"{path}.type", Task)
    task: Task = make_own(kind, own.options, f"{path}.options", own.type)
    for attribute in ("output", "goal", "num_outputs"):
        if not hasattr(task, attribute):
            raise SettingError(f"{path}.type", f"{own.type} has no {attribute!r}, which every task has")
    check_own_metrics(task, own.type, f"{path}.type")
    return task
