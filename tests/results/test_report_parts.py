"""The pieces of a report, each from files that are written by hand: no training, no model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from html_checks import Outline
from mtl.checkpoint.run_files import RunFileError
from mtl.results.report.chart import ChartLine, line_chart, nice_ticks
from mtl.results.report.conflicts import conflicts_html, spread_of
from mtl.results.report.curves import curves_html
from mtl.results.report.dividend import dividend_html, saving_of
from mtl.results.report.freeze_map import state_of
from mtl.results.report.markup import Html, number, seconds, signed, tag
from mtl.results.report.page import page
from mtl.results.report.palette import COLOURS, MOST_HEAT, NUM_LINES
from mtl.results.report.results import best_of, verdict
from mtl.results.report.run import RunFiles, flat, read_run
from mtl.results.report.write import run_page
from run_folders import NASTY, finding, phase_audit, phase_plan, run_content, write_run

Change = Callable[[dict[str, Any]], object]


def read(folder: Path, content: dict[str, Any]) -> RunFiles:
    return read_run(write_run(folder, content))


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    return read(tmp_path / "run", run_content())


# --- escaping


@given(st.text(alphabet="<>&\"'ab=/ ", max_size=12))
def test_text_in_elements_and_attributes_is_read_back_as_it_was(text: str) -> None:
    class Reader(Outline):
        def __init__(self, markup: str) -> None:
            self.data, self.attribute = "", ""
            super().__init__(markup)

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.attribute = dict(attrs).get("title") or ""
            super().handle_starttag(tag, attrs)

        def handle_data(self, data: str) -> None:
            self.data += data

    try:
        read_back = Reader(tag("p", text, title=text))
    except IndexError:
        pytest.fail("the text was read as markup")
    assert (read_back.data, read_back.attribute) == (text, text)


def test_markup_is_not_escaped_twice_and_attributes_have_their_names() -> None:
    inner = tag("b", "1 < 2")
    assert tag("p", inner, "&", None, class_="x", aria_label="y", id=None) == Html(
        '<p class="x" aria-label="y"><b>1 &lt; 2</b>&amp;</p>'
    )
    assert tag("meta", name="viewport") == '<meta name="viewport">'


def test_names_of_the_users_are_escaped_in_every_part(tmp_path: Path) -> None:
    content = run_content(task=NASTY, phases=(NASTY, "fine"))
    content["config.yaml"]["trunk"]["name"] = NASTY
    content["history.json"] = {
        "command": NASTY,
        "from": NASTY,
        "changes": [{"step": 1, "key": NASTY, "old": NASTY, "new": NASTY}],
    }
    found = finding(NASTY, **dict.fromkeys(("kind", "phase", "cause", "detail", "pattern"), NASTY))
    content["audit.json"]["phases"][0] |= {
        "freeze": [NASTY],
        "violations": [found],
        "hazards": [found],
        "unproven": NASTY,
    }
    content["plan.json"]["phases"][0] |= phase_plan(NASTY, [(NASTY, 2, 1, 0)]) | {"freeze": [NASTY], "train": [NASTY]}
    content["plan.json"]["phases"][1]["parts"] = content["plan.json"]["phases"][0]["parts"]
    session = content["results.json"]["sessions"][0]
    session |= {"device": NASTY, "gpu": NASTY, "git_commit": NASTY, "tracked_at": f"javascript:{NASTY}"}
    session["machine"] = dict.fromkeys(session["machine"], NASTY) | {"memory_bytes": None}
    analysis = {"grad/norm/x": 1.0, f"grad/norm/x/{NASTY}": 1.0, "grad/unreached": 0, "step": 1, "phase": NASTY}
    content["metrics.jsonl"] += [
        analysis | {f"grad/cosine/x/{NASTY}": 0.5, f"grad/magnitude_similarity/x/{NASTY}": 1.0}
    ]
    shown = run_page(read(tmp_path / "run", content), Html())
    assert Outline(shown).mistakes == []
    assert "<b>&" not in shown and "a<b>" not in shown
    assert shown.count("a&lt;b&gt;&amp;&quot;c") > 40
    assert 'href="javascript' not in shown


def test_an_address_of_a_tracking_service_is_a_link(tmp_path: Path) -> None:
    content = run_content()
    content["results.json"]["sessions"][0]["tracked_at"] = "https://wandb.ai/a/b/runs/c"
    shown = run_page(read(tmp_path / "run", content), Html())
    assert '<a href="https://wandb.ai/a/b/runs/c" rel="noreferrer noopener">' in shown


# --- results and the verdict


@pytest.mark.parametrize(
    ("values", "direction", "expected"),
    [
        ([0.1, 0.4, 0.3], "higher", {1}),
        ([0.1, 0.4, 0.3], "lower", {0}),
        ([0.4, None, 0.4], "higher", {0, 2}),
        ([math.nan, 0.2, 0.1], "lower", {2}),
        ([0.1, 0.4], None, set()),
        ([None, 0.4], "higher", set()),
    ],
)
def test_the_best_of_a_row_follows_the_direction(
    values: list[float | None], direction: str | None, expected: set[int]
) -> None:
    assert best_of(values, direction) == expected


VERDICTS: dict[str, Change] = {
    "clean": lambda _: None,
    "violations": lambda audit: audit["phases"][1].update(violations=[finding("trunk.x")], ok=False),
    "not finished": lambda audit: (audit["phases"][1].update(completed=False), audit.update(ok=False)),
    "not proven": lambda audit: (audit["phases"][0].update(unproven="no step was seen"), audit.update(ok=False)),
}


@pytest.mark.parametrize("expected", VERDICTS)
def test_the_verdict_is_the_audits(tmp_path: Path, expected: str) -> None:
    content = run_content()
    VERDICTS[expected](content["audit.json"])
    assert verdict(read(tmp_path / "run", content)) == expected


def test_a_violation_of_another_rank_is_one_of_the_run(tmp_path: Path) -> None:
    content = run_content()
    broken = phase_audit("warm", violations=[finding("trunk.y")], ok=False)
    content["audit.rank-1.json"] = {"ok": False, "phases": [broken]}
    run = read(tmp_path / "run", content)
    assert verdict(run) == "violations"
    assert "rank 1: phase warm, steps 2 to 3, <code>trunk.y</code>" in run_page(run, Html())


def test_findings_that_differ_only_in_name_are_one_entry_with_cause_and_pattern(tmp_path: Path) -> None:
    content = run_content()
    found = [finding(f"trunk.w{place}", max_abs=place / 10) for place in range(6)]
    content["audit.json"]["phases"][0]["violations"] = [*found, finding("trunk.other", step=4)]
    content["audit.json"]["phases"][0]["hazards"] = [finding("heads.x", kind="in_optimizer", cause="built too early")]
    shown = run_page(read(tmp_path / "run", content), Html())
    names = "trunk.w0, trunk.w1, trunk.w2, trunk.w3 and 2 more"
    assert f"<li>phase warm, steps 2 to 3, 6 tensors: <code>{names}</code>: <b>param_changed</b>" in shown
    assert "its bytes differ (by up to 0.5); frozen by <code>trunk</code>" in shown
    assert "likely cause: </span>built too early" in shown
    assert shown.count("<li>phase warm") == 3


def test_thousands_of_findings_are_counted(tmp_path: Path) -> None:
    content = run_content()
    content["audit.json"]["phases"][0]["violations"] = [finding("trunk.w", step=step) for step in range(5000)]
    shown = run_page(read(tmp_path / "run", content), Html())
    assert "<li>and 4960 more; see audit.json</li>" in shown and len(shown) < 2_000_000


# --- phases, the freeze map, the dividend


def test_spans_are_the_steps_of_each_phase_with_times_and_reasons(run: RunFiles) -> None:
    spans = [(span.name, span.begin, span.end, span.epochs, span.train_s, span.reason) for span in run.spans]
    assert spans == [("warm", 0, 4, 2, 10.0, "2 epochs done"), ("fine", 4, 8, 2, 20.0, "plateau of val/score")]


def test_a_phase_that_has_not_ended_and_one_that_has_not_begun_are_said(tmp_path: Path) -> None:
    content = run_content()
    content["results.json"]["phases"].pop()
    content["audit.json"] = {"ok": False, "phases": [phase_audit("warm"), phase_audit("fine", completed=False)]}
    content["plan.json"]["phases"].append(phase_plan("polish"))
    del content["checkpoints/last/state.json"]["scores"]["fine"]
    shown = run_page(read(tmp_path / "run", content), Html())
    outline = Outline(shown)
    assert outline.row("2", "fine")[-1] == "it has not ended"
    assert "Not begun: polish." in shown
    assert outline.row("task", "metric")[3:] == ["trivial", "warm", "beststep 8"]


@pytest.mark.parametrize(
    ("count", "frozen", "unreached", "expected"),
    [
        *((4, 4, 0, "frozen"), (4, 0, 0, "trained"), (4, 1, 0, "partly")),
        *((4, 0, 4, "idle"), (4, 1, 3, "idle"), (4, 1, 1, "partly"), (4, 0, 1, "trained")),
    ],
)
def test_a_part_is_frozen_trained_both_or_unreached(count: int, frozen: int, unreached: int, expected: str) -> None:
    assert state_of({"count": count, "frozen": frozen, "unreached": unreached}) == expected


def test_the_estimate_of_the_naive_loop_is_that_of_a_table_by_hand(run: RunFiles) -> None:
    warm, fine = run.spans
    flops = {"forward": 10, "backward": 10, "forward_of_all": 10, "backward_of_all": 30}
    # 10 images took 2 s to compute; 60 were read, of which 10 had been computed: 50 times 0.2 s are saved.
    saving = saving_of(warm, flops)
    assert saving is not None
    assert (saving.train_s, saving.naive_s, saving.whole_s) == (10.0, pytest.approx(20.0), pytest.approx(40.0))
    nothing = saving_of(fine, None)
    assert nothing is not None and (nothing.naive_s, nothing.whole_s) == (20.0, None)
    shown = dividend_html(run)
    assert "Estimate: <b>10 s saved of 40 s (25%)</b>" in shown
    cells = ["all", "", "30 s", "40 s", "80 s", ""]
    assert [cells] == [row for row in Outline(f'<html lang="en"><h1></h1>{shown}</html>').cells if row[0] == "all"]


def test_features_of_an_earlier_run_were_timed_on_one_batch(run: RunFiles) -> None:
    warm = run.spans[0]
    kept = {"kept_in": "disk", "modules": 3, "image_s": 0.1, "num_computed": 0, "compute_s": 0.0, "num_read": 60}
    saving = saving_of(type(warm)(**{**vars(warm), "kept": kept}), None)
    assert saving is not None and saving.naive_s == pytest.approx(16.0)


# --- charts


@given(
    st.floats(-1e9, 1e9, allow_subnormal=False),
    st.floats(1e-6, 1e9),
)
def test_ticks_cover_the_values_evenly_and_are_few(low: float, width: float) -> None:
    width = max(width, 1e-6 * abs(low))
    ticks = nice_ticks(low, low + width)
    size = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low + 1e-6 * size + 1e-9 * abs(low) and ticks[-1] >= low + width - 1e-6 * size - 1e-9 * abs(low)
    assert all(b - a == pytest.approx(size, rel=1e-3) for a, b in pairwise(ticks))


def test_ticks_of_one_value_lie_around_it() -> None:
    assert nice_ticks(0.0, 0.0)[0] < 0 < nice_ticks(0.0, 0.0)[-1]
    assert nice_ticks(2.0, 2.0)[0] < 2 < nice_ticks(2.0, 2.0)[-1]


def places(chart: str) -> list[list[tuple[float, float]]]:
    """The points of each line of a chart."""
    lines = re.findall(r'<polyline points="([^"]+)"', chart)
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())] for line in lines]


def test_a_chart_puts_points_where_they_belong_and_breaks_at_what_is_no_number() -> None:
    chart = line_chart("t", [ChartLine("a", [(0, 0.0), (50, 1.0), (75, math.nan), (90, None), (100, 4.0)])])
    # The plot area is 46 to 332 wide and, downwards, 16 to 168 high; ticks are 0, 1, ..., 4.
    assert places(chart) == [[(46.0, 168.0), (189.0, 130.0)], [(332.0, 16.0)]]
    assert "<title>a, step 50: 1.0000</title>" in chart
    assert "<title>t: a from 0.0000 to 4.0000, between 0.0000 and 4.0000</title>" in chart


def test_thousands_of_points_become_means_with_their_range() -> None:
    chart = line_chart("t", [ChartLine("a", [(step, float(step % 2)) for step in range(16_000)])])
    (line,) = places(chart)
    assert len(line) == 160 and {y for _, y in line} == {92.0}
    assert chart.count("<polygon") == 1 and len(chart) < 12_000


def test_a_chart_without_a_number_is_none() -> None:
    assert line_chart("t", [ChartLine("a", [(1, None), (2, math.nan)])]) == ""
    assert line_chart("t", []) == ""


def test_phases_are_bands_with_numbers(run: RunFiles) -> None:
    chart = line_chart("t", [ChartLine("a", [(2, 1.0), (8, 2.0)])], run.spans, mark=("trivial", 0.5))
    assert '<rect x="46" y="16" width="143" height="152" class="band"></rect>' in chart
    assert re.findall(r'text-anchor="middle">(\d)</text>', chart)[:2] == ["1", "2"]
    assert "dashed: trivial 0.5000" in chart and 'class="zero"' in chart


def test_a_mark_that_is_far_away_is_said_and_not_drawn() -> None:
    lines = [ChartLine("a", [(0, 1.0), (1, 2.0)])]
    near, far = (line_chart("t", lines, mark=("trivial", value)) for value in (5.0, 5.1))
    assert "dashed: trivial 5.0000" in near and near.count('class="zero"') == 1
    assert "<small>trivial 5.1000</small>" in far and 'class="zero"' not in far


def test_curves_show_validation_losses_rates_and_speed(run: RunFiles) -> None:
    shown = curves_html(run)
    captions = re.findall(r"<figcaption>([^<]+)", shown)
    assert captions == [
        *("depth rmse", "depth delta1", "balanced loss", "depth", "gradient norm"),
        *("learning rate", "training images a second"),
    ]
    assert "dashed: trivial 0.0500" in shown


def test_rates_of_groups_are_lines_of_one_chart(tmp_path: Path) -> None:
    content = run_content()
    for row in content["metrics.jsonl"]:
        if "train/lr" in row:
            row |= {"train/lr/trunk": 1e-4, "train/lr/heads": 1e-3}
    shown = curves_html(read(tmp_path / "run", content))
    assert re.findall(r'class="line tint-\d"></i>(\w+)', shown) == ["highest", "trunk", "heads"]


# --- conflicts


def analysis(step: int, cosine: float | None, phase: str = "fine") -> dict[str, Any]:
    row = {"step": step, "phase": phase, "grad/unreached": 0}
    row |= {f"grad/norm/{task}": 1.0 for task in "ab"} | {f"grad/norm/{task}/00 w": 10.0**step for task in "ab"}
    return row | {"grad/cosine/a/b": cosine, "grad/magnitude_similarity/a/b": 1.0}


def test_a_spread_is_median_and_range_of_what_is_finite() -> None:
    spread = spread_of([0.3, math.nan, -0.1, 0.2])
    assert (spread.median, spread.low, spread.high, spread.num) == (0.2, -0.1, 0.3, 3)
    assert str(spread) == "0.20 (-0.10 to 0.30)"
    assert str(spread_of([math.nan])) == "not defined" and str(spread_of([-0.001])) == "0.00"


def test_conflicts_are_medians_over_the_analyses_of_a_phase(tmp_path: Path) -> None:
    content = run_content()
    content["metrics.jsonl"] += [analysis(5, -0.4), analysis(6, None), analysis(7, -0.2), analysis(8, 0.1)]
    shown = conflicts_html(read(tmp_path / "run", content))
    assert "<h3>fine: 4 analyses, step 5 to 8</h3>" in shown
    cell = '<td class="warm" style="--share:12%">-0.20<small>-0.40 to 0.10</small></td>'
    assert shown.count(cell) == 2
    assert shown.count("<circle") == 3
    assert "6.5<small>5.0 to 8.0</small>" in shown
    assert conflicts_html(read(tmp_path / "other", run_content())) == ""


def test_analyses_of_hundreds_of_phases_do_not_make_the_page_too_large(tmp_path: Path) -> None:
    content, tasks = run_content(), [f"t{number}" for number in range(16)]
    row: dict[str, Any] = {f"grad/norm/{task}": 1.0 for task in tasks}
    for one, other in combinations(tasks, 2):
        row |= {f"grad/cosine/{one}/{other}": 0.5, f"grad/magnitude_similarity/{one}/{other}": 1.0}
    rows = [row | {"grad/unreached": 0, "step": step, "phase": f"p{step // 3}"} for step in range(300)]
    content["metrics.jsonl"] += rows
    shown = conflicts_html(read(tmp_path / "run", content))
    num_shown = shown.count("<h3>")
    assert 10 < num_shown < 100 and len(shown) < 1_700_000
    assert f"Left out, see metrics.jsonl: p{num_shown}, " in shown and shown.endswith("p99.</p>")


# --- the palette


def luminance(colour: tuple[float, float, float]) -> float:
    """WCAG 2.2's relative luminance of red, green and blue from 0 to 1."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def rgb(name: str, scheme: int) -> tuple[float, float, float]:
    text = COLOURS[name][scheme]
    return int(text[1:3], 16) / 255, int(text[3:5], 16) / 255, int(text[5:7], 16) / 255


