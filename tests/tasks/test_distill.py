"""`distill` against numpy in float64: losses, gradients, metrics and constants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mtl.tasks import Distill
from mtl.tasks.distill import SmoothL1

Array = NDArray[np.float64]


def cosines(p: Array, y: Array) -> Array:
    return np.array([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(p, y, strict=True)])


@pytest.fixture
def vectors() -> tuple[Array, Array]:
    rng = np.random.default_rng(1)
    return 3 * rng.normal(size=(20, 7)), 2 * rng.normal(size=(20, 7)) + 1


def test_each_loss_is_the_mean_over_images(vectors: tuple[Array, Array]) -> None:
    p, y = vectors
    error = np.abs(p - y)
    expected = {
        "cosine": np.mean(1 - cosines(p, y)),
        "mse": np.mean(error**2),
        "smooth_l1": np.mean(np.where(error < 0.5, error**2, error - 0.25)),
    }
    assert expected.keys() == Distill.losses.keys()
    for name, kind in Distill.losses.items():
        task = Distill(7, SmoothL1(beta=0.5) if name == "smooth_l1" else kind())
        assert float(task.loss(torch.from_numpy(p), torch.from_numpy(y))) == pytest.approx(expected[name], rel=1e-12)
    assert float(Distill(7).loss(torch.from_numpy(p), torch.from_numpy(y))) == pytest.approx(expected["cosine"])


def test_the_gradient_of_the_cosine_distance_is_the_one_worked_out_by_hand() -> None:
    # d/dp (1 - p y / (|p| |y|)) at p = (3, 4), y = (0, 2): -(y / |y| - (p / |p|) cos) / |p|, cos = 0.8.
    output = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    loss = Distill(2).loss(output, torch.tensor([[0.0, 2.0]], dtype=torch.float64))
    loss.backward()
    assert loss.item() == pytest.approx(0.2)
    assert output.grad is not None and output.grad[0].tolist() == pytest.approx([0.48 / 5, -0.36 / 5])


def test_the_metrics_of_a_set_are_those_of_numpy_whatever_the_batches(vectors: tuple[Array, Array]) -> None:
    p, y = vectors
    metrics = Distill(7).metrics()
    for part in (slice(0, 3), slice(3, 20)):
        metrics.update(torch.from_numpy(p[part]), torch.from_numpy(y[part]))
    assert metrics.compute() == pytest.approx({"cosine": cosines(p, y).mean(), "mse": ((p - y) ** 2).mean()}, rel=1e-12)


def test_a_perfect_model_has_skill_one_and_an_output_of_nan_is_the_worst() -> None:
    label = torch.randn(5, 4)
    for output, expected in ((2 * label, 1.0), (torch.full_like(label, torch.nan), -1.0), (-label, -1.0)):
        metrics = Distill(4).metrics()
        metrics.update(output, label)
        assert metrics.compute()["cosine"] == pytest.approx(expected)
    assert Distill.goal.skill(1.0, 0.3) == 1


def test_the_constant_is_the_mean_embedding_and_for_the_cosine_that_of_unit_vectors(
    vectors: tuple[Array, Array],
) -> None:
    _, y = vectors
    label = torch.from_numpy(y).float()
    unit = y / np.linalg.norm(y, axis=1, keepdims=True)
    assert Distill(7).fit(label).tolist() == pytest.approx(unit.mean(axis=0).tolist(), rel=1e-5)
    for name in ("mse", "smooth_l1"):
        assert Distill(7, Distill.losses[name]()).fit(label).tolist() == pytest.approx(
            y.mean(axis=0).tolist(), rel=1e-5
        )


def test_the_constant_of_many_embeddings_is_that_of_all() -> None:
    label = torch.randn(20_000, 3)
    mean = label.double().mean(dim=0).float()
    torch.testing.assert_close(Distill(3, Distill.losses["mse"]()).fit(label), mean, rtol=1e-6, atol=1e-9)


def test_a_vector_of_zeros_has_a_finite_gradient() -> None:
    output = torch.zeros(2, 3, requires_grad=True)
    Distill(3).loss(output, torch.ones(2, 3)).backward()
    assert output.grad is not None and output.grad.isfinite().all()


def test_labels_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r'floats of shape "n 3", got torch.float32 of shape \(2, 4\)'):
        Distill(3).check_labels(torch.zeros(2, 4))
