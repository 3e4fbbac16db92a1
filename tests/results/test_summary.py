"""The results of a run as text: everything in a file, the main metrics on a narrow terminal, nothing cut."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mtl.audit import Report
from mtl.results.summary import closing_line, results_table
from mtl.training.result import RunResult
from mtl.training.validation import Scores

TRIVIAL: Scores = {
    "segmentation": {"miou": 0.0342, "pixel_accuracy": 0.4447},
    "depth": {"abs_rel": 0.5532, "rmse": 1.7904, "delta1": 0.1756},
}
MAIN = {"segmentation": "miou", "depth": "rmse"}


def ended(*phases: str) -> RunResult:
    return RunResult(Path("runs/x"), TRIVIAL, dict.fromkeys(phases, TRIVIAL), Report(), math.nan, 0, 0.0)


@pytest.mark.parametrize("width", [None, 100])
def test_a_file_and_a_wide_terminal_show_every_metric(width: int | None) -> None:
    assert results_table(ended("warm", "fine"), MAIN, width).splitlines() == [
        "task          metric          trivial    warm    fine",
        "------------  --------------  -------  ------  ------",
        "segmentation  miou             0.0342  0.0342  0.0342",
        "segmentation  pixel_accuracy   0.4447  0.4447  0.4447",
        "depth         abs_rel          0.5532  0.5532  0.5532",
        "depth         rmse             1.7904  1.7904  1.7904",
        "depth         delta1           0.1756  0.1756  0.1756",
    ]


def test_80_columns_show_the_main_metrics_and_where_the_others_are() -> None:
    assert results_table(ended("warm", "fine"), MAIN, 80).splitlines() == [
        "task          metric  trivial    warm    fine",
        "------------  ------  -------  ------  ------",
        "segmentation  miou     0.0342  0.0342  0.0342",
        "depth         rmse     1.7904  1.7904  1.7904",
        "(only main metrics; all: metrics.jsonl)",
    ]
    only = ended()
    only.trivial, only.scores = {"object": {"accuracy": 0.1}}, {"a": {"object": {"accuracy": 0.5}}}
    assert "(" not in results_table(only, {"object": "accuracy"}, 80)


def test_phases_that_do_not_fit_follow_below_and_those_left_out_are_named() -> None:
    names = [f"thaw-the-{place}-block" for place in ("1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th")]
    text = results_table(ended(*names), MAIN, 80)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    titles = [line.split()[2:] for line in lines if line.startswith("task ")]
    assert [name for block in titles for name in block] == ["trivial", *names[2:]]
    assert len(titles) > 1
    assert text.count("segmentation  miou ") == text.count("depth         rmse ") == len(titles)
    assert text.endswith("\n(left out: thaw-the-1st-block, thaw-the-2nd-block; see metrics.jsonl)")


def test_the_last_line_says_the_best_score_or_that_there_is_none() -> None:
    result = ended("a")
    result.best_score, result.best_step, result.train_s = 0.5, 12, 90.2
    assert closing_line(result) == "best val/score 0.500 at step 12; 90 s of training"
    result.best_score = math.nan
    assert closing_line(result) == "no best val/score: it was never finite; 90 s of training"
