"""Each task type with each of its losses: outputs, and labels of which some entries are missing, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from mtl.tasks import (
    Classification,
    Depth,
    Distill,
    Edges,
    Keypoints,
    MultiLabel,
    Normals,
    Ordinal,
    Regression,
    Saliency,
    Segmentation,
    Task,
)
from mtl.tasks.class_losses import CrossEntropy, Focal
from mtl.tasks.loss import Loss

NAN = float("nan")
SIZE = (8, 12)
NUM = 5


_CLASS_LOSSES: dict[str, Callable[[], Loss]] = {
    "cross_entropy": CrossEntropy,
    "smoothed": lambda: CrossEntropy(label_smoothing=0.2),
    "weighted": lambda: CrossEntropy(class_weights=[1.0, 2.0, 0.5]),
    "balanced": lambda: CrossEntropy(class_weights="balanced"),
    "focal": lambda: Focal(gamma=1.5, class_weights=[1.0, 2.0, 0.5]),
}

TYPES: dict[str, Callable[[], Task]] = {
    **{f"segmentation, {name}": lambda make=make: Segmentation(3, loss=make()) for name, make in _CLASS_LOSSES.items()},
    **{
        f"classification, {name}": lambda make=make: Classification(3, loss=make())
        for name, make in _CLASS_LOSSES.items()
    },
    **{
        f"depth, {space}, {name}": lambda space=space, kind=kind: Depth(space, kind(), 0.5, 10.0, 8)
        for space, losses in (("log", Depth.losses_of_logs), ("linear", Depth.losses), ("bins", Depth.losses))
        for name, kind in losses.items()
    },
    **{f"normals, {name}": lambda kind=kind: Normals(kind()) for name, kind in Normals.losses.items()},
    **{f"ordinal, {name}": lambda kind=kind: Ordinal(4, loss=kind()) for name, kind in Ordinal.losses.items()},
    **{f"multilabel, {name}": lambda kind=kind: MultiLabel(3, kind()) for name, kind in MultiLabel.losses.items()},
    **{f"regression, {name}": lambda kind=kind: Regression(2, 3.0, kind()) for name, kind in Regression.losses.items()},
    **{f"edges, {name}": lambda kind=kind: Edges(loss=kind()) for name, kind in Edges.losses.items()},
    **{f"saliency, {name}": lambda kind=kind: Saliency(loss=kind()) for name, kind in Saliency.losses.items()},
    **{f"distill, {name}": lambda kind=kind: Distill(3, kind()) for name, kind in Distill.losses.items()},
    "keypoints": lambda: Keypoints(3, SIZE),
}


def example(name: str, seed: int = 0, num: int = NUM, share_missing: float = 0.3) -> tuple[Task, Tensor, Tensor]:
    """A task that is fitted, outputs, and labels: of each kind that has several entries an image, some are missing.

    Args:
        name: One of `TYPES`.
        seed: Of the random numbers.
        num: How many images.
        share_missing: How many entries have no label.
    """
    torch.manual_seed(seed)
    task = TYPES[name]()
    shape = (num, task.num_outputs, *SIZE) if task.output == "dense" else (num, task.num_outputs)
    output = torch.randn(shape, dtype=torch.float64)
    if name.startswith("depth, linear"):
        output = output.abs() + 0.6
    label, entries = _label(name.split(",")[0], num)
    missing = task.unlabelled(label)
    gone = torch.rand(entries) < share_missing
    label = torch.where(gone.view(*entries, *[1] * (label.ndim - len(entries))), missing, label)
    task.fit(label)
    return task, output, label


def _label(kind: str, num: int) -> tuple[Tensor, tuple[int, ...]]:
    """A full label, and the shape of what of it may be missing, with which it can be broadcast."""
    if kind == "segmentation":
        return torch.randint(0, 3, (num, *SIZE)), (num, *SIZE)
    if kind in ("edges", "saliency"):
        return torch.randint(0, 2, (num, *SIZE)), (num, *SIZE)
    if kind in ("classification", "ordinal"):
        return torch.randint(0, 3 if kind == "classification" else 4, (num,)), (num,)
    if kind == "depth":
        return 0.6 + 5 * torch.rand(num, 1, *SIZE, dtype=torch.float64), (num, 1, *SIZE)
    if kind == "normals":
        return functional.normalize(torch.randn(num, 3, *SIZE, dtype=torch.float64), dim=1), (num, 1, *SIZE)
    if kind == "multilabel":
        return torch.randint(0, 2, (num, 3)).double(), (num, 3)
    if kind == "regression":
        return 5 * torch.randn(num, 2, dtype=torch.float64), (num, 2)
    if kind == "distill":
        return 5 * torch.randn(num, 3, dtype=torch.float64), (num, 1)
    assert kind == "keypoints"
    place = torch.rand(num, 3, 2, dtype=torch.float64) * torch.tensor([SIZE[1], SIZE[0]])
    return torch.cat([place, torch.ones(num, 3, 1, dtype=torch.float64)], dim=2), (num, 3)
