"""The part of a report on what a run took over from another one, and whether the outputs of that are unchanged."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from mtl.checkpoint.run_files import HISTORY, UNCHANGED, read_history, read_unchanged
from mtl.runtime.text import count


def unchanged_html(run_dir: Path) -> str:
    """What `init_from` gave a run, and the proof of `mtl add-task`; empty for a run with neither.

    Raises:
        RunFileError: A file of the run is damaged.
    """
    history = read_history(run_dir / HISTORY) if (run_dir / HISTORY).is_file() else {}
    taken = "".join(_taken_html(item) for item in history.get("init_from", ()))
    proof = _proof_html(read_unchanged(run_dir / UNCHANGED)) if (run_dir / UNCHANGED).is_file() else ""
    return (f"<h2>Taken over</h2><ul>{taken}</ul>" if taken else "") + proof


def _taken_html(item: dict[str, Any]) -> str:
    parts = ", ".join(f"<code>{escape(name)}</code> ({count(num, 'tensor')})" for name, num in item["tensors"].items())
    return f"<li><code>{escape(item['source'])}</code>: {parts}; digest <code>{escape(item['digest'])}</code></li>"


def _proof_html(proof: dict[str, Any]) -> str:
    verdict = '<b class="ok">unchanged</b>' if proof["equal"] else '<b class="broken">changed</b>'
    body = "".join(
        f"<tr><td>{escape(task)}<td><code>{escape(digest)}</code><td>{_difference_html(proof, task)}</tr>"
        for task, digest in proof["tasks"].items()
    )
    return (
        f"<h2>Outputs of the old tasks: {verdict}</h2><p>Of <code>{escape(proof['before'])}</code> and"
        f" <code>{escape(proof['after'])}</code>, compared bit by bit on {count(proof['images'], 'image')}, in one"
        " process and on the same batches. That the weights are the same:"
        f" <code>mtl audit {escape(proof['before'])} {escape(proof['after'])} --freeze trunk"
        f" {' '.join(f'heads.{escape(task)}' for task in proof['tasks'])}</code></p>"
        f"<table><tr><th>task<th>digest of its outputs<th>differences</tr>{body}</table>"
    )


def _difference_html(proof: dict[str, Any], task: str) -> str:
    found = next((each for each in proof["differences"] if each["task"] == task), None)
    if found is None:
        return "none"
    # JSON has no number for what is not finite.
    size = "not finite" if found["max_difference"] is None else f"up to {found['max_difference']:.3g}"
    return f"{count(found['images'], 'image')}, {size}; the first is image {found['image']} of {escape(found['split'])}"
