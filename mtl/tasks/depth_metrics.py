"""The metrics of `depth`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mtl.tasks.means import Means

# Of a head's output, metres; of a label, which pixels count.
Read = Callable[[Tensor], Tensor]


class DepthMeans(Means):
    """Base: means over labelled pixels."""

    def __init__(self, metres: Read, labelled: Read) -> None:
        super().__init__()
        self.metres = metres
        self.labelled = labelled

    def pixels(self, output: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which pixels are labelled, the predicted and the true metres, float64."""
        mask = self.labelled(label)
        return mask, self.metres(output.double()), torch.where(mask, label, 1).double()


class DepthMetrics(DepthMeans):
    """Relative error, squared error, pixels within a factor of 1.25."""

    num_terms = 3
    higher = ("delta1",)
    lower = ("abs_rel", "rmse")

    def terms(self, output: Tensor, label: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        mask, metres, truth = self.pixels(output, label)
        ratio = torch.maximum(metres / truth, truth / metres)
        return mask, [(metres - truth).abs() / truth, (metres - truth) ** 2, (ratio < 1.25).double()]

    def finish(self, means: Sequence[float]) -> dict[str, float]:
        """`abs_rel` and `delta1` (share within a factor 1.25): Eigen et al. (arXiv 1406.2283); `rmse`: metres."""
        relative, squared, close = means
        return {"abs_rel": relative, "rmse": squared**0.5, "delta1": close}


class DepthMean(DepthMeans):
    """One of the metrics that a configuration may add."""

    num_terms = 1

    def __init__(self, name: str, metres: Read, labelled: Read) -> None:
        super().__init__(metres, labelled)
        self._name = name
        self.higher, self.lower = ((name,), ()) if name.startswith("delta") else ((), (name,))

    def terms(self, output: Tensor, label: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        mask, metres, truth = self.pixels(output, label)
        return mask, [TERMS[self._name](metres, truth)]

    def finish(self, means: Sequence[float]) -> dict[str, float]:
        (mean,) = means
        return {self._name: mean**0.5 if self._name in _ROOTS else mean}


def _within(metres: Tensor, truth: Tensor, factor: float) -> Tensor:
    return (torch.maximum(metres / truth, truth / metres) < factor).double()


# Of predicted and true metres, what is averaged.
TERMS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mae": lambda m, d: (m - d).abs(),
    "sq_rel": lambda m, d: (m - d).square() / d,
    "rmse_log": lambda m, d: (m.log() - d.log()).square(),
    "log10": lambda m, d: (m.log10() - d.log10()).abs(),
    "delta2": lambda m, d: _within(m, d, 1.25**2),
    "delta3": lambda m, d: _within(m, d, 1.25**3),
}
_ROOTS = ("rmse_log",)
