"""Losses and metrics by name: built-in ones, the file in the documentation, and each way in which one can be wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mtl.cli import main
from mtl.config import ConfigError, RunConfig, load_config
from mtl.tasks import Classification, Segmentation, Task, build_tasks
from mtl.tasks.class_losses import CrossEntropy
from mtl.training.run import train
from mtl.training.setup import assemble
from pages import code_block
from runs import TINY, read_metrics, tiny_config

PAGE = "docs/own_loss.md"
NAN = float("nan")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """The configuration next to the module, neither of them in the working directory."""
    (tmp_path / "softly.py").write_text(code_block(PAGE, "python"))
    yield tiny_config(tmp_path, **yaml.safe_load(code_block(PAGE, "yaml")))
    sys.modules.pop("softly", None)


def task_of(settings: dict[str, Any], name: str = "object", class_names: dict[str, list[str]] | None = None) -> Task:
    config = RunConfig.model_validate({**TINY, "tasks": {name: settings}})
    return build_tasks(config, class_names)[name]


def three_classes(loss: str, **options: Any) -> Task:
    return task_of({"type": "classification", "num_classes": 3, "loss": {"name": loss, "options": options}})


def test_the_page_has_a_file_of_few_lines() -> None:
    assert len([line for line in code_block(PAGE, "python").splitlines() if line.strip()]) <= 40


def test_the_losses_of_the_page_train(own: Path) -> None:
    phases = [{"name": "a", "freeze": ["trunk"], "epochs": 1}]
    own.write_text(yaml.safe_dump({**yaml.safe_load(own.read_text()), "phases": phases}, sort_keys=False))
    train(assemble(load_config(own), quiet=True), quiet=True)
    last = read_metrics(own.parent / "runs/tiny")[-1]
    assert {"val/depth/abs_rel", "val/segmentation/miou"} <= last.keys()


def test_the_losses_of_the_page_are_what_they_say(own: Path) -> None:
    tasks = build_tasks(load_config(own))
    output, label = torch.randn(3, 1, 4, 4), torch.rand(3, 1, 4, 4) + 1
    expected = (2 * (output - label.log())).double().cosh().log().mean()
    assert float(tasks["depth"].loss(output, label)) == pytest.approx(float(expected), rel=1e-5)
    label[0] = 0
    expected = (2 * (output - label.log())[1:]).double().cosh().log().mean()
    assert float(tasks["depth"].loss(output, label)) == pytest.approx(float(expected), rel=1e-5)
    # A certain prediction of the truth: of 13 classes, those in the label have Dice 1, the others 0.
    classes = torch.tensor([[[0, 1], [1, 255]], [[255, 255], [255, 255]]])
    logits = 100 * torch.nn.functional.one_hot(classes.clamp(max=12), 13).movedim(-1, 1).float()
    assert float(tasks["segmentation"].loss(logits, classes)) == pytest.approx(1 - 2 / 13)
    assert float(tasks["segmentation"].weight(classes)) == 1


@pytest.mark.parametrize(
    ("per", "body", "message"),
    [
        ("entry", "output.mean()", r"expected the loss of each entry, of shape \(2, 1, 8, 8\), got \(\)"),
        ("entry", "(output - label).mean((1, 2, 3))", r"expected the loss of .* of shape \(2, 1, 8, 8\), got \(2,\)"),
        ("entry", "1 / 0", r"ZeroDivisionError: division by zero \(.*bad\.py:6\)"),
        ("entry", "(output - label) * float('inf')", "the loss or its gradient is not finite for plain labels"),
        ("entry", "None", "expected the loss of each entry, .*, got NoneType"),
        ("image", "output.mean()", r"expected the loss of each image, of shape \(2,\), got \(\)"),
        (
            "image",
            "(output - label).square().nanmean((1, 2, 3))",
            "the loss .* not finite for images without a label",
        ),
    ],
)
def test_an_own_loss_that_breaks_the_contract_is_refused(tmp_path: Path, per: str, body: str, message: str) -> None:
    call = f"def __call__(self, output, label):\n        return {body}"
    (tmp_path / "bad.py").write_text(f"from mtl.tasks import Loss\n\nclass Bad(Loss):\n    per = {per!r}\n    {call}\n")
    try:
        config = load_config(tiny_config(tmp_path, tasks={"depth": {"type": "depth", "loss": "bad:Bad"}}))
        with pytest.raises(ConfigError, match=rf"tasks\.depth\.loss.*: bad:Bad: {message}"):
            build_tasks(config)
    finally:
        sys.modules.pop("bad", None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "tasks.depth.loss=hubr",
            "tasks.depth.loss.name: no loss 'hubr' here; there are: .*; nearest: huber",
        ),
        ("tasks.depth.loss={name: l1, options: {a: 1}}", "tasks.depth.loss.options: l1 takes no options"),
        ("tasks.depth.loss={name: huber, options: {delta: 0}}", "tasks.depth.loss.options.delta: expected a number gr"),
        (
            "tasks.depth.loss={name: silog, options: {mean_wight: 1}}",
            "loss.options.mean_wight: unknown key; nearest",
        ),
        ("tasks.depth.loss=softly:LogCos", "tasks.depth.loss.name: softly has no 'LogCos'; nearest: LogCosh"),
        ("tasks.depth.space=bins", "tasks.depth: expected min and max with the space 'bins'"),
        (
            "tasks.depth.metrics=[rmse_lg]",
            "tasks.depth.metrics.0.name: no metric 'rmse_lg' here; .*: rmse_log",
        ),
        ("tasks.depth.metrics=[mae, mae]", "tasks.depth.metrics.1.name: mae: the task already has a metric 'mae'"),
        ("tasks.depth.metrics={name: mae, options: {a: 1}}", "tasks.depth.metrics.0.options: mae takes no options"),
        (
            "tasks.segmentation.balance_power=0.2",
            "segmentation.balance_power: this loss does not read it, since",
        ),
    ],
)
def test_a_mistake_is_named_at_its_key(
    own: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(own), override]) == 2
    assert re.search(message, capsys.readouterr().err), capsys.readouterr().err


def test_the_number_of_classes_is_known_from_their_names() -> None:
    names = {"object": ["cat", "dog", "owl"]}
    task = task_of({"type": "classification"}, class_names=names)
    assert (task.num_outputs, task.class_names) == (3, names["object"])
    assert task.caption(torch.tensor([2, 0, -1]), is_label=True) == ["owl", "cat", "none"]
    assert task.caption(torch.eye(3), is_label=False) == ["cat", "dog", "owl"]
    many = task_of({"type": "multilabel"}, class_names=names)
    assert many.caption(torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, NAN]]), is_label=True) == ["cat, owl", "none"]
    legend = task_of({"type": "segmentation"}, class_names=names).legend()
    assert [name for name, _ in legend] == names["object"] and len({colour for _, colour in legend}) == 3


@pytest.mark.parametrize("kind", ["classification", "segmentation", "ordinal", "multilabel"])
def test_classes_that_nobody_counts_are_an_error_and_so_are_those_that_disagree(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.object\.num_classes: expected a number, since the data set"):
        task_of({"type": kind})
    with pytest.raises(ConfigError, match=r"num_classes: expected at least the 3 classes .*\(a, b, c, \.\.\.\), got 2"):
        task_of({"type": kind, "num_classes": 2}, class_names={"object": ["a", "b", "c"]})


def test_losses_of_classes_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
    label = torch.tensor([0, 2, 2, -1])
    log_p = logits.double().log_softmax(1)
    own = -log_p[[0, 1, 2], [0, 2, 2]]

    smoothed = 0.8 * own + 0.2 * -log_p[:3].mean(1)
    task = three_classes("cross_entropy", label_smoothing=0.2)
    assert float(task.loss(logits, label)) == pytest.approx(float(smoothed.mean()), rel=1e-6)

    focal = (1 - (-own).exp()) ** 1.5 * own
    task = three_classes("focal", gamma=1.5)
    assert float(task.loss(logits, label)) == pytest.approx(float(focal.mean()), rel=1e-6)

    weight = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)[[0, 2, 2]]
    task = three_classes("cross_entropy", class_weights=[1, 4, 0.5])
    assert float(task.loss(logits, label)) == pytest.approx(float((weight * own).sum() / weight.sum()), rel=1e-6)
    assert float(task.weight(label)) == float(weight.sum())

    task = three_classes("cross_entropy", class_weights="balanced")
    task.fit(label)
    # Frequencies 1/3 and 2/3; the class without a label counts once.
    assert isinstance(task, Classification) and task.class_weight is not None
    assert float(task.class_weight[0] / task.class_weight[2]) == pytest.approx(2.0, rel=1e-6)


def test_class_weights_of_another_number_are_refused_and_those_of_the_loss_come_before_balance_power() -> None:
    with pytest.raises(ConfigError, match=r"loss\.options\.class_weights: expected 3 weights, .* class, got 2"):
        three_classes("focal", class_weights=[1, 2])
    task = Segmentation(2, loss=CrossEntropy(class_weights=[1.0, 3.0]))
    task.fit(torch.tensor([[[0, 0], [0, 1]]]))
    assert task.class_weight is not None and task.class_weight.tolist() == [1, 3]


def test_added_metrics_are_measured_and_named_next_to_the_tasks_own() -> None:
    task = task_of({"type": "depth", "metrics": ["mae", "rmse_log", "delta3"]}, "depth")
    metrics = task.every_metric()
    truth, metres = torch.tensor([1.0, 2.0, 0.0]).view(1, 1, 1, 3), torch.tensor([2.0, 2.0, 9.0]).view(1, 1, 1, 3)
    metrics.update(metres.log(), truth)
    values = metrics.compute()
    assert list(values) == ["abs_rel", "rmse", "delta1", "mae", "rmse_log", "delta3"]
    assert values["mae"] == pytest.approx(0.5) and values["delta3"] == 0.5
    assert values["rmse_log"] == pytest.approx((0.5 * torch.tensor(2.0).log() ** 2).sqrt().item())
    again = task.every_metric()
    for one, other in zip(again.parts, metrics.parts, strict=True):
        one.load_state(other.state())
    assert again.compute() == values
    assert "delta3" in metrics.higher and "mae" in metrics.lower
