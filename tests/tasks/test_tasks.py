"""Losses and metrics, against values by hand, reference formulas in float64, and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.classification import MulticlassJaccardIndex

from mtl.config import RunConfig
from mtl.tasks import Classification, Depth, Edges, Normals, Saliency, Segmentation, Task, build_tasks
from mtl.tasks.class_losses import surprise_of
from mtl.tasks.normals_losses import labelled_normals
from runs import TINY

NAN = float("nan")


def logits_for(classes: Tensor, num_classes: int) -> Tensor:
    """Logits whose argmax is the given class, "b c ..."."""
    return functional.one_hot(classes, num_classes).movedim(-1, 1).float()


def test_segmentation_metrics_by_hand() -> None:
    truth = torch.tensor([[[0, 0, 1, 1], [2, 2, 255, 255]]])
    predicted = torch.tensor([[[0, 1, 1, 1], [2, 0, 0, 1]]])
    metrics = Segmentation(4).metrics()
    metrics.update(logits_for(predicted, 4), truth)
    # Class 0: 1 hit, union 3. Class 1: 2 hits, union 3. Class 2: 1 hit, union 2. Class 3 is nowhere. 6 labelled pixels.
    assert metrics.compute() == pytest.approx({"miou": (1 / 3 + 2 / 3 + 1 / 2) / 3, "pixel_accuracy": 4 / 6})


def test_the_predicted_class_is_the_first_of_the_highest_and_wrong_where_one_is_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    # Few values: many ties.
    output = torch.randint(-2, 2, (3, 6, 5, 7), generator=generator).float()
    output[0, 2, 0], output[1, :, 1], output[2, 3, 2] = NAN, -torch.inf, torch.inf
    label = torch.randint(0, 6, (3, 5, 7), generator=generator)
    expected = torch.where(output.isnan().any(dim=1), (label + 1) % 6, output.argmax(dim=1))
    assert torch.equal(Segmentation(6).metrics().predict(output, label), expected)


def test_miou_is_that_of_torchmetrics_over_the_whole_set() -> None:
    generator = torch.Generator().manual_seed(0)
    metrics = Segmentation(5).metrics()
    reference = MulticlassJaccardIndex(5, ignore_index=4, average="macro")
    for size in (7, 3, 1):
        truth = torch.randint(0, 5, (size, 6, 6), generator=generator)
        output = torch.randn(size, 5, 6, 6, generator=generator)
        output[:, 4] = -9  # torchmetrics counts a prediction of the ignored class, ours never makes one here
        reference.update(output, truth)
        metrics.update(output, torch.where(truth == 4, 255, truth))
    assert metrics.compute()["miou"] == pytest.approx(float(reference.compute()), abs=1e-6)


def test_cross_entropy_of_maps_and_its_gradient_are_those_of_torch_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (3, 4, 6), generator=generator)
    # Far apart and shifted, as logits of an overconfident head are.
    values = 40 * torch.randn(3, 5, 4, 6, generator=generator) + 1e4
    weights = torch.rand(3, 4, 6, generator=generator)
    for layout in (torch.contiguous_format, torch.channels_last):
        output = values.contiguous(memory_format=layout).requires_grad_()
        surprise = surprise_of(output, label)
        (gradient,) = torch.autograd.grad((surprise * weights).sum(), output, create_graph=True)
        truth = values.double().requires_grad_()
        expected = functional.cross_entropy(truth, label, reduction="none")
        (of_truth,) = torch.autograd.grad((expected * weights.double()).sum(), truth)
        torch.testing.assert_close(surprise.double(), expected, rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(gradient.double(), of_truth, rtol=1e-5, atol=1e-6)
        plain = torch.autograd.grad((surprise_of(output, label) * weights).sum(), output)[0]
        torch.testing.assert_close(plain, gradient.detach(), rtol=1e-6, atol=1e-7)


def test_the_gradient_of_the_gradient_of_cross_entropy_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (2, 3, 3), generator=generator)
    output = torch.randn(2, 5, 3, 3, generator=generator, requires_grad=True)
    seconds = []
    for surprise in (surprise_of(output, label), functional.cross_entropy(output, label, reduction="none")):
        (first,) = torch.autograd.grad(surprise.square().sum(), output, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), output)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-5)


def test_cross_entropy_of_a_logit_that_is_nan_or_infinite_is_nan_where_it_is_and_nowhere_else() -> None:
    output = torch.zeros(1, 3, 1, 4)
    output[0, 1, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    surprise = surprise_of(output, torch.zeros(1, 1, 4, dtype=torch.int64))
    expected = functional.cross_entropy(output, torch.zeros(1, 1, 4, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(surprise, expected, equal_nan=True)
    assert surprise.isnan().tolist() == [[[True, True, False, False]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_normals_are_labelled_where_all_three_are_finite_and_one_is_not_zero(dtype: torch.dtype) -> None:
    values = [0.0, -0.0, 1.0, -1.0, 1e-7, torch.nan, torch.inf, -torch.inf]
    label = torch.cartesian_prod(*[torch.tensor(values, dtype=dtype)] * 3).T.reshape(1, 3, 1, -1)
    expected = label.isfinite().all(dim=1) & (label != 0).any(dim=1)
    assert torch.equal(labelled_normals(label), expected) and bool(expected.any())


def test_depth_metrics_by_hand_and_missing_depth_does_not_count() -> None:
    truth = torch.tensor([1.0, 2.0, 4.0, 0.0, NAN]).view(1, 1, 1, 5)
    metres = torch.tensor([1.1, 1.0, 4.0, 9.0, 9.0]).view(1, 1, 1, 5)
    metrics = Depth().metrics()
    metrics.update(metres.log(), truth)
    expected = {"abs_rel": (0.1 + 0.5 + 0) / 3, "rmse": math.sqrt((0.01 + 1.0 + 0) / 3), "delta1": 2 / 3}
    assert metrics.compute() == pytest.approx(expected, rel=1e-6)


def turned(degrees: list[float]) -> Tensor:
    """Unit vectors turned from z by these angles, "1 3 1 n"."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.sin(), 0 * angle, angle.cos()]).view(1, 3, 1, -1)


