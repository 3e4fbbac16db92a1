"""`depth` and `normals`: distance and orientation of each pixel's surface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from mtl.tasks.base import Goal, LabelKind, Metrics, Task, masked_mean

# Angles are counted in bins this wide (degrees); 11.25, 22.5 and 30 lie on edges, so shares under them are exact.
_ANGLE_BIN = 3.75 / 2**15
_NUM_BINS = round(180 / _ANGLE_BIN)


def _labelled_depth(label: Tensor) -> Tensor:
    return label.isfinite() & (label > 0)


def _labelled_normals(label: Tensor) -> Tensor:
    return label.isfinite().all(dim=1) & (label != 0).any(dim=1)


class DepthMetrics(Metrics):
    """Sums over labelled pixels: count, relative error, squared error, pixels within a factor of 1.25."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def update(self, output: Tensor, label: Tensor) -> None:
        mask = _labelled_depth(label)
        truth = torch.where(mask, label, 1).double()
        metres = output.double().exp()
        ratio = torch.maximum(metres / truth, truth / metres)
        rows = [torch.ones_like(truth), (metres - truth).abs() / truth, (metres - truth) ** 2, (ratio < 1.25).double()]
        sums = torch.stack([(row * mask).sum() for row in rows])
        self.sums = sums if self.sums is None else self.sums + sums

    def state(self) -> list[Tensor]:
        return [torch.zeros(4, dtype=torch.float64) if self.sums is None else self.sums]

    def load_state(self, state: Sequence[Tensor]) -> None:
        (self.sums,) = state

    def compute(self) -> dict[str, float]:
        """`abs_rel` and `delta1` (share within a factor 1.25): Eigen et al. (arXiv 1406.2283); `rmse`: metres."""
        count, relative, squared, close = [0.0] * 4 if self.sums is None else self.sums.tolist()
        if count == 0:
            return {"abs_rel": float("nan"), "rmse": float("nan"), "delta1": float("nan")}
        return {"abs_rel": relative / count, "rmse": (squared / count) ** 0.5, "delta1": close / count}


class Depth(Task):
    """Metres along the optical axis. The head outputs log metres, so that equal ratios weigh alike."""

    output: ClassVar[Literal["dense", "vector"]] = "dense"
    label_kind: LabelKind = "depth"
    goal = Goal("abs_rel", perfect=0.0)
    num_outputs = 1

    def fit(self, label: Tensor) -> Tensor:
        mask = _labelled_depth(label)
        mean = label[mask].double().mean() if bool(mask.any()) else torch.tensor(1.0)
        return mean.log().float().reshape(1)

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """Mean absolute difference of log metres, which is the relative error for small ones.

        Args:
            output: "b 1 h w", log metres.
            label: "b 1 h w", float32, metres; 0 or NaN = no label.
        """
        mask = _labelled_depth(label)
        truth = torch.where(mask, label, 1).float().log()
        return masked_mean((output.float() - truth).abs(), mask)

    def weight(self, label: Tensor) -> Tensor:
        """The number of labelled pixels."""
        return _labelled_depth(label).sum().double()

    def draw(self, values: Tensor, is_label: bool) -> Tensor:
        """From 0 to 8 metres, on a scale of colours."""
        from matplotlib import colormaps

        metres = (values if is_label else values.exp()).squeeze(1)
        return torch.from_numpy(colormaps["viridis"]((metres / 8).clamp(0, 1).numpy())[..., :3])

    def metrics(self) -> DepthMetrics:
        return DepthMetrics()

    def unlabelled(self, label: Tensor) -> Tensor:
        return torch.zeros_like(label)

    def bad_samples(self, label: Tensor) -> Tensor:
        """Samples with an infinite depth."""
        return label.isinf().flatten(1).any(dim=1)

    def check_labels(self, label: Tensor) -> None:
        if label.ndim != 4 or label.shape[1] != 1 or not label.dtype.is_floating_point:
            raise ValueError(f'expected floats of shape "n 1 h w", got {label.dtype} of shape {tuple(label.shape)}')