def test_the_contrast_is_that_of_the_standard() -> None:
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    grey = (0x77 / 255,) * 3
    assert contrast(grey, (1, 1, 1)) == pytest.approx(4.48, abs=0.005)


# Text, and what it stands on: each at least 4.5 to 1 (WCAG 2.2, 1.4.3), in both schemes.
TEXT_ON: tuple[tuple[str, str], ...] = (
    *((text, ground) for text in ("text", "muted", "link", "good", "bad", "warn") for ground in ("page", "card")),
    *(("text", "shade"), ("muted", "shade")),
    *((f"{name}-text", name) for name in ("frozen", "trained", "partly", "idle")),
    *((f"line-{number}", ground) for number in range(NUM_LINES) for ground in ("card", "shade")),
)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(("text", "ground"), TEXT_ON)
def test_every_text_and_line_has_enough_contrast_to_its_ground(text: str, ground: str, scheme: int) -> None:
    assert contrast(rgb(text, scheme), rgb(ground, scheme)) >= 4.5


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("heat", ["cold", "warm"])
def test_text_on_the_strongest_heat_is_legible(heat: str, scheme: int) -> None:
    pairs = zip(rgb(heat, scheme), rgb("card", scheme), strict=True)
    red, green, blue = (MOST_HEAT * own + (1 - MOST_HEAT) * other for own, other in pairs)
    assert contrast(rgb("text", scheme), (red, green, blue)) >= 4.5


