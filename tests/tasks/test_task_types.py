"""What holds for every task type with every loss: missing labels, parts of a batch, trivial predictors, NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtl.tasks import Task
from task_examples import NAN, SIZE, TYPES, example

EVERY = pytest.mark.parametrize("name", TYPES)
SEEDS = st.integers(0, 10_000)


def gradient(task: Task, output: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient by the output."""
    leaf = output.clone().requires_grad_()
    loss = task.loss(leaf, label)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@EVERY
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_images_without_a_label_change_neither_the_loss_nor_the_gradient_of_the_others(name: str, seed: int) -> None:
    task, output, label = example(name, seed)
    partly = label.clone()
    partly[[0, 3]] = task.unlabelled(label)[[0, 3]]
    rest = [1, 2, 4]
    loss, whole = gradient(task, output, partly)
    expected, part = gradient(task, output[rest], label[rest])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(whole[rest], part)
    assert not whole[[0, 3]].any()


@EVERY
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_the_mean_of_parts_by_weight_is_the_loss_of_the_whole(name: str, seed: int) -> None:
    task, output, label = example(name, seed)
    assume(bool(task.weight(label) > 0))
    losses, weights, gradients = [], [], []
    for part in (slice(0, 1), slice(1, 3), slice(3, 5)):
        loss, gradient_of_part = gradient(task, output[part], label[part])
        losses.append(loss)
        gradients.append(gradient_of_part)
        weights.append(task.weight(label[part]))
    total = sum(weights, torch.zeros(()))
    loss, whole = gradient(task, output, label)
    assert all(weight.dtype == torch.float64 and weight.shape == () for weight in weights)
    torch.testing.assert_close(total, task.weight(label))
    torch.testing.assert_close(
        sum(w * each for w, each in zip(weights, losses, strict=True)) / total, loss, rtol=1e-6, atol=1e-9
    )
    joined = torch.cat([w * each / total for w, each in zip(weights, gradients, strict=True)])
    torch.testing.assert_close(joined, whole, rtol=1e-6, atol=1e-9)


@EVERY
def test_each_image_adds_its_own_gradient(name: str) -> None:
    task, output, label = example(name, 7)
    _, whole = gradient(task, output, label)
    total = task.weight(label)
    for image in range(len(output)):
        _, own = gradient(task, output[image : image + 1], label[image : image + 1])
        expected = own[0] * task.weight(label[image : image + 1]) / total
        torch.testing.assert_close(whole[image], expected, rtol=1e-6, atol=1e-9)


@EVERY
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    if name.endswith("berhu"):
        pytest.skip("its threshold depends on the errors, and is a constant for the gradient")
    task, output, label = example(name, 3, num=2)
    _, exact = gradient(task, output, label)
    step = 1e-6 * torch.randn(output.shape, dtype=torch.float64)
    numeric = (task.loss(output + step, label) - task.loss(output - step, label)) / 2
    assert float((exact * step).sum()) == pytest.approx(float(numeric), rel=2e-3, abs=1e-11)


@EVERY
def test_without_any_label_loss_gradient_and_weight_are_zero_and_metrics_nan(name: str) -> None:
    task, output, label = example(name)
    missing = task.unlabelled(label)
    loss, zero = gradient(task, output, missing)
    assert loss == 0 and not zero.any() and zero.isfinite().all() and task.weight(missing) == 0
    metrics = task.metrics()
    metrics.update(output, missing)
    assert all(math.isnan(value) for value in metrics.compute().values())
    assert all(math.isnan(value) for value in task.metrics().compute().values())


@EVERY
def test_losses_of_half_precision_are_float32_and_finite(name: str) -> None:
    task, output, label = example(name)
    label = label.float() if label.is_floating_point() else label
    loss, _ = gradient(task, output.bfloat16(), label)
    assert loss.dtype == torch.float32 and loss.isfinite()


@EVERY
def test_metrics_of_parts_add_up_also_through_their_state(name: str) -> None:
    task, output, label = example(name, 5)
    whole, parts = task.metrics(), []
    whole.update(output, label)
    for part in (slice(0, 2), slice(2, 5)):
        parts.append(task.metrics())
        parts[-1].update(output[part], label[part])
    parts.append(task.metrics())  # a process without images
    summed = task.metrics()
    for one, *each in zip(summed.parts, *(part.parts for part in parts), strict=True):
        tensors_of = zip(*(part.state() for part in each), strict=True)
        one.load_state([sum(tensors[1:], tensors[0]) for tensors in tensors_of])
    assert summed.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert {*whole.higher, *whole.lower} == whole.compute().keys()


@EVERY
def test_nan_outputs_are_never_better_than_the_trivial_predictor(name: str) -> None:
    task, output, label = example(name, 6)
    worst, trivial = task.metrics(), task.metrics()
    worst.update(torch.full_like(output, NAN), label)
    trivial.update(task.constant_output(task.fit(label), len(label), SIZE), label)
    goal = task.goal
    value, constant = worst.compute()[goal.metric], trivial.compute()[goal.metric]
    assert not math.isnan(value) and math.isfinite(constant)
    assert goal.skill(value, constant) <= 0


@EVERY
def test_a_nan_output_without_a_label_does_not_count(name: str) -> None:
    task, output, label = example(name, 6)
    partly = label.clone()
    partly[0] = task.unlabelled(label)[0]
    spoilt = output.clone()
    spoilt[0] = NAN
    one, other = task.metrics(), task.metrics()
    one.update(spoilt, partly)
    other.update(output[1:], label[1:])
    assert one.compute() == pytest.approx(other.compute(), rel=1e-12)


# Constants that are fitted by another rule, see docs/trivial.md.
_BY_ANOTHER_RULE = ("berhu", "silog", "smoothed", "focal", "weighted", "balanced", "smooth_l1")


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in TYPES
        if not name.startswith("segmentation")
        and not name.endswith(_BY_ANOTHER_RULE)
        and name not in ("depth, log, l1", "normals, chord", "normals, l1")
    ],
)
def test_no_other_constant_has_a_lower_loss_than_the_fitted_one(name: str) -> None:
    task, _, label = example(name, 8, num=40)
    fitted = task.fit(label).double()

    def loss(constant: Tensor) -> float:
        return float(task.loss(task.constant_output(constant, len(label), SIZE), label))

    for size in (0.01, 0.1, 1.0):
        for _ in range(5):
            assert loss(fitted + size * torch.randn(fitted.shape)) >= loss(fitted) - 1e-7


@EVERY
def test_labels_are_checked_and_drawn(name: str) -> None:
    task, output, label = example(name)
    task.check_labels(label)
    task.check_labels(task.unlabelled(label))
    assert not task.bad_samples(label).any() and not task.bad_samples(task.unlabelled(label)).any()
    for values, is_label in ((label, True), (output.float(), False)):
        if task.output == "dense":
            picture = task.draw(values, is_label)
            assert picture.ndim == 4 and picture.shape[0] == len(label) and picture.shape[-1] in (1, 3)
            assert float(picture.nan_to_num().min()) >= 0 and float(picture.nan_to_num().max()) <= 1
        else:
            assert len(task.caption(values, is_label)) == len(label)
