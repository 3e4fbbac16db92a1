"""`keypoints`: the places of named points in an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mtl.tasks.base import ColourScale, Goal, LabelKind
from mtl.tasks.entries import EntryTask
from mtl.tasks.loss import Loss, as_float
from mtl.tasks.metrics import Metrics
from mtl.tasks.number_losses import Mse

# Pixels a side of a heat map's cell; a point is a Gaussian of this many cells (the paper's 2, at 64 x 48).
STRIDE, SIGMA = 4, 2.0
_PCK = 0.2


def cells_of(output: Tensor) -> Tensor:
    """Heat maps of the head's output "b k h w": the mean of each cell's pixels, "b k rows columns"."""
    return functional.avg_pool2d(output, STRIDE, ceil_mode=True, count_include_pad=False)


def heat_maps(label: Tensor, rows: int, columns: int) -> Tensor:
    """Gaussians around points, 1 at their centres.

    Args:
        label: "b k 3", column and row in pixels from the image's corner, and visibility.
        rows: Cells of the maps from top to bottom.
        columns: Cells from left to right.

    Returns:
        "b k rows columns".
    """

    def along(place: Tensor, num: int) -> Tensor:
        centres = torch.arange(num, device=label.device, dtype=label.dtype) + 0.5
        return (-(centres - place[..., None] / STRIDE).square() / (2 * SIGMA**2)).exp()

    return along(label[..., 1], rows)[..., :, None] * along(label[..., 0], columns)[..., None, :]


def points_of(output: Tensor) -> Tensor:
    """Column and row in pixels, "b k 2": the middle of the highest cell, a quarter cell towards its higher neighbour.

    Newell et al., arXiv 1603.06937, section 3.3. Of equal cells it is the first, so that a flat map's point is the
    image's upper left corner.
    """
    maps = cells_of(output)
    rows, columns = maps.shape[-2:]
    best = maps.flatten(2).argmax(dim=2)
    place = [best % columns, best // columns]
    found = []
    for axis, num in ((0, columns), (1, rows)):
        sides = []
        for step in (-1, 1):
            shifted = [each.clone() for each in place]
            shifted[axis] = (place[axis] + step).clamp(0, num - 1)
            sides.append(maps.flatten(2).gather(2, (shifted[1] * columns + shifted[0])[..., None])[..., 0])
        found.append((place[axis] + 0.5 + 0.25 * (sides[1] - sides[0]).sign()) * STRIDE)
    return torch.stack(found, dim=-1)


class Pck(Metrics):
    """How many labelled points there are, and how many are found: int64."""

    higher = ("pck",)

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def update(self, output: Tensor, label: Tensor) -> None:
        is_visible, place = label[..., 2] > 0, label[..., :2].double()
        far = torch.inf
        box = place.where(is_visible[..., None], -far).amax(dim=1) - place.where(is_visible[..., None], far).amin(dim=1)
        # The box of a single point has no size; then the image counts.
        size = torch.where(is_visible.sum(dim=1) > 1, box.amax(dim=1), float(max(output.shape[-2:])))
        error = (points_of(output.double()) - place).square().sum(dim=-1).sqrt()
        near = (error <= _PCK * size[:, None]) & ~output.isnan().flatten(2).any(dim=2)
        counts = torch.stack([is_visible.sum(), (is_visible & near).sum()])
        self.counts = counts if self.counts is None else self.counts + counts

    def state(self) -> list[Tensor]:
        return [torch.zeros(2, dtype=torch.int64) if self.counts is None else self.counts]

    def load_state(self, state: Sequence[Tensor]) -> None:
        (self.counts,) = state

    def compute(self) -> dict[str, float]:
        """`pck`: share of points found to within 0.2 of the longer side of the box around the image's points."""
        num, found = self.state()[0].tolist()
        return {"pck": found / num if num else torch.nan}


