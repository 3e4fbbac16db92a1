"""Names of tasks as names of outputs and files: letters of ASCII, digits and `_`, each once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from unicodedata import normalize

# The inputs that an exported file may have.
_TAKEN = re.compile(r"images|tokens|pooled|pyramid_\d+")


def output_names(tasks: Iterable[str]) -> dict[str, str]:
    """For each task, the name of its output: its own if that is valid and not the name of an input."""
    tasks = list(tasks)
    names: dict[str, str] = {}
    for task in sorted(tasks, key=lambda each: _plain(each) != each):
        plain = _plain(task)
        numbers = (f"{plain}_{number}" for number in range(2, len(tasks) + 2))
        names[task] = next(each for each in (plain, *numbers) if each not in names.values())
    return {task: names[task] for task in tasks}


def _plain(task: str) -> str:
    text = normalize("NFKD", task).encode("ascii", "ignore").decode()
    text = re.sub(r"\W", "_", text)
    return f"task_{text}" if not re.match(r"[A-Za-z_]", text) or _TAKEN.fullmatch(text) else text