def _directions(vectors: Tensor) -> Tensor:
    """Vectors "b 3 h w" scaled to length 1; zero vectors stay zero.

    The same as `functional.normalize`, whose norm over a dimension that is not the last one in memory takes 60 times as
    long on a CPU.
    """
    return vectors * vectors.square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt()


class NormalsMetrics(Metrics):
    """Sum and histogram of the angle between predicted and true normals, over labelled pixels."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.histogram: Tensor | None = None

    def update(self, output: Tensor, label: Tensor) -> None:
        mask = _labelled_normals(label)
        a, b = _directions(output.double()), _directions(label.double().nan_to_num())
        # atan2 keeps its precision near 0 and 180 degrees, where acos loses half the digits.
        angle = 2 * torch.atan2((a - b).square().sum(1).sqrt(), (a + b).square().sum(1).sqrt()).rad2deg()
        angle = angle.nan_to_num(nan=180.0)  # a NaN output gets the largest error
        if self.total is None or self.histogram is None:
            self.total, self.histogram = (zeros.to(output.device) for zeros in self._zeros())
        self.total = self.total + (angle * mask).sum()
        # Unlabelled pixels go to a bin after the last.
        bins = torch.where(mask, (angle / _ANGLE_BIN).long(), _NUM_BINS + 1).flatten()
        self.histogram.scatter_add_(0, bins, torch.ones_like(bins))

    def state(self) -> list[Tensor]:
        if self.total is None or self.histogram is None:
            return list(self._zeros())
        return [self.total, self.histogram]

    def load_state(self, state: Sequence[Tensor]) -> None:
        self.total, self.histogram = state

    @staticmethod
    def _zeros() -> tuple[Tensor, Tensor]:
        return torch.zeros((), dtype=torch.float64), torch.zeros(_NUM_BINS + 2, dtype=torch.int64)

    def compute(self) -> dict[str, float]:
        """`mean` and `median` in degrees (the median to within 0.0002), `within_x`: share under x degrees."""
        names = {11.25: "within_11", 22.5: "within_22", 30.0: "within_30"}
        if self.total is None or self.histogram is None or not int(self.histogram[:-1].sum()):
            return dict.fromkeys(["mean", "median", *names.values()], float("nan"))
        cumulated = self.histogram[:-1].cumsum(0).cpu()
        count = int(cumulated[-1])
        middle = int(torch.searchsorted(cumulated, (count + 1) // 2))
        shares = {name: int(cumulated[round(x / _ANGLE_BIN) - 1]) / count for x, name in names.items()}
        return {"mean": self.total.item() / count, "median": (middle + 0.5) * _ANGLE_BIN, **shares}


class Normals(Task):
    """Unit surface normals. The head's three outputs are normalised before use."""

    output: ClassVar[Literal["dense", "vector"]] = "dense"
    label_kind: LabelKind = "normals"
    goal = Goal("mean", perfect=0.0)
    num_outputs = 3

    def fit(self, label: Tensor) -> Tensor:
        mask = _labelled_normals(label)
        if not bool(mask.any()):
            return torch.tensor([0.0, 0.0, -1.0])
        mean = rearrange(label, "n c h w -> n h w c")[mask].double().mean(dim=0)
        return functional.normalize(mean, dim=0).float()

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """Mean chord between the unit vectors, 2 sin(angle / 2): close to the angle in radians, which the metrics use.

        Args:
            output: "b 3 h w", any length.
            label: "b 3 h w", unit vectors; zero or NaN = no label.
        """
        mask = _labelled_normals(label)
        truth = label.float().nan_to_num()
        square = (_directions(output.float()) - truth).square().sum(dim=1)
        return masked_mean((square + 1e-6).sqrt(), mask)

    def weight(self, label: Tensor) -> Tensor:
        """The number of labelled pixels."""
        return _labelled_normals(label).sum().double()

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
