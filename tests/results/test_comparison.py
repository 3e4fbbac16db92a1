"""Comparisons: statistics by hand, tables, designs and what is refused."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.config import ConfigError, RunConfig, load_config
from mtl.results.comparison.collect import Comparison, Measured, Method
from mtl.results.comparison.design import Design, DesignError, Job, design
from mtl.results.comparison.runner import claimed, code_of, command_of
from mtl.results.comparison.statistics import Metric, delta_m, mean_ranks, paired, sign_flip_p, spread
from mtl.results.comparison.table import as_csv, head, in_words, latex, markdown, notes, paired_rows, rows
from mtl.results.comparison.write import FILES, write_all
from runs import TINY, TWO

METRICS = (
    Metric("seg", "miou", True, True),
    Metric("seg", "accuracy", True, False),
    Metric("depth", "abs_rel", False, True),
)
BASE = {("seg", "miou"): 0.5, ("seg", "accuracy"): 0.8, ("depth", "abs_rel"): 0.2}
BETTER = {("seg", "miou"): 0.55, ("seg", "accuracy"): 0.8, ("depth", "abs_rel"): 0.1}


# Statistics


def test_the_three_relative_differences_are_those_of_a_hand() -> None:
    found = delta_m(BETTER, BASE, METRICS)
    # Gains of 10 %, 0 % and 50 %.
    assert found.per_task == pytest.approx((10 + 50) / 2)
    assert found.flat == pytest.approx(-(10 + 0 + 50) / 3)
    assert found.by_task == pytest.approx(((10 + 0) / 2 + 50) / 2)
    worse = delta_m(BASE | {("depth", "abs_rel"): 0.3}, BASE, METRICS)
    assert worse.per_task == pytest.approx(-25) and worse.flat == pytest.approx(50 / 3)


def test_a_baseline_of_zero_and_a_missing_metric_have_no_difference() -> None:
    assert math.isnan(delta_m(BETTER, BASE | {("seg", "miou"): 0.0}, METRICS).per_task)
    assert math.isnan(delta_m({}, BASE, METRICS).flat)


def test_ranks_are_means_over_metrics_and_ties_share_theirs() -> None:
    third = {("seg", "miou"): 0.55, ("seg", "accuracy"): 0.7, ("depth", "abs_rel"): 0.3}
    found = mean_ranks({"base": BASE, "better": BETTER, "third": third}, METRICS)
    assert found["better"] == pytest.approx((1.5 + 1.5 + 1) / 3)
    assert found["base"] == pytest.approx((3 + 1.5 + 2) / 3)
    assert found["third"] == pytest.approx((1.5 + 3 + 3) / 3)


def test_a_metric_that_is_missing_or_infinite_is_ranked_last_and_one_that_nobody_has_not_at_all() -> None:
    both = {"ok": (0.5, 0.4), "bad": (0.1, 0.9), "diverged": (0.6, math.nan), "burst": (math.nan, math.inf)}
    # Nobody has the accuracy.
    values = {name: {("seg", "miou"): miou, ("depth", "abs_rel"): error} for name, (miou, error) in both.items()}
    assert mean_ranks(values, METRICS) == {"ok": 1.5, "bad": 2.5, "diverged": 2.25, "burst": 3.75}


def test_a_paired_difference_has_an_interval_and_no_p_under_five_seeds() -> None:
    found = paired([1.0, 2.0, 3.0], [0.5, 1.5, 2.4])
    assert found.mean == pytest.approx(1.6 / 3) and 0.5 <= found.low <= found.mean <= found.high <= 0.6 + 1e-9
    assert found.p_value is None
    assert math.isnan(paired([1.0], [0.0]).low) and math.isnan(paired([math.nan, 1.0], [0.0, 0.0]).mean)


def test_a_sign_flip_test_is_exact() -> None:
    five = paired([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5)
    assert five.p_value == pytest.approx(2 / 32), "all signs one way, or all the other"
    assert sign_flip_p(np.array([1.0, -1.0])) == 1.0


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12))
@settings(max_examples=40, deadline=None)
def test_an_interval_holds_its_mean_and_changes_sign_with_the_difference(values: list[float]) -> None:
    one, other = paired(values, [0.0] * len(values)), paired([0.0] * len(values), values)
    assert one.low - 1e-9 <= one.mean <= one.high + 1e-9
    assert other.mean == pytest.approx(-one.mean) and other.p_value == pytest.approx(one.p_value)


def test_a_spread_is_that_of_a_sample() -> None:
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert spread([1.0])[0] == 1.0 and math.isnan(spread([1.0])[1])


# Tables


def measured(method: str, seed: int, values: dict[tuple[str, str], float], setting: tuple[str, ...] = ()) -> Measured:
    job = Job(f"{method}-seed{seed}", method, setting, seed, Path("x.yaml"), setting, "0", cast(RunConfig, None))
    moved = {key: value + 0.01 * seed for key, value in values.items()}
    return Measured(job, Path(job.name), moved, 0.3 + 0.01 * seed, 0.4, 10, 1.0, 100.0, True)


def comparison(num_seeds: int = 2) -> Comparison:
    runs = {
        name: tuple(measured(name, seed, values, setting) for seed in range(num_seeds))
        for name, values, setting in (("a_b", BASE, ()), ("50%&c", BETTER, ("optim.lr_scale=0.5",)))
    }
    methods = tuple(
        Method(name, own[0].job.setting, 2, own, delta_m(BETTER, BASE, METRICS), 1.5) for name, own in runs.items()
    )
    every = tuple(run for own in runs.values() for run in own)
    return Comparison(methods, METRICS, "a_b", "a_b", every)


def test_a_table_has_main_metrics_with_directions_and_spread() -> None:
    found = comparison()
    titles, (first, second) = head(found), rows(found)
    assert titles[:6] == ["method", "tuned over", "seeds", "seg miou ↑", "depth abs_rel ↓", "val/score ↑"]
    assert first[:4] == ["a_b", "2", "2", "0.5050 ± 0.0071"] and first[6:9] == ["-", "-", "-"]
    assert second[0] == "50%&c (optim.lr_scale=0.5)" and second[6:9] == ["+30.00", "-20.00", "+27.50"]
    assert all(len(row) == len(titles) for row in (first, second))


def test_paired_rows_are_to_the_first_configuration_and_say_what_p_needs() -> None:
    found = paired_rows(comparison())
    assert [row[:3] for row in found[:2]] == [
        ["50%&c", "seg miou ↑", "+0.0500"],
        ["50%&c", "depth abs_rel ↓", "-0.1000"],
    ]
    assert {row[4] for row in found} == {"needs 5 seeds"}
    assert {row[4] for row in paired_rows(comparison(5))} != {"needs 5 seeds"}
    assert "Fewer than three seeds" in notes(comparison())[-1]


def test_a_difference_that_is_not_known_is_a_dash() -> None:
    found = comparison(5)
    first = found.methods[1].runs[0]
    lost = replace(first, values={**first.values, ("seg", "miou"): math.nan})
    runs = (lost, *found.methods[1].runs[1:])
    found = replace(found, methods=(found.methods[0], replace(found.methods[1], runs=runs)))
    assert paired_rows(found)[0] == ["50%&c", "seg miou ↑", "-", "-", "-"]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_terminal_gets_tables_of_its_width(width: int) -> None:
    text = in_words(comparison(), width)
    assert max(map(len, text.splitlines())) <= width and "|" not in text
    assert "+30.00" in text and "needs 5 seeds" in text.replace("\n", " ")


def test_any_name_is_latex() -> None:
    found = comparison()
    first = replace(found.methods[0], name='<\u03b2|"\u00e9~^\\{}$#\u4e2d\u0391>')
    text = latex(replace(found, methods=(first, found.methods[1]), reference=first.name))
    assert text.isascii()
    name = r"$<$$\beta$$|$\textquotedblright{}e\textasciitilde{}\textasciicircum{}\textbackslash{}\{\}\$\#U+4E2D"
    # A capital alpha looks like an A, and is a command of no font.
    assert name in text and "$>$" in text


def test_latex_escapes_and_balances() -> None:
    text = latex(comparison())
    assert r"50\%\&c (optim.lr\_scale=0.5)" in text and r"a\_b" in text and r"$\pm$" in text
    # The table, and that of the paired differences.
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    for part in text.split(r"\end{tabular}")[:2]:
        lines = [line for line in part.splitlines() if line.endswith(r"\\")]
        assert len(lines) > 1 and len({line.replace(r"\&", "").count("&") for line in lines}) == 1
    assert text.isascii() and text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_every_run_has_a_row_of_csv_with_all_metrics() -> None:
    read = list(csv.DictReader(io.StringIO(as_csv(comparison()))))
    assert [row["run"] for row in read] == ["a_b-seed0", "a_b-seed1", "50%&c-seed0", "50%&c-seed1"]
    assert float(read[1]["val/seg/accuracy"]) == pytest.approx(0.81) and read[2]["setting"] == "optim.lr_scale=0.5"


def test_all_files_are_written(tmp_path: Path) -> None:
    files = write_all(tmp_path, comparison(), "mtl compare a b")
    assert [file.name for file in files] == [*FILES] and all(file.stat().st_size for file in files)
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "50%&amp;c" in page and "mtl compare a b" in page
    assert markdown(comparison()) == (tmp_path / "comparison.md").read_text()


# Designs


def config(folder: Path, name: str, **changes: Any) -> Path:
    file = folder / f"{name}.yaml"
    phases = [{"name": "all", "epochs": 1, "balance": "uw"}]
    content = TINY | {"tasks": TWO, "phases": phases, "tracking": {"mode": "offline"}} | changes
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_a_design_has_every_setting_and_seed_and_each_task_by_itself(tmp_path: Path) -> None:
    files = [config(tmp_path, "one"), config(tmp_path, "two")]
    plan = design(files, ["optim.clip_norm=1"], 2, ["optim.lr_scale=1,0.5"], True, tmp_path / "out")
    assert [job.name for job in plan.jobs[:4]] == [
        "one-lr_scale1-seed0",
        "one-lr_scale1-seed1",
        "one-lr_scale0.5-seed0",
        "one-lr_scale0.5-seed1",
    ]
    # Baselines are tuned over the same settings.
    assert len(plan.jobs) == 2 * 2 * 2 + 2 * 2 * 2 and len({job.setting for job in plan.jobs}) == 2
    command = command_of(plan.jobs[3])
    assert command[:5] == ["-m", "mtl", "train", "-q", str(files[0])]
    assert {"optim.clip_norm=1", "optim.lr_scale=0.5", "seed=1", "tracking.group=out", "resume=auto"} <= {*command}
    alone = plan.jobs[-1]
    assert (alone.name, alone.task) == ("single-task-object-lr_scale0.5-seed1", "object")
    assert [*alone.config.tasks] == ["object"] and alone.config.balance.method == "mean"
    assert alone.config.phases[0].balance is None and alone.config.optim.lr_scale == 0.5
    # A setting that changes nothing for a single task is trained once.
    plan = design(files[:1], [], 1, ["phases.all.balance=uw,mean"], True)
    assert [job.name for job in plan.jobs if job.task] == [
        "single-task-depth-balanceuw-seed0",
        "single-task-object-balanceuw-seed0",
    ]


def phase_names(config: RunConfig) -> list[str]:
    return [written.name for written in config.written_phases]


def test_a_baseline_has_only_phases_and_patterns_that_concern_its_task(tmp_path: Path) -> None:
    phases = [
        {"name": "warm", "freeze": ["trunk"], "epochs": 1, "lr": {"heads.depth": 1e-3, "heads.object": 2e-3}},
        {"repeat": 2, "phases": [{"name": "object", "tasks": ["object"], "freeze": ["heads.depth"], "steps": 1}]},
        {"name": "polish", "freeze": ["trunk", "heads", "!heads.depth"], "epochs": 1, "weight_decay": 0.1},
        {"name": "own", "train": ["heads.object"], "epochs": 1},
        {"name": "both", "freeze": ["trunk@first:50%", {"pattern": "type:BatchNorm2d", "must_match": 99}], "epochs": 1},
    ]
    changes = {"freeze_always": ["heads.depth.norm"], "optim": {"lr": {"heads.object": 1.0}}}
    file = config(tmp_path, "one", phases=phases, **changes)
    plan = design([file], [], 1, (), True)
    depth, alone = (next(job.config for job in plan.jobs if job.task == task) for task in ("depth", "object"))
    assert phase_names(depth) == ["warm", "polish", "both"]
    assert phase_names(alone) == ["warm", "object.1", "object.2", "own", "both"]
    assert [phase.config.lr for phase in (*depth.written_phases[:1], *alone.written_phases[:1])] == [
        {"heads.depth": 1e-3},
        {"heads.object": 2e-3},
    ]
    assert depth.written_phases[1].config.freeze == ["trunk", "heads", "!heads.depth"]
    assert alone.written_phases[1].config.freeze == []
    assert depth.written_phases[2].config.freeze == ["trunk@first:50%", "type:BatchNorm2d"]
    assert depth.freeze_always == ["heads.depth.norm"] and alone.freeze_always == []
    assert alone.optim.lr == {"heads.object": 1.0}
    assert depth.optim.lr == load_config(config(tmp_path, "plain"), []).optim.lr


def claim(folder: Path, plan: Design) -> None:
    with claimed(folder, plan):
        pass


def test_a_folder_takes_other_seeds_and_refuses_what_was_begun_otherwise(tmp_path: Path) -> None:
    file, out = config(tmp_path, "one"), tmp_path / "out"
    claim(out, design([file], [], 2))
    claim(out, design([file], [], 3))
    claim(out, design([file, config(tmp_path, "two")], [], 2, ["optim.lr_scale=1,2"], True))
    # A run that was begun is of one configuration; until then, it can be mended.
    config(tmp_path, "one", optim={"lr": 0.5})
    claim(out, plan := design([file], [], 2))
    (out / "runs/one-seed1").mkdir()
    claim(out, plan)
    claim(out, design([file], ["tracking.mode=disabled"], 2))
    config(tmp_path, "one", optim={"lr": 0.25})
    with pytest.raises(DesignError, match="holds one-seed1 of another configuration"):
        claim(out, design([file], [], 2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(DesignError, match="holds x, and no comparison"):
        claim(tmp_path / "full", plan)


@pytest.mark.parametrize("text", ["{", "[]", '{"jobs": ["one"]}', "", '{"code": null}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    plan = design([config(tmp_path, "one")], [], 1)
    claim(tmp_path / "out", plan)
    done = tmp_path / "out/done/one-seed0.json"
    done.write_text(text)
    with pytest.raises(DesignError, match=r"one-seed0\.json"):
        code_of(tmp_path / "out", plan.jobs[0])
    done.unlink()
    (tmp_path / "out/comparison.json").write_text(text)
    with pytest.raises(DesignError, match=r"comparison\.json"):
        claim(tmp_path / "out", plan)


def test_a_folder_that_was_claimed_by_a_process_that_died_at_once_is_continued(tmp_path: Path) -> None:
    plan = design([config(tmp_path, "one")], [], 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.comparison.json.tmp").write_text("{")
    claim(tmp_path / "out", plan)


def test_a_folder_is_one_process_alone(tmp_path: Path) -> None:
    plan = design([config(tmp_path, "one")], [], 1)
    with claimed(tmp_path / "out", plan), pytest.raises(DesignError, match="another process makes the comparison"):
        claim(tmp_path / "out", plan)
    claim(tmp_path / "out", plan)


@pytest.mark.parametrize(
    ("grid", "seeds", "message"),
    [
        (["optim.lr_scale"], 1, "--grid: expected key=value,value"),
        (["optim.lr_scale=1,"], 1, "--grid: expected key=value,value"),
        (["optim.lr_scale=1,1"], 1, "expected values that differ"),
        (["optim.lr_scale=1,1.0"], 1, "one, optim.lr_scale=1 and one, optim.lr_scale=1.0 are the same configuration"),
        (["optim.lr_scale=1,2", "optim.lr_scale=3,4"], 1, "optim.lr_scale is given twice"),
        (["seed=1,2"], 1, "--grid: seed is set by the comparison for each run; --seeds N says how many"),
        (["name=a,b"], 1, "--grid: name is set by the comparison"),
        (["tracking.mode=offline,disabled"], 1, "--grid: tracking.mode is set by the comparison"),
        ([], 0, "--seeds: expected 1 or more, got 0"),
    ],
)
def test_a_design_that_cannot_be_read_is_refused(tmp_path: Path, grid: list[str], seeds: int, message: str) -> None:
    with pytest.raises(DesignError, match=message):
        design([config(tmp_path, "one")], [], seeds, grid)


@pytest.mark.parametrize("override", ["seed=7", "name=x", "runs_dir=y", "resume=never"])
def test_an_override_of_what_the_comparison_sets_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(DesignError, match=f"--set: {override.partition('=')[0]} is set by the comparison"):
        design([config(tmp_path, "one")], [override], 1)


def test_any_file_name_makes_a_run_name(tmp_path: Path) -> None:
    names = ["pc_grad&50%", "two words", "\u03b2-mean"]
    plan = design([config(tmp_path, name) for name in names], [], 1)
    assert [job.name for job in plan.jobs] == ["pc_grad_50_-seed0", "two_words-seed0", "_-mean-seed0"]
    assert [*plan.methods] == names
    with pytest.raises(DesignError, match="two runs would have the name a_b-seed0, of a b and of a&b"):
        design([config(tmp_path, "a b"), config(tmp_path, "a&b")], [], 1)


def test_configurations_of_one_name_or_other_tasks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    one, same = config(tmp_path, "one"), config(tmp_path / "more", "one")
    with pytest.raises(DesignError, match="two configurations have this name"):
        design([one, same], [], 1)
    other = config(tmp_path, "other", tasks={"depth": TWO["depth"]})
    with pytest.raises(DesignError, match=r"expected the tasks of .*one\.yaml, depth, object; got depth"):
        design([one, other], [], 1)
    with pytest.raises(ConfigError, match=r"optim\.lrx: unknown key"):
        design([one], [], 1, ["optim.lrx=1,2"])
