"""`normals`: the orientation of each pixel's surface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from mtl.tasks.base import Goal, LabelKind
from mtl.tasks.entries import EntryTask
from mtl.tasks.loss import Loss, as_float
from mtl.tasks.maps import resized
from mtl.tasks.metrics import Metrics
from mtl.tasks.normals_losses import Chord, Cosine, L1OfNormals, directions, labelled_normals
from mtl.tasks.normals_metrics import AngleRmse, NormalsMetrics


class Normals(EntryTask):
    """Unit surface normals. The head's three outputs are normalised before use.

    Losses receive unit vectors "b 3 h w" and give "b h w".
    """

    output: ClassVar[Literal["dense", "vector"]] = "dense"
    label_kind: LabelKind = "normals"
    goal = Goal("mean", perfect=0.0)
    num_outputs = 3
    losses: ClassVar[Mapping[str, type[Loss]]] = {"chord": Chord, "cosine": Cosine, "l1": L1OfNormals}

    def __init__(self, loss: Loss | None = None) -> None:
        self.entry_loss = loss or Chord()

    @property
    def more_metrics(self) -> Mapping[str, Callable[..., Metrics]]:
        return {"rmse": AngleRmse}

    def fit(self, label: Tensor) -> Tensor:
        """The direction of the mean of all labelled pixels."""
        total, is_labelled = label.new_zeros(3, dtype=torch.float64), False
        # In parts: in float64, all labels would take as much room as the data.
        for part in torch.split(label, 256):
            mask = labelled_normals(part)
            values = part.transpose(0, 1).flatten(1) if bool(mask.all()) else part.transpose(0, 1)[:, mask]
            total += values.sum(dim=1, dtype=torch.float64)
            is_labelled |= bool(mask.any())
        return functional.normalize(total, dim=0).float() if is_labelled else torch.tensor([0.0, 0.0, -1.0])

    def entry_weights(self, label: Tensor) -> Tensor:
        return labelled_normals(label)

    def stand_in(self, label: Tensor) -> Tensor:
        """(0, 0, -1) where there is no label."""
        toward = -(torch.arange(3, device=label.device) == 2).to(label.dtype).view(3, 1, 1)
        return as_float(torch.where(labelled_normals(label)[:, None], label, toward))

    def marked(self, label: Tensor) -> Tensor:
        return as_float(label).masked_fill(~labelled_normals(label)[:, None], torch.nan)

    def blank(self, num_images: int, size: tuple[int, int]) -> Tensor:
        return torch.zeros(num_images, 3, *size)

    def prediction(self, output: Tensor) -> Tensor:
        """The unit vectors."""
        return directions(as_float(output))

    def predict(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """Unit vectors, "b 3 h w"."""
        return directions(resized(output.float(), size))

    def draw(self, values: Tensor, is_label: bool) -> Tensor:  # noqa: ARG002  one signature for all
        """Each axis as a colour."""
        return rearrange(functional.normalize(values, dim=1), "b c h w -> b h w c") / 2 + 0.5

    def metrics(self) -> NormalsMetrics:
        return NormalsMetrics()

    def unlabelled(self, label: Tensor) -> Tensor:
        return torch.zeros_like(label)

    def bad_samples(self, label: Tensor) -> Tensor:
        """Samples with an infinite normal."""
        return label.isinf().flatten(1).any(dim=1)

    def check_labels(self, label: Tensor) -> None:
        if label.ndim != 4 or label.shape[1] != 3 or not label.dtype.is_floating_point:
            raise ValueError(f'expected floats of shape "n 3 h w", got {label.dtype} of shape {tuple(label.shape)}')
