"""No test depends on how fast a machine is: time-outs only guard against hanging, and nothing is slept for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

HERE = Path(__file__).parent
LEAST_S = 300
# Files whose clock or pause is what is tested, or a wait's own.
WAITS = {"processes.py", "killed_run.py", "checkpoint_kills.py", "featurestore_rows.py", "wandb_file.py"}


def hasty(source: str, may_wait: bool = False) -> list[str]:
    """Lines of a test file that hold only on a machine that is fast enough."""
    return [f"{line}: {what}" for line, what in _hasty(ast.parse(source), may_wait)]


def _hasty(tree: ast.AST, may_wait: bool) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for given in node.keywords:
                value = given.value.value if isinstance(given.value, ast.Constant) else None
                if (
                    given.arg in ("timeout", "timeout_s", "seconds")
                    and isinstance(value, int | float)
                    and value < LEAST_S
                ):
                    yield node.lineno, f"a time-out of {value} s"
                if given.arg == "deadline" and value is not None:
                    yield node.lineno, "a deadline of an example"
            called = ast.unparse(node.func)
            if not may_wait and called in ("time.sleep", "sleep"):
                yield node.lineno, "a sleep in place of an event"
        if (
            not may_wait
            and isinstance(node, ast.Compare)
            and any(
                isinstance(each, ast.Call) and ast.unparse(each.func).startswith("time.") for each in ast.walk(node)
            )
        ):
            yield node.lineno, "a comparison with the clock"


@pytest.mark.parametrize("file", sorted(HERE.rglob("*.py")), ids=lambda file: file.name)
def test_no_test_is_hasty(file: Path) -> None:
    assert hasty(file.read_text(encoding="utf-8"), file.name in WAITS) == []


@pytest.mark.parametrize(
    "line",
    [
        "process.communicate(timeout=60)",
        "WORLD.start(device, timeout_s=5)",
        "wait_until(f, seconds=1.5)",
        "time.sleep(1)",
        "assert time.perf_counter() - started < 5",
        "while time.monotonic() < deadline: pass",
        "settings(deadline=200)",
    ],
)
def test_a_hasty_line_is_found(line: str) -> None:
    assert len(hasty(line)) == 1


def test_examples_have_no_deadline_and_may_be_slow_to_draw() -> None:
    assert hypothesis.settings().deadline is None
    assert hypothesis.HealthCheck.too_slow in hypothesis.settings().suppress_health_check