def test_normals_metrics_by_hand_and_missing_normals_do_not_count() -> None:
    angles = [0.0, 5.0, 11.0, 12.0, 25.0, 120.0, 180.0]
    output = 7.0 * turned([*angles, 90.0, 90.0])
    truth = turned([0.0] * 9)
    truth[..., 7], truth[..., 8] = 0, NAN
    metrics = Normals().metrics()
    metrics.update(output, truth)
    expected = {"mean": sum(angles) / 7, "median": 12.0, "within_11": 3 / 7, "within_22": 4 / 7, "within_30": 5 / 7}
    assert metrics.compute() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("threshold, name", [(11.25, "within_11"), (22.5, "within_22"), (30.0, "within_30")])
def test_shares_under_a_threshold_are_exact(threshold: float, name: str) -> None:
    metrics = Normals().metrics()
    metrics.update(turned([threshold - 1e-3, threshold + 1e-3]), turned([0.0, 0.0]))
    assert metrics.compute()[name] == 0.5


def test_accuracy_by_hand_and_missing_labels_do_not_count() -> None:
    metrics = Classification(3).metrics()
    metrics.update(logits_for(torch.tensor([0, 1, 2, 2]), 3), torch.tensor([0, 2, 2, -1]))
    assert metrics.compute() == {"accuracy": 2 / 3}


TASKS: dict[str, tuple[Task, Tensor, Tensor, Tensor]] = {
    # task, output, label, the same label with everything missing
    "segmentation": (
        Segmentation(3),
        torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)),
        torch.randint(0, 3, (4, 5, 5), generator=torch.Generator().manual_seed(2)),
        torch.full((4, 5, 5), 255),
    ),
    "classification": (
        Classification(3),
        torch.randn(4, 3, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0, 1, 2, -1]),
        torch.full((4,), -1),
    ),
    "depth": (
        Depth(),
        torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(1)),
        1 + torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(2)),
        torch.zeros(4, 1, 5, 5),
    ),
    "normals": (
        Normals(),
        torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)),
        functional.normalize(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(2)), dim=1),
        torch.full((4, 3, 5, 5), NAN),
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_metrics_of_two_parts_are_those_of_the_whole(name: str) -> None:
    task, output, label, _ = TASKS[name]
    whole, parts = task.metrics(), task.metrics()
    whole.update(output, label)
    parts.update(output[:1], label[:1])
    parts.update(output[1:], label[1:])
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_without_any_label_the_loss_is_zero_with_zero_gradient_and_metrics_are_nan(name: str) -> None:
    task, output, label, missing = TASKS[name]
    task.fit(label)
    leaf = output.clone().requires_grad_()
    loss = task.loss(leaf, missing)
    loss.backward()
    assert loss.item() == 0
    assert leaf.grad is not None and not leaf.grad.any() and leaf.grad.isfinite().all()
    metrics = task.metrics()
    metrics.update(output, missing)
    assert all(math.isnan(value) for value in metrics.compute().values())
    assert all(math.isnan(value) for value in task.metrics().compute().values())


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_label_changes_neither_loss_nor_gradient_elsewhere(name: str) -> None:
    task, output, label, missing = TASKS[name]
    task.fit(label)
    partly = label.clone()
    partly[0] = missing[0]
    leaf, rest = output.clone().requires_grad_(), output[1:].clone().requires_grad_()
    loss, without = task.loss(leaf, partly), task.loss(rest, label[1:])
    torch.autograd.backward([loss, without])
    torch.testing.assert_close(loss, without)
    assert leaf.grad is not None and rest.grad is not None
    torch.testing.assert_close(leaf.grad[1:], rest.grad)
    assert not leaf.grad[0].any()


