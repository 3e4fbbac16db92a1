"""`multilabel`: attributes of an image, each of which it has or has not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mtl.tasks.average_precision import EachAveragePrecision, MeanAveragePrecision
from mtl.tasks.base import Goal, LabelKind
from mtl.tasks.binary_losses import Bce, BinaryFocal, log_odds
from mtl.tasks.entries import EntryTask
from mtl.tasks.loss import Loss, as_float
from mtl.tasks.metrics import Metrics


class MultiLabelMetrics(Metrics):
    """For each attribute, how many labels of each value were predicted as which: "k 4", int64."""

    higher = ("macro_f1",)
    lower = ("error",)

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self.counts: Tensor | None = None

    def update(self, output: Tensor, label: Tensor) -> None:
        """A probability of 0.5 or more is a yes; a NaN is the wrong answer."""
        truth = label == 1
        answer = torch.where(output.isnan(), ~truth, output >= 0)
        valid = label.isfinite()
        cells = torch.stack([truth & answer, ~truth & answer, truth & ~answer, ~truth & ~answer], dim=-1)
        counts = (cells & valid[..., None]).sum(dim=0)
        self.counts = counts if self.counts is None else self.counts + counts

    def state(self) -> list[Tensor]:
        return [torch.zeros(self._num_classes, 4, dtype=torch.int64) if self.counts is None else self.counts]

    def load_state(self, state: Sequence[Tensor]) -> None:
        (self.counts,) = state

    def compute(self) -> dict[str, float]:
        """`error`: share of wrong answers of each attribute, mean over those with a label; `macro_f1`: F1 of each.

        The mean of F1 is over the attributes that a label or a prediction says yes to.
        """
        right_yes, wrong_yes, wrong_no, right_no = self.state()[0].cpu().double().unbind(dim=1)
        num, wrong = right_yes + wrong_yes + wrong_no + right_no, wrong_yes + wrong_no
        yes = 2 * right_yes + wrong
        return {
            "error": (wrong / num)[num > 0].mean().item(),
            "macro_f1": (2 * right_yes / yes)[yes > 0].mean().item(),
        }


class MultiLabel(EntryTask):
    """Attributes of an image; the mean is over all labels that are there.

    Losses receive logits and labels "b k".
    """

    output: ClassVar[Literal["dense", "vector"]] = "vector"
    label_kind: LabelKind = "tags"
    goal = Goal("error", perfect=0.0)
    losses: ClassVar[Mapping[str, type[Loss]]] = {"bce": Bce, "focal": BinaryFocal}

    def __init__(self, num_classes: int, loss: Loss | None = None, class_names: Sequence[str] = ()) -> None:
        self.num_outputs = num_classes
        self.entry_loss = loss or Bce()
        self.class_names = class_names

    @property
    def more_metrics(self) -> Mapping[str, Callable[..., Metrics]]:
        names = self._names
        return {"map": lambda: MeanAveragePrecision(names), "ap": lambda: EachAveragePrecision(names)}

    @property
    def _names(self) -> Sequence[str]:
        return self.class_names or [str(number) for number in range(self.num_outputs)]

    def fit(self, label: Tensor) -> Tensor:
        """The logit of each attribute's share of yes."""
        return torch.tensor([log_odds(column[column.isfinite()]) for column in label.unbind(dim=1)])

    def entry_weights(self, label: Tensor) -> Tensor:
        return label.isfinite()

    def stand_in(self, label: Tensor) -> Tensor:
        return as_float(label).nan_to_num()

    def marked(self, label: Tensor) -> Tensor:
        return as_float(label)

    def blank(self, num_images: int, size: tuple[int, int]) -> Tensor:  # noqa: ARG002  one signature for all
        return torch.full((num_images, self.num_outputs), torch.nan)

    def metrics(self) -> MultiLabelMetrics:
        return MultiLabelMetrics(self.num_outputs)

    def predict(self, output: Tensor, size: tuple[int, int]) -> Tensor:  # noqa: ARG002  one signature for all
        """The probability of each attribute, "b k", float64."""
        return output.double().sigmoid()

    def as_label(self, prediction: Tensor) -> Tensor:
        return (prediction >= 0.5).float()

    def as_data(self, prediction: Tensor) -> dict[str, float]:
        """The probability of each attribute, by name or number."""
        return dict(zip(self._names, prediction.tolist(), strict=True))

    def caption(self, values: Tensor, is_label: bool) -> list[str]:
        """The attributes that an image has, by name or number; `none` if it has none."""
        yes = values == 1 if is_label else values >= 0
        return [
            ", ".join(name for name, there in zip(self._names, row.tolist(), strict=True) if there) or "none"
            for row in yes
        ]

    def unlabelled(self, label: Tensor) -> Tensor:
        return torch.full_like(label, torch.nan)

    def bad_samples(self, label: Tensor) -> Tensor:
        """Samples with a number other than 0, 1 and NaN."""
        return ~((label == 0) | (label == 1) | label.isnan()).all(dim=1)

    def check_labels(self, label: Tensor) -> None:
        if label.ndim != 2 or label.shape[1] != self.num_outputs or not label.dtype.is_floating_point:
            expected = f'expected floats of shape "n {self.num_outputs}" (1 yes, 0 no, NaN for none)'
            raise ValueError(f"{expected}, got {label.dtype} of shape {tuple(label.shape)}")
        if bool(self.bad_samples(label).any()):
            other = label[~((label == 0) | (label == 1) | label.isnan())][0].item()
            raise ValueError(f"expected 1 (yes), 0 (no) or NaN (none), got {other:g}")