class Keypoints(EntryTask):
    """Places of points, as the maxima of heat maps; a point's loss is the mean over its map.

    Losses receive heat maps "b k rows columns", predicted and true, and give the same shape.
    """

    output: ClassVar[Literal["dense", "vector"]] = "dense"
    label_kind: LabelKind = "points"
    goal = Goal("pck", perfect=1.0)
    losses: ClassVar[Mapping[str, type[Loss]]] = {"mse": Mse}

    def __init__(self, num_points: int, size: tuple[int, int], loss: Loss | None = None) -> None:
        """Args:
        num_points: How many points.
        size: Height and width of an image in pixels.
        loss: What a cell of a heat map costs.
        """
        self.num_outputs = num_points
        self.cells = (-(-size[0] // STRIDE), -(-size[1] // STRIDE))
        self.entry_loss = loss or Mse()

    def fit(self, label: Tensor) -> Tensor:
        """The mean of each point's heat maps; 0 without a label."""
        is_visible = label[..., 2] > 0
        means = torch.cat([heat_maps(part, *self.cells).mean(dim=(2, 3)) for part in torch.split(as_float(label), 64)])
        return ((means.double() * is_visible).sum(dim=0) / is_visible.sum(dim=0).clamp(min=1)).float()

    def prediction(self, output: Tensor) -> Tensor:
        return cells_of(as_float(output))

    def entry_weights(self, label: Tensor) -> Tensor:
        return (label[..., 2] > 0)[..., None, None].expand(-1, -1, *self.cells)

    def stand_in(self, label: Tensor) -> Tensor:
        """An empty map where there is no label."""
        is_visible = label[..., 2] > 0
        return heat_maps(as_float(label).where(is_visible[..., None], 0), *self.cells) * is_visible[..., None, None]

    def marked(self, label: Tensor) -> Tensor:
        return self.stand_in(label).masked_fill((label[..., 2] <= 0)[..., None, None], torch.nan)

    def blank(self, num_images: int, size: tuple[int, int]) -> Tensor:  # noqa: ARG002  one signature for all
        return torch.zeros(num_images, self.num_outputs, 3)

    def predict(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """Column and row in pixels of an image of that size, and the height of the map there, "b k 3"."""
        factors = output.new_tensor([size[1] / output.shape[-1], size[0] / output.shape[-2]], dtype=torch.float32)
        heights = cells_of(output.float()).flatten(2).amax(dim=2)
        return torch.cat([points_of(output.float()) * factors, heights[..., None]], dim=-1)

    def as_label(self, prediction: Tensor) -> Tensor:
        """All points as visible."""
        return torch.cat([prediction[..., :2], torch.ones_like(prediction[..., 2:])], dim=-1)

    def draw(self, values: Tensor, is_label: bool) -> Tensor:
        """All heat maps as one, from black to white."""
        maps = self.stand_in(values) if is_label else self.prediction(values)
        return maps.amax(dim=1).clamp(0, 1).nan_to_num()[..., None]

    def colour_scale(self) -> ColourScale:
        return ColourScale(0.0, 1.0, "heat", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0)])

    def metrics(self) -> Pck:
        return Pck()

    def unlabelled(self, label: Tensor) -> Tensor:
        return torch.zeros_like(label)

    def bad_samples(self, label: Tensor) -> Tensor:
        """Samples with a labelled point whose place is NaN or infinite, or a visibility that is."""
        lost = (label[..., 2] > 0) & ~label[..., :2].isfinite().all(dim=-1)
        return (lost | ~label[..., 2].isfinite()).any(dim=1)

    def check_labels(self, label: Tensor) -> None:
        if label.ndim != 3 or tuple(label.shape[1:]) != (self.num_outputs, 3) or not label.dtype.is_floating_point:
            expected = f'expected floats of shape "n {self.num_outputs} 3" (column, row, visibility)'
            raise ValueError(f"{expected}, got {label.dtype} of shape {tuple(label.shape)}")
