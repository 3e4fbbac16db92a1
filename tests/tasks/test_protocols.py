"""Protocols of published code bases, each against an independent implementation in numpy, image by image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl.config import ConfigError, RunConfig
from mtl.tasks import Depth, Edges, Metrics, Normals, Saliency, Segmentation, Task, build_tasks
from runs import TINY

NAN = float("nan")
TASKS = {
    "segmentation": {"type": "segmentation", "num_classes": 4},
    "depth": {"type": "depth"},
    "normals": {"type": "normals"},
    "saliency": {"type": "saliency"},
    "edges": {"type": "edges"},
}
BATCHES = (3, 2, 1)
SIZE = (24, 32)


def tasks_of(protocol: str, tasks: dict[str, Any] | None = None) -> dict[str, Task]:
    return build_tasks(RunConfig.model_validate({**TINY, "tasks": tasks or TASKS, "evaluate": {"protocol": protocol}}))


def batches(shape: tuple[int, ...], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(num, *shape, dtype=torch.float64) for num in BATCHES]


def measure(metrics: Metrics, outputs: list[Tensor], labels: list[Tensor]) -> dict[str, float]:
    for output, label in zip(outputs, labels, strict=True):
        metrics.update(output, label)
    return {name: value for name, value in metrics.compute().items() if "@" in name}


def depths() -> tuple[list[Tensor], list[Tensor]]:
    outputs = batches((1, *SIZE), 1)
    labels = [(0.5 * each).exp() * 2 for each in batches((1, *SIZE), 2)]
    for label in labels:
        label[torch.rand(label.shape) < 0.3] = 0
    labels[0][1], labels[1][0, 0, :3] = NAN, 20.0
    return outputs, labels


def normals() -> tuple[list[Tensor], list[Tensor]]:
    labels = [torch.nn.functional.normalize(each, dim=1) for each in batches((3, *SIZE), 3)]
    outputs = [label + 0.3 * noise for label, noise in zip(labels, batches((3, *SIZE), 4), strict=True)]
    for label in labels:
        label[(torch.rand(len(label), 1, *SIZE) < 0.3).expand_as(label)] = 0
    return outputs, labels


def classes(num: int, missing: bool = True) -> list[Tensor]:
    torch.manual_seed(5)
    labels = [torch.randint(0, num, (size, *SIZE)) for size in BATCHES]
    return [label.masked_fill(torch.rand(label.shape) < 0.2, 255) for label in labels] if missing else labels


def angle_between(output: Tensor, label: Tensor) -> np.ndarray[Any, Any]:
    """Degrees of all labelled pixels, by the scalar product."""
    a, b = (np.moveaxis(each.numpy(), 1, -1).reshape(-1, 3) for each in (output, label))
    valid = np.abs(b).sum(1) > 0
    a, b = a[valid], b[valid]
    return np.degrees(np.arccos(np.clip((a * b).sum(1) / np.linalg.norm(a, axis=1), -1, 1)))


def test_mtan_depth_is_a_mean_of_batch_means() -> None:
    outputs, labels = depths()
    found = measure(tasks_of("mtan")["depth"].every_metric(), outputs, labels)
    rows = []
    for output, label in zip(outputs, labels, strict=True):
        d = label.numpy()
        valid = np.nan_to_num(d) > 0
        error = np.abs(np.exp(output.numpy()[valid]) - d[valid])
        rows.append([error.mean(), (error / d[valid]).mean()])
    assert list(found.values()) == pytest.approx(np.mean(rows, axis=0), rel=1e-12)
    assert list(found) == ["abs_err@mtan", "rel_err@mtan"]


def test_mtan_normals_are_means_of_batch_means_and_medians() -> None:
    outputs, labels = normals()
    found = measure(tasks_of("mtan")["normals"].every_metric(), outputs, labels)
    rows = []
    for output, label in zip(outputs, labels, strict=True):
        angle = angle_between(output, label)
        rows.append([angle.mean(), np.median(angle), *[(angle < limit).mean() for limit in (11.25, 22.5, 30)]])
    assert list(found.values()) == pytest.approx(np.mean(rows, axis=0), rel=1e-9)
    pooled = np.median(np.concatenate([angle_between(*each) for each in zip(outputs, labels, strict=True)]))
    assert found["median@mtan"] != pytest.approx(pooled, rel=1e-6)


@pytest.mark.parametrize("protocol", ["mtan", "astmt", "invpt"])
def test_a_class_that_is_nowhere_makes_the_mean_nan_or_counts_zero(protocol: str) -> None:
    task = tasks_of(protocol)["segmentation"]
    outputs, labels = batches((4, *SIZE), 6), classes(3)
    for output in outputs:
        output[:, 3] = -99
    found = measure(task.every_metric(), outputs, labels)
    ious = []
    for number in range(4):
        both = either = 0
        for output, label in zip(outputs, labels, strict=True):
            said, valid = output.numpy().argmax(1) == number, label.numpy() != 255
            true = label.numpy() == number
            both += (said & true & valid).sum()
            either += ((said | true) & valid).sum()
        ious.append(both / either if either else 0.0)
    assert ious[3] == 0
    if protocol == "mtan":
        assert math.isnan(found["miou@mtan"])
        right = sum(int((o.argmax(1) == c).sum()) for o, c in zip(outputs, labels, strict=True))
        num = sum(int((c != 255).sum()) for c in labels)
        assert found["pixel_accuracy@mtan"] == right / num
    else:
        assert found == {f"miou@{protocol}": pytest.approx(np.mean(ious), rel=1e-12)}


@pytest.mark.parametrize("protocol", ["astmt", "invpt"])
def test_depth_and_normals_are_pooled(protocol: str) -> None:
    tasks = tasks_of(protocol)
    outputs, labels = depths()
    squares = [
        (np.exp(o.numpy()) - d.numpy())[np.nan_to_num(d.numpy()) > 0] ** 2 for o, d in zip(outputs, labels, strict=True)
    ]
    found = measure(tasks["depth"].every_metric(), outputs, labels)
    assert found == {f"rmse@{protocol}": pytest.approx(np.sqrt(np.concatenate(squares).mean()), rel=1e-12)}
    outputs, labels = normals()
    mean = np.concatenate([angle_between(*each) for each in zip(outputs, labels, strict=True)]).mean()
    names = ["mean@astmt", "rmse@astmt"] if protocol == "astmt" else ["mean@invpt"]
    found = measure(tasks["normals"].every_metric(), outputs, labels)
    assert found == {name: pytest.approx(mean, rel=1e-9) for name in names}


def saliency_maps() -> tuple[list[Tensor], list[Tensor]]:
    outputs, labels = batches((1, *SIZE), 7), classes(2)
    outputs[1][0], labels[1][0] = -5.0, 0  # says no everywhere, and is right
    labels[0][2] = 255
    return outputs, labels


def test_astmt_saliency_is_averaged_over_images_before_the_best_threshold() -> None:
    outputs, labels = saliency_maps()
    table = []
    for output, label in zip(torch.cat(outputs).numpy()[:, 0], torch.cat(labels).numpy(), strict=True):
        valid = label != 255
        if not valid.any():
            continue
        row = []
        for threshold in np.linspace(0.2, 0.9, 15):
            said, true = 1 / (1 + np.exp(-output[valid])) > threshold, label[valid] == 1
            both = (said & true).sum()
            iou = both / (said | true).sum() if (said | true).any() else 1.0
            row.append([iou, both / (said.sum() + 1e-12), both / (true.sum() + 1e-12)])
        table.append(row)
    iou, p, r = np.mean(table, axis=0).T
    expected = {"miou@astmt": iou.max(), "max_f@astmt": (2 * p * r / (p + r + 1e-12)).max()}
    assert measure(tasks_of("astmt")["saliency"].every_metric(), outputs, labels) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("protocol", ["astmt", "invpt"])
def test_the_loss_of_edges_takes_probabilities_for_logits(protocol: str) -> None:
    outputs, labels = saliency_maps()
    logits, label = torch.cat(outputs).numpy()[:, 0], torch.cat(labels).numpy()
    valid = label != 255
    share = 1 / (1 + np.exp(-1 / (1 + np.exp(-logits[valid]))))
    rows = np.where(label[valid] == 1, -0.95 * np.log(share), -0.05 * np.log(1 - share))
    found = measure(tasks_of(protocol)["edges"].every_metric(), outputs, labels)
    assert found == {f"loss@{protocol}": pytest.approx(rows.mean(), rel=1e-9)}
    # The ends of the range: a certain no is right, or wrong.
    right, wrong = (tasks_of(protocol)["edges"].every_metric() for _ in range(2))
    sure = torch.full((1, 1, *SIZE), 99.0, dtype=torch.float64)
    assert measure(right, [-sure], [torch.zeros(1, *SIZE)])[f"loss@{protocol}"] == pytest.approx(0.05 * math.log(2))
    assert measure(wrong, [-sure], [torch.ones(1, *SIZE)])[f"loss@{protocol}"] == pytest.approx(0.95 * math.log(2))


def best_f(score: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    found = [0.0]
    for threshold in np.arange(1, 20) / 20:
        said = score >= threshold
        both = (said & truth).sum()
        if both:
            p, r = both / said.sum(), both / truth.sum()
            found.append(1.3 * p * r / (0.3 * p + r))
    return max(found)


def test_invpt_saliency_has_thresholds_on_the_sigmoid_of_the_probability() -> None:
    outputs, labels = saliency_maps()
    logits, label = torch.cat(outputs).numpy()[:, 0], torch.cat(labels).numpy()
    valid = label != 255
    share = 1 / (1 + np.exp(-logits[valid]))
    values = tasks_of("invpt")["saliency"].every_metric()
    measure(values, outputs, labels)
    found = values.compute()
    assert found["max_f"] == pytest.approx(best_f(share, label[valid] == 1), rel=1e-12)
    assert found["max_f@invpt"] == pytest.approx(best_f(1 / (1 + np.exp(-share)), label[valid] == 1), rel=1e-12)


@pytest.mark.parametrize("size", [(480, 640), (48, 64)])
def test_eigen_is_a_mean_over_images_within_the_crop(size: tuple[int, int]) -> None:
    torch.manual_seed(9)
    label = (0.5 * torch.randn(3, 1, *size, dtype=torch.float64)).exp() * 3
    label[torch.rand(label.shape) < 0.3] = 0
    label[2] = 0  # an image without a label
    output = label.clamp(min=0.1).log() + 0.2 * torch.randn(3, 1, *size, dtype=torch.float64)
    found = measure(tasks_of("eigen", {"depth": {"type": "depth"}})["depth"].every_metric(), [output], [label])
    top, bottom, left, right = (45, 471, 41, 601) if size == (480, 640) else (4, 47, 4, 60)
    table = []
    crops = [each.numpy()[:2, 0, top:bottom, left:right] for each in (output, label)]
    for z, d in zip(*crops, strict=True):
        valid = (d > 1e-3) & (d < 10)
        m, d = np.clip(np.exp(z[valid]), 1e-3, 10), d[valid]
        ratio, log = np.maximum(m / d, d / m), np.log(m) - np.log(d)
        row = [(ratio < 1.25).mean(), (ratio < 1.25**2).mean(), (ratio < 1.25**3).mean(), (np.abs(m - d) / d).mean()]
        row += [np.sqrt(((m - d) ** 2).mean()), np.sqrt((log**2).mean()), np.abs(np.log10(m) - np.log10(d)).mean()]
        table.append([*row, 100 * log.std()])
    assert list(found.values()) == pytest.approx(np.mean(table, axis=0), rel=1e-9)
    assert list(found)[3:] == [f"{name}@eigen" for name in ("abs_rel", "rmse", "rmse_log", "log10", "silog")]


@pytest.mark.parametrize("protocol", ["mtan", "astmt", "invpt", "eigen"])
def test_states_of_two_processes_add_up_and_no_label_is_nan(protocol: str) -> None:
    for name, task in tasks_of(protocol).items():
        outputs, labels = {
            "segmentation": (batches((4, *SIZE), 6), classes(4)),
            "depth": depths(),
            "normals": normals(),
            "saliency": saliency_maps(),
            "edges": saliency_maps(),
        }[name]
        whole, one, other = (task.every_metric() for _ in range(3))
        for number, (output, label) in enumerate(zip(outputs, labels, strict=True)):
            whole.update(output, label)
            (one, other)[number % 2].update(output, label)
        for mine, theirs in zip(one.parts, other.parts, strict=True):
            mine.load_state([a + b for a, b in zip(mine.state(), theirs.state(), strict=True)])
        assert one.compute() == pytest.approx(whole.compute(), rel=1e-12)
        empty = task.every_metric()
        empty.update(outputs[0], task.unlabelled(labels[0]))
        assert all(math.isnan(value) for value in empty.compute().values())
        assert {*whole.higher, *whole.lower} == whole.compute().keys()


def test_a_protocol_leaves_the_tasks_own_metrics_and_is_refused_where_it_measures_nothing() -> None:
    plain: dict[str, Task] = {
        "segmentation": Segmentation(4),
        "depth": Depth(),
        "normals": Normals(),
        "saliency": Saliency(),
        "edges": Edges(),
    }
    for name, task in tasks_of("mtan").items():
        own = plain[name].metrics().compute()
        assert list(task.every_metric().compute())[: len(own)] == list(own)
    with pytest.raises(
        ConfigError, match=r"evaluate\.protocol: eigen measures tasks of the types depth, and there is none"
    ):
        tasks_of("eigen", {"a": {"type": "normals"}})
