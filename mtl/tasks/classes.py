"""`segmentation` and `classification`: a class for each pixel or for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mtl.tasks.base import Goal, LabelKind, Metrics, Task


class Confusion(Metrics):
    """Confusion matrix, "true predicted", int64; every metric of class predictions follows from it."""

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts: Tensor | None = None

    def update(self, output: Tensor, label: Tensor) -> None:
        predicted = output.argmax(dim=1)
        valid = label != self.ignore_index
        # Ignored labels are counted in a cell after the matrix, since boolean indexing would sync the device.
        cell = torch.where(valid, label * self.num_classes + predicted, self.num_classes**2).flatten()
        if self.counts is None:
            self.counts = self._zeros().to(output.device)
        self.counts.scatter_add_(0, cell, torch.ones_like(cell))

    def state(self) -> list[Tensor]:
        return [self._zeros() if self.counts is None else self.counts]

    def load_state(self, state: Sequence[Tensor]) -> None:
        (self.counts,) = state

    def matrix(self) -> Tensor:
        return self.state()[0].cpu()[:-1].view(self.num_classes, self.num_classes).double()

    def _zeros(self) -> Tensor:
        return torch.zeros(self.num_classes**2 + 1, dtype=torch.int64)


class SegmentationMetrics(Confusion):
    def compute(self) -> dict[str, float]:
        """`miou`: mean over the classes in labels or predictions; `pixel_accuracy`: share of labelled pixels."""
        matrix = self.matrix()
        hit = matrix.diag()
        union = matrix.sum(0) + matrix.sum(1) - hit
        return {
            "miou": (hit / union)[union > 0].mean().item(),
            "pixel_accuracy": (hit.sum() / matrix.sum()).item(),
        }


class ClassificationMetrics(Confusion):
    def compute(self) -> dict[str, float]:
        """`accuracy`: share of labelled images."""
        matrix = self.matrix()
        return {"accuracy": (matrix.diag().sum() / matrix.sum()).item()}


class _ClassTask(Task):
    """Base of both class tasks: cross-entropy, log-frequency prior, label checks."""

    class_weight: Tensor | None = None

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.num_outputs = num_classes
        self.ignore_index = ignore_index
        # A copy per device: labels on the host need no transfer from the GPU.
        self._class_weights: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def fit(self, label: Tensor) -> Tensor:
        counts = torch.bincount(label[label != self.ignore_index].flatten().long(), minlength=self.num_outputs)
        return (counts.clamp(min=1) / counts.sum().clamp(min=1)).log().float()

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy over labelled entries.

        Args:
            output: "b c ..." logits.
            label: "b ...", int64, `ignore_index` = no label.
        """
        output = output.float()
        weight = self._weights(label)
        losses = functional.cross_entropy(output, label, ignore_index=self.ignore_index, reduction="none")
        return (losses * weight).sum() / weight.sum().clamp(min=1e-6)

    def weight(self, label: Tensor) -> Tensor:
        """The sum of class weights over labelled entries."""
        return self._weights(label).sum(dtype=torch.float64)

    def _weights(self, label: Tensor) -> Tensor:
        """The weight of each entry; 0 where there is no label."""
        valid, fitted = label != self.ignore_index, self.class_weight
        if fitted is None:
            return valid.float()
        source, here = self._class_weights.get(label.device, (None, fitted))
        if source is not fitted:
            here = fitted.to(label.device, non_blocking=True)
            self._class_weights[label.device] = (fitted, here)
        return here[torch.where(valid, label, 0)] * valid

    def unlabelled(self, label: Tensor) -> Tensor:
        return torch.full_like(label, self.ignore_index)

    def bad_samples(self, label: Tensor) -> Tensor:
        """Samples with a class out of range."""
        known = (label == self.ignore_index) | ((label >= 0) & (label < self.num_outputs))
        return ~known.flatten(1).all(dim=1) if label.ndim > 1 else ~known

    def check_labels(self, label: Tensor) -> None:
        dims = 3 if self.output == "dense" else 1
        if label.ndim != dims or label.dtype.is_floating_point:
            raise ValueError(
                f"expected whole numbers with {dims} axes, got {label.dtype} of shape {tuple(label.shape)}"
            )
        known = label[label != self.ignore_index]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < self.num_outputs:
            raise ValueError(
                f"expected classes 0 to {self.num_outputs - 1} (num_classes: {self.num_outputs}) or"
                f" {self.ignore_index} for none, got {int(known.min())} to {int(known.max())}"
            )


class Segmentation(_ClassTask):
    """A class per pixel; cross-entropy weighted by class, since backgrounds cover most pixels."""

    output: ClassVar[Literal["dense", "vector"]] = "dense"
    goal = Goal("miou", perfect=1.0)

    def __init__(self, num_classes: int, ignore_index: int = 255, balance_power: float = 0.5) -> None:
        """Args:
        num_classes: Number of classes.
        ignore_index: Label of pixels that do not count.
        balance_power: Classes weigh frequency ** -balance_power, scaled so that the mean pixel weighs 1.
            0 weighs all pixels alike, 1 all classes alike.
        """
        super().__init__(num_classes, ignore_index)
        self.balance_power = balance_power

    def fit(self, label: Tensor) -> Tensor:
        prior = super().fit(label)
        frequency = prior.exp()
        weight = frequency**-self.balance_power
        self.class_weight = weight / (weight * frequency).sum()
        return prior

    def draw(self, values: Tensor, is_label: bool) -> Tensor:
        """A colour for each class."""
        from matplotlib import colormaps

        classes = values if is_label else values.argmax(dim=1)
        return torch.from_numpy(colormaps["tab20"](classes.clamp(max=19).numpy())[..., :3])

    def metrics(self) -> SegmentationMetrics:
        return SegmentationMetrics(self.num_outputs, self.ignore_index)


class Classification(_ClassTask):
    """A class per image; cross-entropy."""

    output: ClassVar[Literal["dense", "vector"]] = "vector"
    label_kind: LabelKind = "class"
    goal = Goal("accuracy", perfect=1.0)

    def __init__(self, num_classes: int, ignore_index: int = -1) -> None:
        super().__init__(num_classes, ignore_index)

    def caption(self, values: Tensor, is_label: bool) -> list[str]:
        """The number of the class."""
        return [str(int(each)) for each in (values if is_label else values.argmax(dim=1))]

    def metrics(self) -> ClassificationMetrics:
        return ClassificationMetrics(self.num_outputs, self.ignore_index)
