"""`depth`: the distance of each pixel's surface."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mtl.tasks.base import ColourScale, Goal, LabelKind
from mtl.tasks.depth_metrics import TERMS, DepthMean, DepthMetrics
from mtl.tasks.entries import EntryTask
from mtl.tasks.loss import Loss, as_float
from mtl.tasks.maps import resized
from mtl.tasks.metrics import Metrics
from mtl.tasks.number_losses import L1, BerHu, Huber, SiLog, SiLogOfMetres, root_of

Space = Literal["log", "linear", "bins"]
# The far end of the colours of pictures, in metres, where no maximum is set.
_FAR = 8.0


class Depth(EntryTask):
    """Metres along the optical axis.

    In the space `log` the head outputs log metres, so that equal ratios weigh alike; in `linear`, metres; in `bins`,
    the logits of bins whose edges lie evenly in log metres between `low` and `high`, of which the depth is the mean
    centre. Losses receive prediction and label "b 1 h w", both as log metres in `log`, else both as metres.
    """

    output: ClassVar[Literal["dense", "vector"]] = "dense"
    label_kind: LabelKind = "depth"
    goal = Goal("abs_rel", perfect=0.0)
    losses: ClassVar[Mapping[str, type[Loss]]] = {"l1": L1, "huber": Huber, "silog": SiLogOfMetres, "berhu": BerHu}
    losses_of_logs: ClassVar[Mapping[str, type[Loss]]] = {**losses, "silog": SiLog}

    def __init__(
        self,
        space: Space = "log",
        loss: Loss | None = None,
        low: float | None = None,
        high: float | None = None,
        num_bins: int = 64,
    ) -> None:
        """Args:
        space: What the head outputs.
        loss: What a pixel costs; the absolute difference if not given.
        low: Metres below which a label is none, and to which predictions are raised in metrics.
        high: The same above.
        num_bins: In the space `bins`, which needs `low` and `high`.
        """
        assert space != "bins" or (low and high), "bins lie between low and high"
        self.space = space
        self.entry_loss = loss or L1()
        self.low, self.high = low, high
        self.num_outputs = num_bins if space == "bins" else 1

    @property
    def more_metrics(self) -> Mapping[str, Callable[..., Metrics]]:
        return {name: partial(DepthMean, name, self.metres, self.labelled) for name in TERMS}

    def labelled(self, label: Tensor) -> Tensor:
        """Which pixels have a label, "b 1 h w", bool."""
        mask = (label > 0) & (label < math.inf)
        if self.low is not None:
            mask &= label >= self.low
        return mask if self.high is None else mask & (label <= self.high)

    def metres(self, output: Tensor) -> Tensor:
        """The predicted depth, "b 1 h w", above 0."""
        predicted = self._raw(output)
        metres = predicted.exp() if self.space == "log" else predicted.clamp(min=1e-9)
        return metres if self.low is self.high is None else metres.clamp(self.low, self.high)

    def prediction(self, output: Tensor) -> Tensor:
        return self._raw(as_float(output))

    def _raw(self, output: Tensor) -> Tensor:
        if self.space != "bins":
            return output
        return (output.softmax(dim=1) * self._centres(output)).sum(dim=1, keepdim=True)

    def _centres(self, like: Tensor) -> Tensor:
        """Of each bin the middle between its edges' logarithms, as metres, "c 1 1"."""
        assert self.low and self.high
        step = math.log(self.high / self.low) / self.num_outputs
        numbers = torch.arange(self.num_outputs, dtype=like.dtype, device=like.device)
        return (math.log(self.low) + (numbers + 0.5) * step).exp().view(-1, 1, 1)

    def fit(self, label: Tensor) -> Tensor:
        """The constant that minimises the loss over all labelled pixels; for the default, their mean depth."""
        mask = self.labelled(label)
        values = as_float(label.flatten() if bool(mask.all()) else label[mask])
        best = self._best(values if len(values) else torch.ones(1))
        return self._logits(float(best)) if self.space == "bins" else best.float().reshape(1)

    def _best(self, values: Tensor) -> Tensor:
        """The best constant prediction for these metres, float64."""
        is_default = self.space == "log" and isinstance(self.entry_loss, L1)
        # A million pixels say as much as all.
        some = values[:: max(1, len(values) >> 20)]
        best = None if is_default else self.entry_loss.constant(some.log() if self.space == "log" else some)
        if best is not None:
            return torch.tensor(best, dtype=torch.float64)
        mean = values.double().mean()
        return mean.log() if self.space == "log" else mean

    def _logits(self, metres: float) -> Tensor:
        """Logits "c" of bins that rise or fall evenly and have this mean."""
        centres = self._centres(torch.zeros((), dtype=torch.float64)).flatten()
        place = torch.linspace(-1, 1, self.num_outputs, dtype=torch.float64)

        def excess(slope: float) -> Tensor:
            return ((slope * place).softmax(0) * centres).sum() - metres

        return (root_of(excess, torch.tensor([-1e3, 1e3])) * place).float()

    def entry_weights(self, label: Tensor) -> Tensor:
        return self.labelled(label)

    def stand_in(self, label: Tensor) -> Tensor:
        """1 metre where there is no label."""
        metres = as_float(torch.where(self.labelled(label), label, 1))
        return metres.log() if self.space == "log" else metres

    def marked(self, label: Tensor) -> Tensor:
        return self.stand_in(label).masked_fill(~self.labelled(label), torch.nan)

    def blank(self, num_images: int, size: tuple[int, int]) -> Tensor:
        return torch.zeros(num_images, 1, *size)

    def predict(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """Metres, "b 1 h w"."""
        return resized(self.metres(output.float()), size)

    def draw(self, values: Tensor, is_label: bool) -> Tensor:
        """From 0 to 8 metres, or to the set maximum, on a scale of colours."""
        from matplotlib import colormaps

        metres = (values if is_label else self.metres(values)).squeeze(1)
        return torch.from_numpy(colormaps["viridis"]((metres / (self.high or _FAR)).clamp(0, 1).numpy())[..., :3])

    def colour_scale(self) -> ColourScale:
        from matplotlib import colormaps

        colours = [tuple(map(float, colormaps["viridis"](place / 15)[:3])) for place in range(16)]
        return ColourScale(0.0, self.high or _FAR, "m", [(red, green, blue) for red, green, blue in colours])

    def metrics(self) -> DepthMetrics:
        return DepthMetrics(self.metres, self.labelled)

    def unlabelled(self, label: Tensor) -> Tensor:
        return torch.zeros_like(label)

    def bad_samples(self, label: Tensor) -> Tensor:
        """Samples with an infinite depth."""
        return label.isinf().flatten(1).any(dim=1)

    def check_labels(self, label: Tensor) -> None:
        if label.ndim != 4 or label.shape[1] != 1 or not label.dtype.is_floating_point:
            raise ValueError(f'expected floats of shape "n 1 h w", got {label.dtype} of shape {tuple(label.shape)}')
