"""`edges` and `saliency`: yes or no for each pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mtl.tasks.base import ColourScale, Goal, LabelKind
from mtl.tasks.binary_losses import BalancedBce, Bce, BinaryFocal, WeightedBce, log_odds
from mtl.tasks.classes import check_classes, samples_out_of_range
from mtl.tasks.entries import EntryTask
from mtl.tasks.loss import Loss, as_float
from mtl.tasks.maps import resized
from mtl.tasks.metrics import Metrics, Several
from mtl.tasks.ods_f import OdsF
from mtl.tasks.thresholds import ForegroundIou, MaxF


class BinaryMap(EntryTask):
    """Yes (1) or no (0) for each pixel; the head outputs a logit.

    Losses receive logits and labels "b h w".
    """

    output: ClassVar[Literal["dense", "vector"]] = "dense"
    label_kind: LabelKind = "mask"
    goal = Goal("max_f", perfect=1.0)
    num_outputs = 1

    def __init__(self, ignore_index: int = 255, loss: Loss | None = None) -> None:
        self.ignore_index = ignore_index
        self.entry_loss = loss or next(iter(self.losses.values()))()

    def fit(self, label: Tensor) -> Tensor:
        """The constant that minimises the loss, if the loss knows it, else the logit of the share of yes."""
        values = label[label != self.ignore_index]
        best = self.entry_loss.constant(values) if len(values) else 0.0
        return torch.tensor([log_odds(values) if best is None else best])

    def prediction(self, output: Tensor) -> Tensor:
        return as_float(output[:, 0])

    def entry_weights(self, label: Tensor) -> Tensor:
        return label != self.ignore_index

    def stand_in(self, label: Tensor) -> Tensor:
        return label.masked_fill(label == self.ignore_index, 0)

    def marked(self, label: Tensor) -> Tensor:
        return label.masked_fill(label == self.ignore_index, -1)

    def blank(self, num_images: int, size: tuple[int, int]) -> Tensor:
        return torch.full((num_images, *size), self.ignore_index)

    def predict(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """The probability of yes, "b h w"."""
        return resized(output.float(), size)[:, 0].sigmoid()

    def as_label(self, prediction: Tensor) -> Tensor:
        return (prediction >= 0.5).long()

    def draw(self, values: Tensor, is_label: bool) -> Tensor:
        """The probability of yes, from black to white."""
        shown = (values == 1).float() if is_label else values[:, 0].sigmoid().nan_to_num()
        return shown[..., None]

    def colour_scale(self) -> ColourScale:
        return ColourScale(0.0, 1.0, "probability of yes", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0)])

    def unlabelled(self, label: Tensor) -> Tensor:
        return torch.full_like(label, self.ignore_index)

    def bad_samples(self, label: Tensor) -> Tensor:
        """Samples with another number than 0, 1 and that for none."""
        return samples_out_of_range(label, 2, self.ignore_index)

    def check_labels(self, label: Tensor) -> None:
        check_classes(label, 3, 2, self.ignore_index)


class Edges(BinaryMap):
    """Edges of objects. `max_f` compares pixel by pixel; `ods_f` allows edges to lie next to their place."""

    losses: ClassVar[Mapping[str, type[Loss]]] = {
        "weighted_bce": WeightedBce,
        "balanced_bce": BalancedBce,
        "bce": Bce,
        "focal": BinaryFocal,
    }

    @property
    def more_metrics(self) -> Mapping[str, Callable[..., Metrics]]:
        return {"ods_f": OdsF}

    def metrics(self) -> MaxF:
        return MaxF([number / 100 for number in range(1, 100)], beta_squared=1.0)


class Saliency(BinaryMap):
    """Salient regions: those that draw the eye."""

    losses: ClassVar[Mapping[str, type[Loss]]] = {
        "balanced_bce": BalancedBce,
        "bce": Bce,
        "weighted_bce": WeightedBce,
        "focal": BinaryFocal,
    }

    def metrics(self) -> Several:
        # Achanta et al. 2009: beta squared is 0.3.
        return Several([MaxF([number / 20 for number in range(1, 20)], beta_squared=0.3), ForegroundIou()])
