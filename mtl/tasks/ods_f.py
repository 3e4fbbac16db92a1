"""ODS-F: the F of edges of the best threshold for the whole set, where an edge may lie a little off its place.

Martin et al. 2004 (doi 10.1109/TPAMI.2004.1273918). In their matching a pixel without a partner costs so much that as
many as possible are matched; theirs is an approximation in MATLAB, ours is exact. So our numbers are near theirs, and
not the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mtl.config import Strict
from mtl.tasks.metrics import Metrics
from mtl.tasks.thresholds import probability

if TYPE_CHECKING:
    import numpy as np

    Map = np.ndarray[Any, np.dtype[np.bool_]]

_NUM_THRESHOLDS = 99


class OdsF(Metrics):
    """For each threshold: true edge pixels, predicted ones, and pairs of both that are matched, int64 "3 t".

    It is computed on the CPU, image by image, and is slow.
    """

    class Options(Strict):
        max_distance: Annotated[float, Field(gt=0, lt=1)] = 0.0075

    higher = ("ods_f",)

    def __init__(self, max_distance: float = 0.0075) -> None:
        """Args:
        max_distance: How far a predicted edge may lie from the true one, as a share of the image's diagonal; papers
            take 0.0075 for PASCAL-Context and 0.011 for NYUD.

        Raises:
            ModuleNotFoundError: scipy or scikit-image is missing.
        """
        _check_libraries()
        self._max_distance = max_distance
        self.counts = torch.zeros(3, _NUM_THRESHOLDS, dtype=torch.int64)

    def update(self, output: Tensor, label: Tensor) -> None:
        """Predictions are thinned to lines of one pixel's width; labels are taken as they are."""
        score, truth = probability(output, label).cpu(), label.cpu()
        for each, target in zip(score, truth, strict=True):
            is_labelled = (target == 0) | (target == 1)
            if is_labelled.any():
                self.counts += self._of_image(each.where(is_labelled, 0.0), target == 1)

    def _of_image(self, score: Tensor, truth: Tensor) -> Tensor:
        radius = self._max_distance * (score.shape[0] ** 2 + score.shape[1] ** 2) ** 0.5
        num_true, columns = int(truth.sum()), list[tuple[int, int, int]]()
        before: Tensor | None = None
        for number in range(1, _NUM_THRESHOLDS + 1):
            answer = score >= number / (_NUM_THRESHOLDS + 1)
            if before is not None and torch.equal(answer, before):
                columns.append(columns[-1])
                continue
            predicted, before = thinned(answer.numpy()), answer
            columns.append((num_true, int(predicted.sum()), num_matched(predicted, truth.numpy(), radius)))
        return torch.tensor(columns).T

    def state(self) -> list[Tensor]:
        return [self.counts]

    def load_state(self, state: Sequence[Tensor]) -> None:
        (self.counts,) = state

    def compute(self) -> dict[str, float]:
        """`ods_f`: the largest 2 PR / (P + R) over thresholds; NaN without a true edge."""
        true, predicted, matched = self.counts.double()
        if not true.any():
            return {"ods_f": torch.nan}
        return {"ods_f": (2 * matched / (true + predicted)).max().item()}


def thinned(edges: Map) -> Map:
    """Lines of one pixel's width.

    Args:
        edges: "h w", bool.
    """
    from skimage.morphology import thin

    thin_edges: Map = thin(edges)  # type: ignore[no-untyped-call]
    return thin_edges


def num_matched(predicted: Map, true: Map, radius: float) -> int:
    """The most pairs of a predicted and a true pixel not further apart than `radius`, each pixel in one pair.

    Args:
        predicted: "h w", bool.
        true: "h w", bool.
        radius: In pixels.
    """
    import numpy as np
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_bipartite_matching
    from scipy.spatial import cKDTree

    places, targets = np.argwhere(predicted), np.argwhere(true)
    if not len(places) or not len(targets):
        return 0
    near = cKDTree(places).query_ball_tree(cKDTree(targets), radius)
    ends = np.concatenate([[0], np.cumsum([len(each) for each in near])])
    columns = np.concatenate([np.asarray(each, dtype=np.int64) for each in near])
    graph = csr_matrix((np.ones(len(columns)), columns, ends), shape=(len(places), len(targets)))
    return int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())


def _check_libraries() -> None:
    """Raises `ModuleNotFoundError` if what the metric is computed with is missing."""
    for package, module in (("scipy", "scipy"), ("scikit-image", "skimage")):
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            message = f"needs the extra `research` (scipy, scikit-image); install it with: pip install {package}"
            raise ModuleNotFoundError(message) from error
