"""A task type of the user's own: the file in the documentation, and each way in which one can be wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mtl.cli import main
from mtl.config import ConfigError, load_config
from mtl.tasks import build_tasks
from mtl.training.run import train
from mtl.training.setup import assemble
from pages import code_block
from runs import TINY, tiny_config

PAGE = "docs/own_task.md"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """The configuration next to the module, neither of them in the working directory."""
    (tmp_path / "sizes.py").write_text(code_block(PAGE, "python"))
    file = tiny_config(tmp_path, **yaml.safe_load(code_block(PAGE, "yaml")))
    yield file
    sys.modules.pop("sizes", None)


def test_the_page_has_a_file_of_few_lines() -> None:
    lines = [line for line in code_block(PAGE, "python").splitlines() if line.strip()]
    assert len(lines) <= 40


def test_the_task_of_the_page_trains_reports_and_is_resumed(own: Path, tmp_path: Path) -> None:
    setup = assemble(load_config(own), quiet=True)
    train(setup, quiet=True)
    scores = setup.trivial["size"]
    # Both tasks share one label: the trivial number is the mean class, as computed by hand.
    classes, val = setup.train.labels["object"].double(), setup.val.labels["object"].double()
    assert scores["mae"] == pytest.approx(float((val - classes.mean()).abs().mean()), rel=1e-6)
    assert main(["report", str(tmp_path / "runs/tiny")]) == 0
    assert main(["train", str(own), "-q", "resume=auto"]) == 0
    assert main(["audit", str(tmp_path / "runs/tiny")]) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.size.options.scal=2", "tasks.size.options.scal: unknown key; nearest: scale"),
        ("tasks.size.options.scale=far", "tasks.size.options.scale: expected a valid number, got 'far'"),
        ("tasks.size.type=sizes:Numbr", "tasks.size.type: sizes has no 'Numbr'; nearest: Number"),
        ("tasks.size.type=size:Number", "tasks.size.type: 'size' cannot be imported: No module named 'size'"),
        ("tasks.size.type=sizes:MeanError", r"tasks.size.type: sizes:MeanError is no subclass of mtl\.tasks\.\S+Task"),
        ("tasks.size.label=objct", "tasks.size.label: scenes has no label 'objct'; it has: .*; nearest: object"),
        (
            "tasks.size.type=regresion",
            "tasks.size.type: expected one of .*, package.module:Name, got 'regr",
        ),
    ],
)
def test_a_mistake_is_named_at_its_key(
    own: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(own), override]) == 2

    assert re.search(f"^error: command line: {message}", capsys.readouterr().err, re.MULTILINE)


def test_mistakes_of_a_file_have_its_lines_and_come_at_once(own: Path) -> None:
    content = yaml.safe_load(own.read_text())
    content["tasks"]["size"]["options"] = {"scale": "far"}
    content["tasks"]["other"] = {"type": "sizes:Number", "label": "object", "options": {"more": 1}}
    own.write_text(yaml.safe_dump(content, sort_keys=False))
    lines = own.read_text().splitlines()
    with pytest.raises(ConfigError) as caught:
        build_tasks(load_config(own))
    assert caught.value.mistakes == [
        f"{own}:{lines.index('      scale: far') + 1}: tasks.size.options.scale: expected a valid number, got 'far'",
        f"{own}:{lines.index('      more: 1') + 1}: tasks.other.options.more: unknown key; the keys here are scale",
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def __init__(self): 1 / 0", r"tasks.a.options: bad:Bad: ZeroDivisionError: division by zero \(.*bad\.py:4\)"),
        ("def __init__(self, x): ...", r"tasks.a.options: bad:Bad: TypeError: .* required positional argument: 'x'"),
        ("output, num_outputs = 'vector', 1", "tasks.a.type: bad:Bad has no 'goal', which every task has"),
    ],
)
def test_a_class_that_cannot_be_used_is_named_with_the_line_in_it(tmp_path: Path, body: str, message: str) -> None:
    lambdas = "fit = loss = metrics = check_labels = lambda *a: None"
    (tmp_path / "bad.py").write_text(f"from mtl.tasks import Task\n\nclass Bad(Task):\n    {body}\n    {lambdas}\n")
    try:
        config = load_config(tiny_config(tmp_path, tasks={**TINY["tasks"], "a": {"type": "bad:Bad", "label": "depth"}}))
        with pytest.raises(ConfigError, match=message):
            build_tasks(config)
    finally:
        sys.modules.pop("bad", None)


def test_two_tasks_may_share_a_label(tmp_path: Path) -> None:
    two = {name: {"type": "classification", "num_classes": 10, "label": "object"} for name in ("one", "two")}
    phases = [{"name": "a", "freeze": ["trunk"], "epochs": 1}]
    setup = assemble(load_config(tiny_config(tmp_path, tasks=two, phases=phases)), quiet=True)
    assert setup.train.labels["one"] is setup.train.labels["two"]
    assert setup.trivial["one"] == setup.trivial["two"]
