"""The pages in a real browser: nothing is said, nothing is asked for, nothing is wider than the window."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from browser import NAMES, Browser, find_browser, started_browser
from html_checks import Outline
from mtl.cli import main
from mtl.results.report.markup import Html
from mtl.results.report.palette import COLOURS
from mtl.results.report.run import read_run
from mtl.results.report.write import run_page
from run_folders import finding, phase_audit, phase_plan, run_content, write_run

PROGRAM = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason=f"no browser here: none of {', '.join(NAMES)} in PATH"),
]

# Names that leave no place to break a line.
LONG = "trunk." + "a" * 150
WIDTHS = (390, 768, 1280)


def many_of_all() -> dict[str, Any]:
    """A run of 40 phases and 12 tasks, with gradients of all of them, and a violation in each phase."""
    content = run_content("many")
    phases, tasks = [f"thaw-block-{number}" for number in range(40)], [f"task-{number}" for number in range(12)]
    rows: list[dict[str, Any]] = []
    for step in range(1, 2001):
        common = {"step": step, "epoch": step // 50, "phase": phases[(step - 1) // 50]}
        losses = {f"train/loss/{task}": 1 / step for task in tasks}
        rows.append({**common, **losses, "train/loss": 1 / step, "train/grad_norm": 1.0, "train/lr": 0.1})
        if step % 25 == 0:
            pairs = {f"grad/cosine/{a}/{b}": 0.1 for a, b in combinations(tasks, 2)}
            alike = {key.replace("cosine", "magnitude_similarity"): 1.0 for key in pairs}
            norms = {f"grad/norm/{task}": 1.0 for task in tasks} | {f"grad/norm/{task}/00 stem": 1.0 for task in tasks}
            rows.append({**common, **pairs, **alike, **norms, "grad/unreached": 0})
        if step % 50 == 0:
            rows.append({**common, "val/score": 0.5} | {f"val/{task}/rmse": 1.0 for task in tasks})
    content["metrics.jsonl"] = rows
    content["audit.json"] = {
        "ok": False,
        "phases": [phase_audit(name, violations=[finding(LONG, phase=name)]) for name in phases],
    }
    parts = [(f"{number:02d} blocks.{number}", 2, number % 3, 0) for number in range(40)]
    content["plan.json"]["phases"] = [phase_plan(name, parts) for name in phases]
    content["results.json"]["phases"] = []
    return content


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert PROGRAM is not None
    with started_browser(PROGRAM) as one:
        yield one


@pytest.fixture(scope="module")
def pages(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of a real run, a comparison of runs with long names and many phases, and a faulty page."""
    folder = tmp_path_factory.mktemp("pages")
    runs = []
    for name in ("b" * 60, "two", "three"):
        content = run_content(name, task=f"task-{name}")
        content["history.json"]["command"] = LONG
        content["config.yaml"]["trunk"]["weights"] = f"{LONG}/{name}"
        content["audit.json"]["phases"][0]["hazards"] = [finding(LONG, cause=LONG)]
        runs.append(str(write_run(folder / name, content)))
    assert main(["report", *runs, "--out", str(folder / "compare.html")]) == 0
    faulty = folder / "faulty.html"
    faulty.write_text(
        "<meta charset=utf-8><img src='picture.png'><p style='width:3000px;color:#aaa'>x</p>"
        "<script>console.error('oops')</script>"
    )
    many = folder / "many.html"
    many.write_text(run_page(read_run(write_run(folder / "many", many_of_all())), Html()))
    return {"report": finished / "report.html", "many": many, "comparison": folder / "compare.html", "faulty": faulty}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "comparison", "many"])
def test_a_page_is_silent_asks_for_nothing_and_fits(
    browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    visit = browser.visit(pages[name], width, scheme=scheme)
    assert visit.messages == []
    assert visit.requests == []
    # With everything unfolded.
    browser.evaluate(visit, "document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.evaluate(visit, "innerWidth") == width
    assert browser.evaluate(visit, "document.documentElement.scrollWidth") <= width
    ground = browser.evaluate(visit, "getComputedStyle(document.body).backgroundColor")
    page = COLOURS["page"][scheme == "dark"]
    assert ground == f"rgb({', '.join(str(int(page[at : at + 2], 16)) for at in (1, 3, 5))})"
    # Every picture is there and has a size.
    sizes = browser.evaluate(visit, "[...document.images].map(each => each.naturalWidth * each.offsetWidth)")
    assert len(sizes) == (42 if name == "report" else 0) and all(sizes)


def test_a_page_of_much_is_still_small_and_whole(pages: dict[str, Path]) -> None:
    page = pages["many"].read_text()
    assert len(page.encode()) < 2_000_000
    assert Outline(page).mistakes == []


def test_a_table_that_is_wider_than_the_window_scrolls_in_its_own_box(browser: Browser, pages: dict[str, Path]) -> None:
    visit = browser.visit(pages["comparison"], 390)
    boxes = browser.evaluate(
        visit, "[...document.querySelectorAll('.scroll')].map(each => [each.scrollWidth, each.clientWidth])"
    )
    assert any(inner > outer for inner, outer in boxes)
    assert all(outer <= 390 for _, outer in boxes)


def test_what_the_checks_look_for_is_found_on_a_faulty_page(browser: Browser, pages: dict[str, Path]) -> None:
    visit = browser.visit(pages["faulty"], 390)
    assert any("oops" in message for message in visit.messages)
    assert [address.rsplit("/", 1)[1] for address in visit.requests] == ["picture.png"]
    assert browser.evaluate(visit, "document.documentElement.scrollWidth") > 390
    assert len(browser.evaluate(visit, FAINT)) == 1


def test_texts_on_the_page_have_the_contrast_of_the_standard(browser: Browser, pages: dict[str, Path]) -> None:
    for scheme in ("light", "dark"):
        visit = browser.visit(pages["report"], 1280, scheme=scheme)
        assert browser.evaluate(visit, FAINT) == []


# Texts whose colour and ground, as they are drawn, are closer than 4.5 to 1, by the formula of WCAG 2.2.
FAINT = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let each = element; each; each = each.parentElement) {
      const found = rgba(getComputedStyle(each).backgroundColor);
      if (found[3] === 255) return found.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest('.sr, caption, svg title')) continue;
    const style = getComputedStyle(element);
    const text = light(rgba(element.closest('svg') ? style.fill : style.color).slice(0, 3));
    const below = light(ground(element.closest('svg') ? element.closest('svg').parentElement : element));
    const ratio = (Math.max(text, below) + 0.05) / (Math.min(text, below) + 0.05);
    if (ratio < 4.5) faint.push(`${element.outerHTML.slice(0, 80)}: ${ratio.toFixed(2)}`);
  }
  return faint;
})()"""