def test_the_style_has_no_colour_that_is_not_in_the_palette() -> None:
    shown = page("t", "k", None, {}, None)
    style = re.search(r"<style>(.*?)</style>", shown, re.DOTALL)
    assert style is not None
    outside = re.sub(r"--[\w-]+:#[0-9a-f]{6};", "", style[1])
    # Paper is white.
    assert re.findall(r"#[0-9a-f]{3,8}\b|rgba?\(|hsl", outside) == ["#fff"]
    used = set(re.findall(r"var\(--([\w-]+)\)", style[1])) - {"tint", "share"}
    assert used <= COLOURS.keys() and NUM_LINES == 8
    texts = set(re.findall(r"[{;]color:var\(--([\w-]+)\)", style[1]))
    assert texts <= {text for text, _ in TEXT_ON}


# --- files


def test_durations_and_numbers_are_short() -> None:
    assert [seconds(each) for each in (0.25, 42.4, 200, 9000, None)] == ["0.2 s", "42 s", "3.3 min", "2.5 h", "\u2013"]
    assert [number(each) for each in (0.12345, 46.4417, 0, 1e-5, 12345.0, None)] == [
        *("0.1235", "46.4417", "0.0000", "1e-05", "1.234e+04", "\u2013")
    ]
    assert [signed(each, 2) for each in (-0.001, 0.129)] == ["0.00", "0.13"]


def test_a_configuration_is_flat_with_phases_by_name() -> None:
    config = {
        "a": {"b": 1, "c": {}},
        "phases": [{"name": "x", "lr": 0.1}, {"repeat": 2, "phases": [{"name": "y", "n": 1}]}],
    }
    assert flat(config) == {
        "a.b": "1",
        "a.c": "{}",
        "phases.x.lr": "0.1",
        "phases.1.repeat": "2",
        "phases.1.phases.y.n": "1",
    }


DAMAGE = {
    "config.yaml": "name: [",
    "metrics.jsonl": "[]\n",
    "audit.json": "{",
    "plan.json": '{"phases": 3}',
    "results.json": '{"tasks": {}}',
    "history.json": "[]",
    "data.json": "null",
    "checkpoints/last/state.json": "",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", run_content())
    (folder / name).write_text(DAMAGE[name])
    with pytest.raises(RunFileError, match=re.escape(str(folder / name))):
        read_run(folder)
