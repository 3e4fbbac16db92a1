"""The interface of a task type: loss, metrics, and the constant prediction that a model has to beat."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from mtl.runtime.best import Direction
from mtl.tasks.maps import resized
from mtl.tasks.metrics import Metrics, Several

# What a label is, for whatever reads or changes labels with no regard to the task's loss:
#   class    "", the number of an image's class; -1, or the task's own number, is none
#   tags     "k", 1 or 0 for each attribute of an image; NaN is none
#   numbers  "" or "k", numbers of an image; NaN is none
#   mask     "h w", the number of each pixel's class
#   depth    "1 h w", a distance that a change of the image's scale changes; 0 or NaN is none
#   normals  "3 h w", unit vectors, which turn and flip with the image; zero or NaN is none
#   points   "k 3", column and row in pixels from the image's corner, and visibility; 0 is none
LabelKind = Literal["class", "tags", "numbers", "mask", "depth", "normals", "points"]
# Those that lie in the image's plane.
SPATIAL: frozenset[LabelKind] = frozenset({"mask", "depth", "normals", "points"})


@dataclass(frozen=True)
class Goal:
    """The one metric that stands for a task in `val/score`.

    Attributes:
        metric: Its name among the task's metrics.
        perfect: Its value for a perfect model.
    """

    metric: str
    perfect: float

    @property
    def direction(self) -> Direction:
        """Which values are better."""
        return "higher" if self.perfect > 0 else "lower"

    def skill(self, value: float, trivial: float) -> float:
        """Skill against the trivial predictor: 1 perfect, 0 no better, below 0 worse (Murphy 1988, eq. 4)."""
        return 0.0 if trivial == self.perfect else (value - trivial) / (self.perfect - trivial)


@dataclass(frozen=True)
class ColourScale:
    """The scale of a map's colours.

    Attributes:
        low: The number of the first colour.
        high: The number of the last one.
        unit: Of both.
        colours: Red, green and blue from 0 to 1, evenly spaced from `low` to `high`.
    """

    low: float
    high: float
    unit: str
    colours: Sequence[tuple[float, float, float]]


class Task(ABC):
    """One task: output, loss and metrics of its head.

    A class of the user's own receives its options as keyword arguments.

    Attributes:
        Options: The model of the options of a class of the user's own, a subclass of `mtl.config.Strict`; without one,
            they are not checked before they are passed.
        output: `dense` for an output per pixel, `vector` for one per image.
        num_outputs: Channels of the head's output.
        shares_weights: Whether all outputs, of one per image, have the same weight vector and biases of their own.
        goal: The metric that stands for the task in `val/score`.
        class_names: The names of its classes or attributes, for pictures and captions; empty if they have none.
        added: What makes the metrics that the configuration adds to the task's own.
    """

    Options: ClassVar[type[BaseModel] | None] = None
    output: ClassVar[Literal["dense", "vector"]]
    goal: ClassVar[Goal]
    num_outputs: int
    shares_weights: bool = False
    class_names: Sequence[str] = ()
    added: Sequence[Callable[[], Metrics]] = ()

    @property
    def label_kind(self) -> LabelKind:
        """The kind of its label: decides how files and tables are read, and how transforms change it."""
        return "mask" if self.output == "dense" else "numbers"

    @property
    def more_metrics(self) -> Mapping[str, Callable[..., Metrics]]:
        """The factories of metrics that a configuration may add to the task's own, by name."""
        return {}

    @abstractmethod
    def fit(self, label: Tensor) -> Tensor:
        """Reads the training labels once, before training.

        Args:
            label: All training labels, first axis n.

        Returns:
            The best constant output, "c", float32 (log class frequency, log mean depth, mean normal): the initial bias
            of the head, and the trivial predictor of the final table.
        """

    @abstractmethod
    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """Mean loss over the labelled entries of a batch, a float32 scalar; 0 with zero gradient if there are none."""

    def weight(self, label: Tensor) -> Tensor:
        """The denominator of `loss`'s mean, which is a batch's weight in a mean over batches; no host sync.

        Args:
            label: As for `loss`.

        Returns:
            A float64 scalar on the label's device; 0 if nothing is labelled. By default the number of images.
        """
        return torch.tensor(float(len(label)), dtype=torch.float64, device=label.device)

    def has_label(self, label: Tensor) -> Tensor:
        """Which samples count in the loss, "n", bool: those whose own `weight` is not 0.

        Args:
            label: As for `loss`, first axis n.
        """
        return torch.stack([self.weight(one[None]) > 0 for one in label])

    @abstractmethod
    def metrics(self) -> Metrics:
        """Fresh, empty statistics: the task's own."""

    def every_metric(self) -> Metrics:
        """Fresh, empty statistics: the task's own, and those that the configuration adds."""
        own = self.metrics()
        return Several([own, *(make() for make in self.added)]) if self.added else own

    def unlabelled(self, label: Tensor) -> Tensor:
        """The label of a sample that has none, in the form of another's.

        Raises:
            NotImplementedError: The task type has no such value.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `unlabelled`: it needs a label for every image")

    def bad_samples(self, label: Tensor) -> Tensor:
        """Which samples have a label that cannot be trained on.

        Args:
            label: Labels of some samples, first axis n, as they are stored.

        Returns:
            "n", bool; by default all False.
        """
        return torch.zeros(len(label), dtype=torch.bool)

    @property
    def why_bad(self) -> str:
        """The fault that `bad_samples` finds, in words: the first line of its docstring."""
        return (self.bad_samples.__doc__ or "").strip().lower().rstrip(".")

    def constant_output(self, constant: Tensor, num_images: int, size: tuple[int, int]) -> Tensor:
        """The output of the trivial predictor.

        Args:
            constant: From `fit`.
            num_images: How many images.
            size: Their height and width in pixels.

        Returns:
            The constant for every image, and every pixel of a dense task, in the shape of the head's output.
        """
        if self.output == "dense":
            return constant.view(1, -1, 1, 1).expand(num_images, -1, *size)
        return constant.view(1, -1).expand(num_images, -1)

    def predict(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """Predictions in the task's units; by default the outputs themselves.

        Args:
            output: As the head returns it.
            size: Height and width in pixels to which outputs of a dense task are brought.

        Returns:
            First axis b, with all that the task can say: probabilities where it chooses among classes of an image.
        """
        return resized(output.float(), size) if self.output == "dense" else output.float()

    def as_label(self, prediction: Tensor) -> Tensor:
        """Predictions in the form of labels, as far as `predict` says more than a label does; first axis b."""
        return prediction

    def as_data(self, prediction: Tensor) -> Any:
        """The prediction for one image, without its first axis, as numbers, lists and names, which JSON can hold."""
        return prediction.tolist()

    def draw(self, values: Tensor, is_label: bool) -> Tensor:  # noqa: ARG002  classes of their own need it
        """Pictures of labels or outputs of a dense task; by default, of their first channel, from black to white.

        Args:
            values: On the CPU: labels as `loss` takes them, or float32 outputs of the head.
            is_label: Which of both.

        Returns:
            "b h w c", floats from 0 to 1, c is 1 or 3.
        """
        first = (values if values.ndim == 3 else values[:, 0]).float().nan_to_num(0, 0, 0)
        low, high = first.amin(), first.amax()
        return ((first - low) / (high - low).clamp(min=1e-12))[..., None]

    def legend(self) -> list[tuple[str, tuple[float, float, float]]]:
        """The legend of a dense task's pictures: names, with red, green and blue from 0 to 1."""
        return []

    def colour_scale(self) -> ColourScale | None:
        """The scale of a dense task's pictures, if their colours stand for numbers."""
        return None

    def caption(self, values: Tensor, is_label: bool) -> list[str]:  # noqa: ARG002  as above
        """Labels or outputs of a vector task in words, a text per image; by default, their first numbers.

        Args: as for `draw`.
        """
        return [", ".join(f"{number:.3g}" for number in each.flatten()[:4].tolist()) for each in values]

    @abstractmethod
    def check_labels(self, label: Tensor) -> None:
        """Raises `ValueError` if a label does not fit the task (shape, dtype, class index)."""
