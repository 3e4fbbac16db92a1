"""Which values of a metric are better: the project's own, added ones, a protocol's, and those of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtl.config import ConfigError, load_config
from mtl.phases.conditions import Plateau
from mtl.phases.metrics import RunMetrics
from mtl.phases.phase_length import PhaseLength
from mtl.tasks import build_tasks

HEAD = "name: r\ntrunk: {name: test_resnet}\nevaluate: {protocol: eigen}\n"
TYPES = {
    "segmentation": "num_classes: 4, metrics: [macro_f1, mean_accuracy]",
    "classification": "num_classes: 4, metrics: [macro_f1, mean_accuracy]",
    "ordinal": "num_classes: 4",
    "multilabel": "num_classes: 2, metrics: [map, ap]",
    "regression": "num_outputs: 2",
    "depth": "metrics: [mae, sq_rel, rmse_log, log10, delta2, delta3]",
    "normals": "metrics: rmse",
    "edges": "metrics: ods_f",
    "saliency": "",
    "keypoints": "num_points: 3",
}
HIGHER = [
    "miou",
    "pixel_accuracy",
    "accuracy",
    "kappa",
    "macro_f1",
    "mean_accuracy",
    "r2",
    "max_f",
    "iou",
    "pck",
    "ods_f",
    "within_11",
    "within_22",
    "within_30",
    "delta1",
    "delta2",
    "delta3",
    "delta1@eigen",
    "delta2@eigen",
    "delta3@eigen",
    "map",
    "ap_0",
    "ap_1",
]
LOWER = [
    "mae",
    "rmse",
    "error",
    "mean",
    "median",
    "abs_rel",
    "sq_rel",
    "rmse_log",
    "log10",
    "abs_rel@eigen",
    "rmse@eigen",
    "rmse_log@eigen",
    "log10@eigen",
    "silog@eigen",
]
OWN = """
import torch
from mtl.tasks import Goal, Metrics, Task

class Ours(Metrics):
    {body}

    def update(self, output, label): ...

    def compute(self):
        return {{"up": float("nan"), "down": float("nan"), "other": float("nan")}}

class Own(Task):
    output, num_outputs, goal = "vector", 1, Goal("{goal}", perfect=0.0)
    fit = loss = check_labels = lambda *a: None

    def metrics(self):
        return Ours()
