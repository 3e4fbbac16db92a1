"""The common part of `classification` and `segmentation`; and checks of labels that are numbers of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mtl.tasks.class_losses import ClassLoss, ClassWeights, CrossEntropy, Focal
from mtl.tasks.confusion import MacroF1, MeanAccuracy
from mtl.tasks.entries import EntryTask
from mtl.tasks.loss import Loss
from mtl.tasks.metrics import Metrics


class ClassTask(EntryTask):
    """A class for each entry: log-frequency prior, weights of classes, label checks."""

    losses: ClassVar[Mapping[str, type[Loss]]] = {"cross_entropy": CrossEntropy, "focal": Focal}
    class_weight: Tensor | None = None

    def __init__(
        self,
        num_classes: int,
        ignore_index: int,
        loss: Loss | None = None,
        class_names: Sequence[str] = (),
        balance_power: float = 0.0,
    ) -> None:
        self.num_outputs = num_classes
        self.ignore_index = ignore_index
        self.entry_loss = loss or CrossEntropy()
        self.class_names = class_names
        self.balance_power = balance_power
        weights: ClassWeights | None = loss.class_weights if isinstance(loss, ClassLoss) else None
        if weights == "balanced":
            self.balance_power = 1.0
        elif weights is not None:
            self.balance_power, self.class_weight = 0.0, torch.tensor(weights, dtype=torch.float32)
        # A copy per device: labels on the host need no transfer from the GPU.
        self._class_weights: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def more_metrics(self) -> Mapping[str, Callable[..., Metrics]]:
        own = (self.num_outputs, self.ignore_index)
        return {"macro_f1": lambda: MacroF1(*own), "mean_accuracy": lambda: MeanAccuracy(*own)}

    def fit(self, label: Tensor) -> Tensor:
        """The log of each class's frequency; where entries weigh by class, also their weights."""
        # Selecting takes far longer than looking whether there is anything to leave out.
        own = (self.num_outputs, self.ignore_index)
        known = label if _are_classes(label, *own) else label[label != self.ignore_index]
        counts = torch.bincount(known.flatten().long(), minlength=self.num_outputs)
        prior = (counts.clamp(min=1) / counts.sum().clamp(min=1)).log().float()
        if self.balance_power:
            frequency = prior.exp()
            weight = frequency**-self.balance_power
            self.class_weight = weight / (weight * frequency).sum()
        return prior

    def entry_weights(self, label: Tensor) -> Tensor:
        """The weight of each entry's class; 0 where there is no label."""
        valid, fitted = label != self.ignore_index, self.class_weight
        if fitted is None:
            return valid
        source, here = self._class_weights.get(label.device, (None, fitted))
        if source is not fitted:
            here = fitted.to(label.device, non_blocking=True)
            self._class_weights[label.device] = (fitted, here)
        return here[torch.where(valid, label, 0)] * valid

    def stand_in(self, label: Tensor) -> Tensor:
        return label.masked_fill(label == self.ignore_index, 0)

    def marked(self, label: Tensor) -> Tensor:
        return label.masked_fill(label == self.ignore_index, -1)

    def blank(self, num_images: int, size: tuple[int, int]) -> Tensor:
        shape = (num_images, *size) if self.output == "dense" else (num_images,)
        return torch.full(shape, self.ignore_index)

    def unlabelled(self, label: Tensor) -> Tensor:
        return torch.full_like(label, self.ignore_index)

    def bad_samples(self, label: Tensor) -> Tensor:
        """Samples with a class out of range."""
        return samples_out_of_range(label, self.num_outputs, self.ignore_index)

    def check_labels(self, label: Tensor) -> None:
        check_classes(label, 3 if self.output == "dense" else 1, self.num_outputs, self.ignore_index)


def samples_out_of_range(label: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Which samples have a class outside 0 to `num_classes` - 1, "n", bool.

    Args:
        label: "n ...", whole numbers.
        num_classes: Number of classes.
        ignore_index: The label that is none.
    """
    known = (label == ignore_index) | ((label >= 0) & (label < num_classes))
    return ~known.flatten(1).all(dim=1) if label.ndim > 1 else ~known


def check_classes(label: Tensor, num_axes: int, num_classes: int, ignore_index: int) -> None:
    """Raises `ValueError` if a label is not of classes, or one of them is out of range.

    Args: as above; `num_axes` is how many the label has.
    """
    if label.ndim != num_axes or label.dtype.is_floating_point:
        raise ValueError(
            f"expected whole numbers with {num_axes} axes, got {label.dtype} of shape {tuple(label.shape)}"
        )
    if _are_classes(label, num_classes, ignore_index):
        return
    known = label[label != ignore_index]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < num_classes:
        raise ValueError(
            f"expected classes 0 to {num_classes - 1} (num_classes: {num_classes}) or"
            f" {ignore_index} for none, got {int(known.min())} to {int(known.max())}"
        )


def _are_classes(label: Tensor, num_classes: int, ignore_index: int) -> bool:
    """Whether every entry is a class; False if one may be none."""
    if not label.numel() or 0 <= ignore_index < num_classes:
        return False
    least, most = label.aminmax()
    return int(least) >= 0 and int(most) < num_classes
