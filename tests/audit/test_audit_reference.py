"""docs/audit_reference.md has every kind and every cause that the audit can report, and none that it cannot."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from mtl import GradientAudit
from mtl.audit.report import LIVENESS, Finding

ROOT = Path(__file__).parents[2]
WATCH = ROOT / "mtl/audit/watch"
PAGE = (ROOT / "docs/audit_reference.md").read_text(encoding="utf-8")
# Constants of causes.py that are parts of others.
PARTS = {"FROM_TRAINABLE", "_FLAG"}


def rows_below(heading: str) -> list[list[str]]:
    """The rows of the table below a heading, each as its cells."""
    lines = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    table = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]


def kinds_below(heading: str) -> list[str]:
    return [kind for row in rows_below(heading) for kind in re.findall(r"`(\w+)`", row[0])]


HEADINGS = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
OF_CAUSES = HEADINGS[HEADINGS.index("What changed the bytes") :]


def text_of(node: ast.expr | None) -> str | None:
    """A text as it is written, with … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{[^}]*\}", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" for part in node.values)
    return None


def texts(file: Path) -> Iterator[str]:
    """The causes of a file: its constants, and what its functions return."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id not in PARTS and (text := text_of(node.value)):
                yield text
        elif isinstance(node, ast.FunctionDef) and node.name.startswith(("of_", "_of_", "cause_of")):
            for each in ast.walk(node):
                if isinstance(each, ast.Return):
                    both = [each.value.body, each.value.orelse] if isinstance(each.value, ast.IfExp) else [each.value]
                    yield from (text for value in both if (text := text_of(value)))


def test_the_page_has_every_cause_of_the_code_and_no_other() -> None:
    written = {cause for name in ("causes.py", "change_causes.py") for cause in texts(WATCH / name)}
    heads = {cause.split(";")[0].replace("`", "") for cause in written}
    documented = [row[0] for heading in OF_CAUSES for row in rows_below(heading)]
    assert len(documented) == len(set(documented))
    assert heads - set(documented) == set() and set(documented) - heads == set()
    assert len(heads) > 60


def test_every_text_of_a_cause_stands_in_the_two_files_that_the_page_is_compared_with() -> None:
    for file in sorted(WATCH.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "cause":
                assert text_of(node.value) is None, f"{file.name}:{node.value.lineno}"
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "cause":
                assert text_of(node.value) is None, f"{file.name}:{node.lineno}"


def test_the_page_has_every_kind_of_the_code() -> None:
    (listed,) = re.findall(r"        kind: (.*?)\n        name: ", Finding.__doc__ or "", re.DOTALL)
    kinds = set(re.findall(r"`(\w+)`", listed))
    frozen, trainable = kinds_below("Violations of a frozen tensor"), kinds_below("Violations of a trainable tensor")
    assert {*trainable} - {"ranks_differ"} == set(LIVENESS)
    assert {*frozen, *trainable, *kinds_below("Hazards")} == kinds
    of_causes = [row[1] for heading in OF_CAUSES[1:-1] for row in rows_below(heading)]
    assert [cell for cell in of_causes if not set(re.findall(r"`(\w+)`", cell)) & kinds] == []


def emitted() -> set[str]:
    """The kinds that the code of the audit gives to findings, from its texts that look like one."""
    sources = "\n".join(file.read_text(encoding="utf-8") for file in sorted(WATCH.glob("*.py")))
    return set(re.findall(r'(?:violation|hazard|build|Verdict|yield)\(?\s*"([a-z_]+)"', sources))


def test_no_kind_is_emitted_that_the_page_does_not_have() -> None:
    documented = {kind for heading in HEADINGS[:3] for kind in kinds_below(heading)}
    assert len(emitted()) > 12
    assert emitted() <= documented


def test_the_finding_that_the_page_shows_is_the_one_of_a_batch_norm_in_train_mode() -> None:
    model = nn.ModuleDict({"layer1": nn.ModuleList([nn.ModuleDict({"bn1": nn.BatchNorm2d(2)})])}).requires_grad_(False)
    audit = GradientAudit(model, freeze=["layer1"], policy="collect")
    with audit.phase("finetune"):
        model["layer1"][0]["bn1"](torch.randn(4, 2, 3, 3))  # type: ignore[index]
    found = next(str(each) for each in audit.report.violations if each.name.endswith("running_mean"))
    shown = " ".join(PAGE.partition("    phase ")[2].partition("\n\n")[0].split())
    assert re.sub(r" \(by .*?\)", "", found) == re.sub(r" \(by .*?\)", "", f"phase {shown}")