@pytest.mark.parametrize("name", TASKS)
def test_the_gradient_of_the_loss_is_right(name: str) -> None:
    task, output, label, _ = TASKS[name]
    task.fit(label)
    part = output[:2].clone().requires_grad_()
    target = label[:2]

    def loss(x: Tensor) -> Tensor:
        return task.loss(x, target)

    loss(part).backward()
    assert part.grad is not None
    step = 1e-2 * torch.randn(part.shape, generator=torch.Generator().manual_seed(3))
    numeric = (loss(part.detach() + step) - loss(part.detach() - step)).item() / 2
    assert (part.grad * step).sum().item() == pytest.approx(numeric, rel=0.02, abs=2e-5)


@pytest.mark.parametrize("name", TASKS)
def test_losses_are_float32_and_finite_for_half_precision_outputs(name: str) -> None:
    task, output, label, _ = TASKS[name]
    task.fit(label)
    loss = task.loss(output.bfloat16(), label)
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_segmentation_weighs_classes_by_frequency_so_that_the_mean_pixel_weighs_one() -> None:
    label = torch.tensor([0] * 90 + [1] * 10).view(1, 10, 10)
    task = Segmentation(2, balance_power=0.5)
    task.fit(label)
    weight = task.class_weight
    assert weight is not None
    assert float(weight[1] / weight[0]) == pytest.approx(3.0, rel=1e-5)
    assert float(0.9 * weight[0] + 0.1 * weight[1]) == pytest.approx(1.0, rel=1e-5)


def test_constants_are_the_class_prior_the_mean_depth_and_the_mean_normal() -> None:
    prior = Classification(3).fit(torch.tensor([0, 0, 1, -1]))
    assert prior.exp().tolist() == pytest.approx(
        [2 / 3, 1 / 3, 1 / 3], rel=1e-6
    )  # never log 0: an absent class counts 1
    assert Depth().fit(torch.tensor([1.0, 3.0, 0.0, NAN]).view(1, 1, 2, 2)).exp().item() == pytest.approx(2.0)
    assert Normals().fit(turned([30.0, -30.0]).float()).tolist() == pytest.approx([0, 0, 1], abs=1e-6)


@pytest.mark.parametrize(
    "task, label, message",
    [
        (Segmentation(3), torch.full((1, 2, 2), 3), r"expected classes 0 to 2 \(num_classes: 3\) or 255 for none"),
        (Segmentation(3), torch.zeros(1, 2, 2), "expected whole numbers with 3 axes"),
        (Classification(3), torch.tensor([-2]), "got -2 to -2"),
        (Depth(), torch.ones(1, 2, 2), "expected floats of shape"),
        (Normals(), torch.ones(1, 1, 2, 2), "expected floats of shape"),
    ],
)
def test_labels_of_another_form_are_refused(task: Task, label: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.check_labels(label)


def test_skill_is_one_for_perfect_zero_for_trivial_and_signed() -> None:
    accuracy, error = Classification.goal, Depth.goal
    assert (accuracy.skill(1.0, 0.2), accuracy.skill(0.2, 0.2)) == (1, 0)
    assert accuracy.skill(0.6, 0.2) == pytest.approx(0.5) and accuracy.skill(0.0, 0.2) < 0
    assert error.skill(0.0, 0.4) == 1 and error.skill(0.1, 0.4) == pytest.approx(0.75) and error.skill(0.8, 0.4) == -1
    assert (accuracy.direction, error.direction) == ("higher", "lower")


def test_every_task_type_of_a_configuration_is_built() -> None:
    written = {
        "a": {"type": "segmentation", "num_classes": 4, "ignore_index": 9},
        "b": {"type": "depth"},
        "c": {"type": "normals"},
        "d": {"type": "classification", "num_classes": 5},
    }
    tasks = build_tasks(RunConfig.model_validate({**TINY, "tasks": written}))
    assert [(type(t).__name__, t.num_outputs, t.output) for t in tasks.values()] == [
        ("Segmentation", 4, "dense"),
        ("Depth", 1, "dense"),
        ("Normals", 3, "dense"),
        ("Classification", 5, "vector"),
    ]


@pytest.mark.parametrize("task", [Depth(), Depth(low=0.5, high=3.0), Edges(), Saliency()])
def test_a_colour_scale_has_the_colours_of_the_pictures(task: Task) -> None:
    scale = task.colour_scale()
    assert scale is not None
    values = torch.linspace(scale.low, scale.high, len(scale.colours), dtype=torch.float64)
    if isinstance(task, Depth):
        drawn = task.draw(values.view(1, 1, 1, -1), is_label=True)
    else:
        drawn = task.draw(torch.logit(values).view(1, 1, 1, -1), is_label=False).expand(-1, -1, -1, 3)
    assert [tuple(colour) for colour in drawn[0, 0].tolist()] == [pytest.approx(colour) for colour in scale.colours]


def test_maps_of_classes_and_directions_have_no_scale() -> None:
    assert Segmentation(3).colour_scale() is Normals().colour_scale() is None
