"""The training loop fits on a screen: how much there is to read from a batch to the optimizer's step."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtl.training.loop import Trainer
from mtl.training.step import StepLosses
from mtl.training.tracking.tracker import Tracker
from runs import small_parts


def code_lines(function: Callable[..., Any], until: str = "") -> int:
    """The lines of a function's body, without docstring, comments and empty lines; up to one, that one included."""
    source = textwrap.dedent(inspect.getsource(function))
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.FunctionDef)
    first = definition.body[1 if ast.get_docstring(definition) else 0].lineno
    lines = [line for line in source.splitlines()[first - 1 :] if line.strip() and not line.lstrip().startswith("#")]
    return next(number for number, line in enumerate(lines, start=1) if until in line) if until else len(lines)


def test_from_the_batch_to_the_optimizer_s_step_there_are_at_most_60_lines_in_two_files() -> None:
    # With gradients that a method balances; without, it is ten lines less.
    forward = [StepLosses.__call__, StepLosses.each_loss, StepLosses._by_gradients]
    assert code_lines(Trainer.train_step, until="scaler.step(") + sum(map(code_lines, forward)) <= 60


def test_a_trainer_has_at_most_ten_collaborators(tmp_path: Path) -> None:
    parts = small_parts(tmp_path, phases=[{"name": "a", "steps": 1}])
    trainer = Trainer(parts, tmp_path, Tracker(parts.config.tracking, tmp_path, "x", {}), quiet=True)
    assert len(vars(trainer)) <= 10
