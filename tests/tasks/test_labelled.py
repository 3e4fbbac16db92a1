"""Which pixels are labelled, by the definition: finite, and not zero, or above zero."""

from __future__ import annotations

import math

import pytest
import torch

from mtl.tasks.depth import Depth
from mtl.tasks.normals import Normals
from mtl.tasks.normals_losses import labelled_normals

VALUES = torch.tensor([0.0, -0.0, 0.5, -0.5, math.nan, math.inf, -math.inf, 1e-40, 3e38])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normals_are_labelled_where_all_axes_are_finite_and_one_is_not_zero(dtype: torch.dtype) -> None:
    label = torch.cartesian_prod(VALUES, VALUES, VALUES).T.reshape(1, 3, 27, 27).to(dtype)
    assert torch.equal(labelled_normals(label), label.isfinite().all(dim=1) & (label != 0).any(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_depth_is_labelled_where_it_is_finite_and_above_zero(dtype: torch.dtype) -> None:
    label = VALUES.reshape(1, 1, 3, 3).to(dtype)
    assert torch.equal(Depth().labelled(label), label.isfinite() & (label > 0))


def test_what_is_fitted_is_the_same_whether_all_or_some_are_labelled() -> None:
    generator = torch.Generator().manual_seed(0)
    depth, normals = (torch.rand(4, channels, 8, 8, generator=generator) + 0.1 for channels in (1, 3))
    lacking = torch.zeros_like(depth[:1]), torch.zeros_like(normals[:1])
    for task, label, none in ((Depth(), depth, lacking[0]), (Normals(), normals, lacking[1])):
        assert torch.equal(task.fit(label), task.fit(torch.cat([label, none])))
