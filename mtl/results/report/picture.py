"""A run as one picture, for `mtl report --picture`: validation over the phases, above example predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mtl.results.pictures import add_legend, picture_of
from mtl.results.report.predictions import NUM_EXAMPLES, predict
from mtl.tasks import Task
from mtl.training.setup import RunSetup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Letters above one of the examples.
_LINE_LENGTH = 32


def draw_run(setup: RunSetup, epochs: list[dict[str, Any]]) -> Figure:
    """Draws each task's main metric over the phases, above example predictions.

    Args:
        setup: The run's setup, the model with the weights to show.
        epochs: Rows of `metrics.jsonl` with validation metrics.
    """
    from matplotlib.figure import Figure

    dense = {name: task for name, task in setup.labelled.items() if task.output == "dense"}
    figure = Figure(figsize=(11, 3 + 1.6 * (1 + 2 * len(dense))), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[3, 1.6 * (1 + 2 * len(dense))])[:, 0]
    for axes, (name, task) in zip(
        above.subplots(1, len(setup.labelled), squeeze=False)[0], setup.labelled.items(), strict=True
    ):
        _draw_metric(axes, name, task, epochs)
    batch, outputs = predict(setup)
    grid = below.subplots(1 + 2 * len(dense), NUM_EXAMPLES, squeeze=False)
    pictures = [("image", picture_of(batch.images))]
    for name, task in dense.items():
        pictures += [(f"{name}\ntruth", task.draw(batch.labels[name], is_label=True))]
        pictures += [(f"{name}\npredicted", task.draw(outputs[name], is_label=False))]
    for axes_row, (title, images) in zip(grid, pictures, strict=True):
        axes_row[0].set_ylabel(title, fontsize=8)
        for axes, image in zip(axes_row, images.numpy(), strict=False):
            axes.imshow(image, cmap="gray" if image.shape[-1] == 1 else None)
    texts = {
        name: (task.caption(outputs[name], is_label=False), task.caption(batch.labels[name], is_label=True))
        for name, task in setup.labelled.items()
        if name not in dense
    }
    for i, axes in enumerate(grid[0][: len(batch)]):
        lines = [_said(name, predicted[i], truth[i]) for name, (predicted, truth) in texts.items()]
        axes.set_title("\n".join(lines), fontsize=8)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    add_legend(below, dense, figure.get_figwidth())
    return figure


def _said(name: str, predicted: str, truth: str) -> str:
    """A prediction in words, in two lines if one would reach into the next picture's."""
    first, second = f"{name}: {predicted}", f"(truth {truth})"
    return f"{first}{' ' if len(first) + len(second) < _LINE_LENGTH else chr(10)}{second}"


def _draw_metric(axes: Axes, name: str, task: Task, epochs: list[dict[str, Any]]) -> None:
    key = f"val/{name}/{task.goal.metric}"
    steps = [row["step"] for row in epochs]
    axes.plot(steps, [row[key] for row in epochs], marker="o", color="tab:blue")
    phases = list(dict.fromkeys(row["phase"] for row in epochs))
    begin = 0
    for number, phase in enumerate(phases):
        end = max(row["step"] for row in epochs if row["phase"] == phase)
        axes.axvspan(begin, end, color="tab:orange" if number % 2 else "tab:gray", alpha=0.12, label=phase)
        begin = end
    better = "up" if task.goal.direction == "higher" else "down"
    axes.set_title(f"{name}: {task.goal.metric} ({better} is better)")
    axes.title.set_fontsize(9)
    axes.set_xlabel("step")
    # More names than these would hide the curve; they are in the table above. A run that was killed early has none.
    if 0 < len(phases) <= 6:
        # Without a place of its own, matplotlib warns where the machine is slow.
        axes.legend(fontsize=7, loc="best")
