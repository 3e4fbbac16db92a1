"""Tensors that a run loaded from another run, and whether that run's outputs are unchanged."""

from __future__ import annotations

from typing import Any

from mtl.results.report.markup import Html, Piece, code, joined, left_title, separated, table, tag, text_cell
from mtl.results.report.run import RunFiles
from mtl.runtime.text import count


def taken_over_html(run: RunFiles) -> Html:
    """The tensors that `init_from` gave the run, and the proof of `mtl add-task`; empty for a run with neither."""
    pieces: list[Piece] = []
    if taken := run.history.get("init_from", ()):
        pieces.append(tag("ul", *(_taken(item) for item in taken)))
    if run.unchanged:
        pieces += _proof(run.unchanged)
    return joined(pieces)


def _taken(item: dict[str, Any]) -> Html:
    parts = [joined([code(name), f" ({count(num, 'tensor')})"]) for name, num in item["tensors"].items()]
    return tag("li", code(item["source"]), ": ", separated(parts, ", "), "; digest ", code(item["digest"]))


def _proof(proof: dict[str, Any]) -> list[Piece]:
    verdict = tag("b", "unchanged", class_="good") if proof["equal"] else tag("b", "changed", class_="bad")
    heads = " ".join(f"heads.{task}" for task in proof["tasks"])
    what = f"Compared bit by bit on {count(proof['images'], 'image')}, in one process and on the same batches. "
    again = f"mtl audit {proof['before']} {proof['after']} --freeze trunk {heads}"
    rows = [
        [task, text_cell(code(digest)), text_cell(_difference(proof, task))] for task, digest in proof["tasks"].items()
    ]
    titles = ["task", left_title("digest of its outputs"), left_title("differences")]
    return [
        tag("h3", "Outputs of the old tasks: ", verdict),
        tag("p", what, "That the weights are the same:"),
        tag("pre", again),
        table("Outputs of the old tasks", titles, rows),
    ]


def _difference(proof: dict[str, Any], task: str) -> str:
    found = next((each for each in proof["differences"] if each["task"] == task), None)
    if found is None:
        return "none"
    # JSON has no number for what is not finite.
    size = "not finite" if found["max_difference"] is None else f"up to {found['max_difference']:.3g}"
    return f"{count(found['images'], 'image')}, {size}; the first is image {found['image']} of {found['split']}"
