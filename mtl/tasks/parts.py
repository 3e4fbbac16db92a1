"""The losses and metrics that a configuration names: built-in ones, and classes of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from mtl.config import LossConfig, MetricConfig, SettingError
from mtl.config.own import checked_options, is_own, make_own, own_class
from mtl.runtime.plugin import where_it_failed
from mtl.runtime.text import hint
from mtl.tasks.base import Task
from mtl.tasks.entries import EntryTask
from mtl.tasks.loss import Loss
from mtl.tasks.metrics import Metrics

# Height and width of the images on which a loss of the user's own is tried.
_TRIED_ON = (8, 8)


def build_loss(config: LossConfig | None, losses: Mapping[str, type[Loss]], key: str) -> Loss | None:
    """Makes a loss; None for the task type's default.

    Args:
        config: Its name and options.
        losses: The losses of the task type by name.
        key: The key under which it is written, dotted.

    Raises:
        SettingError: There is no such loss, or it does not take the options.
    """
    if config is None:
        return None
    if is_own(config.name):
        kind = own_class(config.name, f"{key}.name", Loss)
    elif config.name in losses:
        kind = losses[config.name]
    else:
        there = f"there are: {', '.join(losses)}, or your own as package.module:Name"
        raise SettingError(f"{key}.name", f"no loss {config.name!r} here; {there}{hint(config.name, losses)}")
    if config.options and kind.Options is None and not is_own(config.name):
        raise SettingError(f"{key}.options", f"{config.name} takes no options")
    loss: Loss = make_own(kind, config.options, f"{key}.options", config.name)
    return loss


def try_out(task: EntryTask, config: LossConfig, key: str) -> None:
    """Calls a loss of the user's own on two images, with labels and without.

    Raises:
        SettingError: It fails, gives another shape than a number for each entry or image, or numbers or gradients that
            are not finite.
    """
    loss, label = task.entry_loss, task.blank(2, _TRIED_ON)
    weights = loss.weights(label, task.entry_weights(label))
    shape = (2, task.num_outputs, *_TRIED_ON) if task.output == "dense" else (2, task.num_outputs)
    output = torch.full(shape, 0.1, requires_grad=True)
    given = task.stand_in(label) if loss.per == "entry" else task.marked(label)
    try:
        values = loss(task.prediction(output), given)
        is_right = isinstance(values, torch.Tensor) and values.shape == weights.shape
        if is_right:
            torch.autograd.backward([values.sum()])
    except Exception as error:  # the user's code may raise anything
        raise SettingError(f"{key}.name", f"{config.name}: {where_it_failed(error)}") from error
    if not is_right:
        came = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        what = "entry" if loss.per == "entry" else "image"
        message = f"{config.name}: expected the loss of each {what}, of shape {tuple(weights.shape)}, got {came}"
        raise SettingError(f"{key}.name", message)
    if not values.isfinite().all() or output.grad is None or not output.grad.isfinite().all():
        what = "images without a label" if loss.per == "image" else "plain labels"
        raise SettingError(f"{key}.name", f"{config.name}: the loss or its gradient is not finite for {what}")


def add_metrics(task: Task, config: Sequence[MetricConfig], key: str) -> None:
    """Adds metrics to a task's own.

    Args:
        task: The task.
        config: Their names and options.
        key: The key under which they are written, dotted.

    Raises:
        SettingError: There is no such metric, it cannot be made, or has a name that another one has.
    """
    for number, one in enumerate(config):
        place = f"{key}.{number}"
        make = _own_metrics(one, place) if is_own(one.name) else _built_in(task, one, place)
        taken = task.every_metric().compute()
        names = _names(make, one.name, f"{place}.name")
        if twice := [name for name in names if name in taken]:
            raise SettingError(f"{place}.name", f"{one.name}: the task already has a metric {twice[0]!r}")
        task.added = [*task.added, make]


def check_own_metrics(task: Task, what: str, key: str) -> None:
    """Checks the metrics of a task type of the user's own.

    Args:
        task: The task.
        what: Its type, at the beginning of an error.
        key: The key under which that is written, dotted.

    Raises:
        SettingError: They cannot be made, or `higher`, `lower` or the goal names one that there is not.
    """
    names, goal = _names(task.metrics, what, key), task.goal
    if goal.metric not in names:
        message = f"its goal is {goal.metric!r}, but its metrics compute {', '.join(names)}"
        raise SettingError(key, f"{what}: {message}{hint(goal.metric, names)}")
    direction = task.metrics().direction(goal.metric)
    if direction not in (None, goal.direction):
        message = f"{direction} values of {goal.metric!r} are better by its metrics, {goal.direction} ones by its goal"
        raise SettingError(key, f"{what}: {message}, whose perfect value is {goal.perfect:g}")


def _names(make: Callable[[], Metrics], what: str, key: str) -> list[str]:
    """The names of metrics, once their directions are checked."""
    try:
        metrics = make()
        names = list(metrics.compute())
        higher, lower = list(metrics.higher), list(metrics.lower)
    except Exception as error:  # the user's code may raise anything
        raise SettingError(key, f"{what}: {where_it_failed(error)}") from error
    for name in (*higher, *lower):
        if name not in names:
            message = f"`higher` or `lower` names {name!r}, but `compute` gives {', '.join(names)}"
            raise SettingError(key, f"{what}: {message}{hint(name, names)}")
        if name in higher and name in lower:
            raise SettingError(key, f"{what}: {name!r} is in both `higher` and `lower`")
    return names


def _built_in(task: Task, config: MetricConfig, place: str) -> Callable[[], Metrics]:
    there = task.more_metrics
    if config.name not in there:
        offers = ", ".join([*there, "your own as package.module:Name"])
        raise SettingError(
            f"{place}.name", f"no metric {config.name!r} here; there are: {offers}{hint(config.name, there)}"
        )
    make, key = there[config.name], f"{place}.options"
    if isinstance(make, type) and getattr(make, "Options", None) is not None:
        return partial(make, **checked_options(make, config.options, key))
    if config.options:
        raise SettingError(key, f"{config.name} takes no options")
    return make


def _own_metrics(config: MetricConfig, place: str) -> Callable[[], Metrics]:
    kind: type[Metrics] = own_class(config.name, f"{place}.name", Metrics)
    make_own(kind, config.options, f"{place}.options", config.name)
    return partial(kind, **checked_options(kind, config.options, f"{place}.options"))