"""


@pytest.fixture
def own() -> Iterator[None]:
    yield
    sys.modules.pop("ours", None)


def plateau_of(metric: str, tasks: str, more: str = "") -> Plateau:
    """The condition of a plateau of a metric, which stands on the last line."""
    file = Path("run.yaml")
    phase = f"{{name: a, max_epochs: 3, until: {{plateau: {metric}{more}}}}}"
    file.write_text(f"{HEAD}tasks:\n  depth: {{type: depth}}\n{tasks}phases:\n  - {phase}\n")
    config = load_config(file)
    condition = PhaseLength.from_config(config.written_phases[0], RunMetrics(config, build_tasks(config))).until
    assert isinstance(condition, Plateau)
    return condition


def write_own(body: str, goal: str = "down") -> None:
    Path("ours.py").write_text(OWN.format(body=body, goal=goal))


def test_every_metric_of_the_project_has_a_direction() -> None:
    written = "".join(f"  {kind}: {{type: {kind}, {keys}}}\n" for kind, keys in TYPES.items())
    Path("run.yaml").write_text(f"{HEAD}tasks:\n{written}phases: [{{name: a, epochs: 1}}]\n")
    tasks = build_tasks(load_config(Path("run.yaml")))
    seen = set()
    for task in tasks.values():
        metrics = task.every_metric()
        for name in metrics.compute():
            assert metrics.direction(name) == ("higher" if name in HIGHER else "lower" if name in LOWER else None), name
            seen.add(name)
        assert metrics.direction(task.goal.metric) == task.goal.direction
        assert {*task.more_metrics} <= {*seen, "ap"}
    assert seen == {*HIGHER, *LOWER}


@pytest.mark.parametrize(
    ("tasks", "metric", "direction"),
    [
        ("", "val/depth/delta2@eigen", "higher"),
        ("", "val/depth/silog@eigen", "lower"),
        ("  more: {type: depth, label: depth, metrics: [delta3, log10]}\n", "val/more/delta3", "higher"),
        ("  more: {type: depth, label: depth, metrics: [delta3, log10]}\n", "val/more/log10", "lower"),
        ("  more: {type: normals, label: normals, metrics: 'ours:Ours'}\n", "val/more/up", "higher"),
        ("  more: {type: normals, label: normals, metrics: 'ours:Ours'}\n", "val/more/down", "lower"),
        ("  more: {type: 'ours:Own', label: depth}\n", "val/more/up", "higher"),
        ("  more: {type: 'ours:Own', label: depth}\n", "val/more/down", "lower"),
    ],
)
@pytest.mark.usefixtures("own")
def test_a_condition_finds_the_direction_of_an_added_metric(tasks: str, metric: str, direction: str) -> None:
    write_own("higher, lower = ('up',), ('down',)")
    assert plateau_of(metric, tasks) == Plateau(metric, 1, direction)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind", ["{type: normals, label: normals, metrics: 'ours:Ours'}", "{type: 'ours:Own', label: depth}"]
)
@pytest.mark.usefixtures("own")
def test_without_a_direction_a_condition_is_refused_and_takes_one_that_is_written(kind: str) -> None:
    write_own("higher, lower = ('up',), ('down',)")
    task = f"  more: {kind}\n"
    with pytest.raises(ConfigError) as caught:
        plateau_of("val/more/other", task)
    assert caught.value.mistakes == [
        "run.yaml:8: phases.a.until.direction: expected higher or lower: which values of val/more/other are better;"
        " write it here, or name 'other' in `higher` or `lower` of its class"
    ]
    assert plateau_of("val/more/other", task, ", direction: lower").direction == "lower"


@pytest.mark.parametrize(
    ("body", "goal", "task", "message"),
    [
        ("lower = ('dwn',)", "down", "{type: depth, metrics: 'ours:Ours'}",
         "tasks.more.metrics.0.name: ours:Ours: `higher` or `lower` names 'dwn', but `compute` gives up, down, other;"
         " nearest: down"),
        ("lower = 'down'", "down", "{type: depth, metrics: 'ours:Ours'}",
         "tasks.more.metrics.0.name: ours:Ours: `higher` or `lower` names 'd', but `compute` gives up, down, other"),
        ("higher = lower = ('up',)", "down", "{type: depth, metrics: 'ours:Ours'}",
         "tasks.more.metrics.0.name: ours:Ours: 'up' is in both `higher` and `lower`"),
        ("lower = ('dwn',)", "down", "{type: 'ours:Own', label: depth}",
         "tasks.more.type: ours:Own: `higher` or `lower` names 'dwn', but `compute` gives up, down, other;"
         " nearest: down"),
        ("pass", "dwn", "{type: 'ours:Own', label: depth}",
         "tasks.more.type: ours:Own: its goal is 'dwn', but its metrics compute up, down, other; nearest: down"),
        ("higher = ('down',)", "down", "{type: 'ours:Own', label: depth}",
         "tasks.more.type: ours:Own: higher values of 'down' are better by its metrics, lower ones by its goal, whose"
         " perfect value is 0"),
        ("def __init__(self): 1 / 0", "down", "{type: 'ours:Own', label: depth}",
         "tasks.more.type: ours:Own: ZeroDivisionError: division by zero (ours.py:6)"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("own")
def test_a_class_that_contradicts_itself_is_refused(body: str, goal: str, task: str, message: str) -> None:
    write_own(body, goal)
    with pytest.raises(ConfigError) as caught:
        plateau_of("val/score", f"  more: {task}\n")
    assert [each.partition(": ")[2].replace(f"{Path.cwd()}/", "") for each in caught.value.mistakes] == [message]
