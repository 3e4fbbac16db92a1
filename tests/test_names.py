"""One name means one thing in the whole of `mtl`: no two classes share a name, an underscore before it aside."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Public names, one for each framework whose Trainer they audit.
SHARED = {"AuditCallback"}


def shared_classes(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """The names that several classes have, each with its modules; classes inside a class do not count."""
    places: dict[str, list[str]] = {}
    for module, source in sources.items():
        for name in _classes(ast.parse(source).body):
            places.setdefault(name.lstrip("_"), []).append(module)
    return {name: modules for name, modules in places.items() if len(modules) > 1}


def _classes(body: Iterable[ast.AST]) -> Iterable[str]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        else:
            yield from _classes(ast.iter_child_nodes(node))


def test_no_two_classes_share_a_name() -> None:
    files = sorted((ROOT / "mtl").rglob("*.py"))
    found = shared_classes({str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files})
    assert {name: modules for name, modules in found.items() if name not in SHARED} == {}
    assert found.keys() == SHARED, "a name that no longer needs its exception"


# The test itself: planted faults are found


def test_a_shared_name_is_found() -> None:
    other = "if True:\n    class _Row: ...\ndef f():\n    class Local: ..."
    assert shared_classes({"a": "class Row: ...", "b": other}) == {"Row": ["a", "b"]}
    assert shared_classes({"a": "class Local: ...", "b": other}) == {"Local": ["a", "b"]}


def test_classes_inside_a_class_may_share_a_name() -> None:
    assert shared_classes({"a": "class A:\n    class Options: ...", "b": "class B:\n    class Options: ..."}) == {}
