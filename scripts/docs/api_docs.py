"""Makes docs/python_api.md: the public Python names, from their signatures and docstrings.

python scripts/docs/api_docs.py                                # prints the page
python scripts/docs/api_docs.py --write docs/python_api.md     # writes it
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import mtl
from written import write_page

HEAD = """# Python names

`python scripts/docs/api_docs.py --write docs/python_api.md` makes this page from signatures and docstrings; a test
keeps it up to date. `import mtl` loads nothing else: each of its names is imported when it is first used.

Classes of your own have pages with a complete file each: [data sets](own_data.md), [tasks](own_task.md),
[heads](own_head.md), [losses](own_loss.md), [balancing methods](own_balancing.md), [schedules](own_lr_schedule.md),
[transforms](transforms.md). Everything else in the package is internal, and may change.
"""

# Titles, and the names below them; what `import mtl` offers and is in none of them comes first.
SECTIONS = {
    "Freezing": [
        *("mtl.plan_freeze", "mtl.enforce", "mtl.freeze.trainable_parameters", "mtl.freeze.FreezePlan"),
        *("mtl.freeze.FreezeError", "mtl.patterns.Counted", "mtl.patterns.PatternError"),
    ],
    "The audit": [
        *("mtl.GradientAudit", "mtl.attach"),
        *("mtl.audit.lightning.AuditCallback", "mtl.audit.huggingface.AuditCallback"),
        *("mtl.audit.Report", "mtl.audit.report.PhaseRecord", "mtl.audit.report.Finding"),
        *("mtl.audit.Violation", "mtl.audit.Hazard", "mtl.audit.AuditError"),
    ],
    "The scheduler": ["mtl.TaskScheduler"],
    "Balancing": ["mtl.TaskWeights"],
}
_HEADINGS = ("Args", "Attributes", "Returns", "Raises", "Yields")


def names() -> dict[str, list[str]]:
    """The public names by section."""
    listed = {name for section in SECTIONS.values() for name in section}
    rest = [f"mtl.{name}" for name in mtl.__all__ if name != "__version__" and f"mtl.{name}" not in listed]
    of_runs = ["mtl.training.result.RunResult", "mtl.results.trained.TrainedModel", "mtl.results.trained.Origin"]
    return {"Runs": [*rest, *of_runs]} | SECTIONS


def find(name: str) -> Any:
    """The object of a dotted name."""
    module, _, own = name.rpartition(".")
    return getattr(import_module(module), own)


def is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == mtl.__name__


def signature(thing: Any, name: str) -> str:
    """A call as one writes it: names and defaults, without annotations."""
    found = inspect.signature(thing)
    kept = [each.replace(annotation=each.empty) for each in found.parameters.values() if each.name != "self"]
    return f"{name}{found.replace(parameters=kept, return_annotation=found.empty)}".replace("<factory>", "...")


def parts(text: str) -> dict[str, str]:
    """The sections of a docstring by heading; what comes first has none."""
    found = {"": ""}
    heading = ""
    for line in inspect.cleandoc(text).splitlines():
        title = re.fullmatch(rf"({'|'.join(_HEADINGS)}):(.*)", line)
        if title:
            heading = title[1]
            found[heading] = title[2].strip()
        else:
            found[heading] += f"\n{line}"
    return found


def entries(text: str) -> Iterator[tuple[str, str]]:
    """The entries of a section, `name: meaning`, each of which may continue in lines that are indented further."""
    items = re.split(r"\n(?=\S)", inspect.cleandoc(text))
    for item in items:
        name, colon, meaning = item.partition(":")
        yield (f"`{name}`", " ".join(meaning.split())) if colon else ("", " ".join(item.split()))


def table(header: str, text: str) -> str:
    rows = [f"| {name} | {_in_cell(meaning)} |" for name, meaning in entries(text)]
    return "\n".join([f"| {header} | |", "|---|---|", *rows])


def _in_cell(text: str) -> str:
    return text.replace("|", r"\|")


def paragraphs(text: str) -> str:
    """Prose as it is; code in it is indented already."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def described(text: str) -> Iterator[str]:
    """A docstring in Markdown."""
    found = parts(text)
    if found[""].strip():
        yield paragraphs(found[""])
    for heading, header in (("Args", "argument"), ("Attributes", "attribute")):
        if heading in found:
            yield table(header, found[heading])
    if "Returns" in found:
        yield f"Returns: {' '.join(found['Returns'].split())}"
    if "Raises" in found:
        own = found["Raises"]
        yield table("raises", own) if own.startswith("\n") else f"Raises: {' '.join(own.split())}"


def methods(kind: type) -> str:
    """The public methods and properties of a class, each with the first sentence that is said of it."""
    rows = []
    for name, member in vars(kind).items():
        text = inspect.getdoc(member)
        # What a framework calls is called `on_...`.
        is_called = inspect.isfunction(member) or isinstance(member, property)
        if name.startswith(("_", "on_")) or not text or not is_called:
            continue
        shown = f"{name}" if isinstance(member, property) else signature(member, name)
        rows.append(f"| `{_in_cell(shown)}` | {_in_cell(' '.join(text.partition(chr(10) * 2)[0].split()))} |")
    return "\n".join(["| method | |", "|---|---|", *rows]) if rows else ""


def entry(name: str) -> str:
    """All that is said of a public name."""
    thing = find(name)
    pieces = [f"### `{name}`"]
    is_error = isinstance(thing, type) and issubclass(thing, Exception)
    if not is_error:
        pieces.append(f"    {signature(thing, name.rpartition('.')[2])}")
    pieces += described(thing.__doc__ or "")
    if isinstance(thing, type) and not is_error:
        own = [vars(base)["__init__"] for base in thing.__mro__ if "__init__" in vars(base) and is_ours(base)]
        pieces += described(own[0].__doc__ or "") if own else ()
        pieces.append(methods(thing))
    return "\n\n".join(piece for piece in pieces if piece)


def page() -> str:
    """The page."""
    sections = ["\n\n".join([f"## {title}", *(entry(name) for name in section)]) for title, section in names().items()]
    return "\n\n".join([HEAD.strip(), *sections]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    write_page(page, __doc__, arguments)


if __name__ == "__main__":
    main()
