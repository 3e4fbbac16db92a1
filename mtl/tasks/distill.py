"""`distill`: the embedding that a frozen teacher gives of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mtl.config import Strict
from mtl.config.types import Positive
from mtl.tasks.base import Goal, LabelKind
from mtl.tasks.entries import EntryTask
from mtl.tasks.loss import Loss, as_float
from mtl.tasks.means import Means
from mtl.tasks.number_losses import Mse

# Embeddings of which a mean is taken at once, so that float64 takes little room.
_AT_ONCE = 8192


class CosineDistance(Loss):
    """1 - cos(p, y) of each image: the direction alone counts (Ranzinger et al., arXiv 2312.06709, for pooled vectors).

    A vector of zeros has the distance 1 from all others.
    """

    per: ClassVar[Literal["entry", "image"]] = "image"

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        return 1 - functional.cosine_similarity(output, label.nan_to_num(), dim=1)


class SmoothL1(Loss):
    """e^2 / (2 beta) for |e| = |p - y| below beta, from there on |e| - beta / 2 (Girshick, arXiv 1504.08083)."""

    class Options(Strict):
        beta: Positive = 1.0

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        return functional.smooth_l1_loss(output, label, reduction="none", beta=self.beta)


class DistillMetrics(Means):
    """Means over images of the cosine of the angle to the teacher's embedding, and of the squared error."""

    higher = ("cosine",)
    lower = ("mse",)
    num_terms = 2

    def terms(self, output: Tensor, label: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        output, label = output.double(), label.double()
        cosine = functional.cosine_similarity(output, label, dim=1)
        return label.isfinite().all(dim=1), [cosine.nan_to_num(-1.0), (output - label).square().mean(dim=1)]

    def finish(self, means: Sequence[float]) -> dict[str, float]:
        """`cosine`: the mean over images, 1 for the teacher's direction; `mse`: that of (p - y)^2 over all numbers."""
        return dict(zip(("cosine", "mse"), means, strict=True))


class Distill(EntryTask):
    """The embedding of an image by a teacher, which gives the labels: no data set has any.

    Losses receive prediction and embedding "b k".
    """

    output: ClassVar[Literal["dense", "vector"]] = "vector"
    label_kind: LabelKind = "numbers"
    goal = Goal("cosine", perfect=1.0)
    losses: ClassVar[Mapping[str, type[Loss]]] = {"cosine": CosineDistance, "mse": Mse, "smooth_l1": SmoothL1}

    def __init__(self, num_outputs: int, loss: Loss | None = None) -> None:
        """Args:
        num_outputs: Numbers in an embedding.
        loss: What an embedding costs; the cosine distance if not given.
        """
        self.num_outputs = num_outputs
        self.entry_loss = loss or CosineDistance()

    def fit(self, label: Tensor) -> Tensor:
        """The mean embedding; for the cosine distance that of embeddings of length 1, whose mean cosine is the best.

        The mean of unit vectors y maximises the sum of p y / |p| over all p (Mardia and Jupp, Directional Statistics).
        """
        is_unit, total, num = isinstance(self.entry_loss, CosineDistance), torch.zeros(self.num_outputs).double(), 0
        for part in torch.split(label, _AT_ONCE):
            known = part[part.isfinite().all(dim=1)].double()
            total += (functional.normalize(known, dim=1) if is_unit else known).sum(dim=0)
            num += len(known)
        return (total / max(1, num)).float()

    def entry_weights(self, label: Tensor) -> Tensor:
        return label.isfinite()

    def stand_in(self, label: Tensor) -> Tensor:
        return self.marked(label).nan_to_num()

    def marked(self, label: Tensor) -> Tensor:
        return as_float(label)

    def blank(self, num_images: int, size: tuple[int, int]) -> Tensor:  # noqa: ARG002  one signature for all
        return torch.full((num_images, self.num_outputs), torch.nan)

    def metrics(self) -> DistillMetrics:
        return DistillMetrics()

    def unlabelled(self, label: Tensor) -> Tensor:
        return torch.full_like(label, torch.nan)

    def check_labels(self, label: Tensor) -> None:
        if label.ndim != 2 or label.shape[1] != self.num_outputs or not label.dtype.is_floating_point:
            expected = f'expected embeddings, floats of shape "n {self.num_outputs}"'
            raise ValueError(f"{expected}, got {label.dtype} of shape {tuple(label.shape)}")
