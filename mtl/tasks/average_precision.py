"""Average precision of attributes: how well the images that have one are ranked before those that have not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.tasks.loss import as_float
from mtl.tasks.metrics import Metrics

# Next to 0 for no.
_YES, _NONE = 1, -1


class AveragePrecision(Metrics):
    """The outputs and labels of all images measured, "n k": the rank of an image depends on all others.

    That is 5 bytes for each attribute of an image.
    """

    adds_up = False

    def __init__(self, names: Sequence[str]) -> None:
        """Args:
        names: Of the attributes, k.
        """
        self._names = names
        self._scores = [torch.zeros(0, len(names))]
        self._labels = [torch.zeros(0, len(names), dtype=torch.int8)]

    def update(self, output: Tensor, label: Tensor) -> None:
        """A NaN is ranked last if the answer is yes, and first if it is no."""
        worst = torch.where(label == 1, -torch.inf, torch.inf).to(output.dtype)
        self._scores.append(as_float(torch.where(output.isnan(), worst, output)))
        self._labels.append((label == 1).to(torch.int8).where(label.isfinite(), _NONE))

    def state(self) -> list[Tensor]:
        device = self._scores[-1].device
        return [torch.cat([part.to(device) for part in parts]) for parts in (self._scores, self._labels)]

    def load_state(self, state: Sequence[Tensor]) -> None:
        scores, labels = state
        self._scores, self._labels = [scores], [labels]

    def each(self) -> Tensor:
        """The average precision of each attribute, "k", float64; NaN without a yes."""
        scores, labels = (tensor.cpu().unbind(dim=1) for tensor in self.state())
        return torch.stack(
            [
                average_precision(score[label != _NONE], label[label != _NONE] == _YES)
                for score, label in zip(scores, labels, strict=True)
            ]
        )


class MeanAveragePrecision(AveragePrecision):
    higher = ("map",)

    def compute(self) -> dict[str, float]:
        """`map`: the mean over the attributes that some label says yes to."""
        return {"map": self.each().nanmean().item()}


class EachAveragePrecision(AveragePrecision):
    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.higher = [f"ap_{name}" for name in names]

    def compute(self) -> dict[str, float]:
        """`ap_<attribute>`: of each attribute."""
        return dict(zip(self.higher, self.each().tolist(), strict=True))


def average_precision(score: Tensor, truth: Tensor) -> Tensor:
    """The sum over thresholds of (gain in recall) * precision, without interpolation; equal scores are one threshold.

    Args:
        score: "n".
        truth: "n", bool.

    Returns:
        A float64 scalar; NaN if nothing is true.
    """
    score, order = score.sort(descending=True)
    hits = truth[order].cumsum(dim=0).double()
    is_last = torch.ones(len(score), dtype=torch.bool)
    is_last[:-1] = score[1:] != score[:-1]
    precision = hits / torch.arange(1, len(hits) + 1)
    gains = hits[is_last].diff(prepend=hits.new_zeros(1))
    return (gains * precision[is_last]).sum() / truth.sum()
