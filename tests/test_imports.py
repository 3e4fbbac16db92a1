"""Imports point strictly downward: every module may import from the floors below its own, and from nowhere else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The lowest first. A room is a module of `mtl`, or a package with all that is in it.
FLOORS = [
    ["runtime"],
    ["patterns", "distributed"],
    ["config"],
    ["tasks", "checkpoint", "featurestore"],
    ["model", "data", "optim", "audit", "freeze"],
    ["phases"],
    ["training"],
    ["results"],
    ["cli"],
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Within the room of a run, the lowest first: a file or package imports from rows above its own only.
TRAINING = [
    ["validation", "history", "nonfinite", "autotune", "depthwise_trial", "best_checkpoints", "run_dir", "step_sync"],
    ["setup", "result"],
    ["resume", "tracking", "features", "data_record"],
    ["state", "step", "validator", "add_task"],
    ["phase"],
    ["checkpoints"],
    ["head_steps"],
    ["loop"],
    ["run"],
]
# The names that `import mtl` offers from all floors, and `python -m mtl`: nothing in the house imports them.
FLOOR_OF |= {"mtl": len(FLOORS), "__main__": len(FLOORS)}
HEAVY = {"torch", "torchvision", "torchjd", "timm", "wandb", "numpy"}


def imported(source: str, module: str, is_package: bool, modules: Set[str]) -> set[str]:
    """Full names of what a module imports, anywhere in it: `from mtl import data` is `mtl.data` if that is a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                package = module.split(".")[: None if is_package else -1]
                package = package[: len(package) - node.level + 1]
                origin = ".".join([*package, *([node.module] if node.module else [])])
            inner = {f"{origin}.{alias.name}" for alias in node.names}
            found.update(inner & modules)
            if inner - modules:
                found.add(origin)
    return found


def room(module: str) -> str:
    """The part of the house that a module is in: `audit` for `mtl.audit.report`."""
    return module.split(".")[1] if "." in module else module


def wrong_imports(imports: Mapping[str, Set[str]]) -> list[str]:
    """Imports between the rooms of `mtl` that do not point to a lower floor."""
    return [
        f"{module} imports {other}"
        for module in sorted(imports)
        for other in sorted(imports[module])
        if room(other) != room(module)
        and other.split(".")[0] == "mtl"
        and not FLOOR_OF.get(room(other), len(FLOORS) + 1) < FLOOR_OF.get(room(module), -1)
    ]


def cycle(imports: Mapping[str, Set[str]]) -> list[str]:
    """Modules that import each other in a circle; none if there is no circle."""
    try:
        TopologicalSorter({module: others & imports.keys() for module, others in imports.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _read_house() -> dict[str, set[str]]:
    files = {}
    for file in sorted((ROOT / "mtl").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return {
        module: imported(file.read_text(encoding="utf-8"), module, file.name == "__init__.py", files.keys())
        for module, file in files.items()
    }


HOUSE = _read_house()


# The house


def test_the_imports_are_read() -> None:
    assert {
        "mtl",
        "mtl.cli",
        "mtl.config",
        "mtl.data",
        "mtl.data.files.items",
        "mtl.training.loop",
    } <= HOUSE.keys()
    assert "mtl.config.schema" in HOUSE["mtl.config"]
    assert "torch" in HOUSE["mtl.training.step"]
    assert "mtl.training.run" in HOUSE["mtl.cli.train"]  # it is imported inside a function


def test_every_module_has_a_floor_and_every_floor_a_module() -> None:
    assert {room(module) for module in HOUSE} == FLOOR_OF.keys()
    assert len(FLOOR_OF) == sum(map(len, FLOORS)) + 2


def test_the_house_can_be_seen_at_once() -> None:
    entries = {file.relative_to(ROOT / "mtl").parts[0] for file in (ROOT / "mtl").rglob("*.py")}
    rooms = {name.removesuffix(".py") for name in entries - {"__init__.py", "__main__.py"}}
    assert rooms == FLOOR_OF.keys() - {"mtl", "__main__"}
    assert len(rooms) <= 16
    assert len(FLOORS) <= 9


def test_imports_point_strictly_downward() -> None:
    assert wrong_imports(HOUSE) == []


def test_a_run_reads_from_its_parts_up_to_its_loop() -> None:
    row_of = {name: number for number, names in enumerate(TRAINING) for name in names}
    inside = {module.split(".")[2] for module in HOUSE if module.startswith("mtl.training.")}
    assert inside == row_of.keys()
    wrong = [
        f"{module} imports {other}"
        for module, others in HOUSE.items()
        for other in others
        if module.startswith("mtl.training.") and other.startswith("mtl.training.")
        if (above := module.split(".")[2]) != (below := other.split(".")[2]) and row_of[below] >= row_of[above]
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycle(HOUSE) == []


def test_freeze_and_audit_never_import_each_other() -> None:
    freeze = HOUSE["mtl.freeze"]
    audit = set().union(*(others for module, others in HOUSE.items() if room(module) == "audit"))
    assert "mtl.patterns" in freeze & audit  # the language is all that they share
    assert "audit" not in map(room, freeze)
    assert "freeze" not in map(room, audit)


# What is read before torch is loaded: by `import mtl`, by `mtl --help`, and while a configuration is checked.
PURE = [
    *("mtl", "mtl.phases.scheduler", "mtl.phases.conditions", "mtl.phases.phase_length", "mtl.training.run_dir"),
    *(module for module in HOUSE if room(module) in ("cli", "config") and module != "mtl.cli.out_of_memory"),
    *("mtl.patterns", "mtl.patterns.language", "mtl.patterns.matching"),
    *(f"mtl.runtime.{name}" for name in ("best", "files", "plugin", "text", "version", "signals")),
]


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_imports_nothing_heavy(module: str) -> None:
    assert {name.split(".")[0] for name in HOUSE[module]} & HEAVY == set()


@pytest.mark.parametrize(
    "module", ["mtl", "mtl.cli", "mtl.cli.guard", "mtl.cli.train", "mtl.config", "mtl.phases.scheduler"]
)
def test_importing_it_does_not_load_torch(module: str) -> None:
    code = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert module in loaded
    assert loaded & HEAVY == set()


# The test itself: planted faults are found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import mtl.data.cache", {"mtl.data.cache"}),
        ("import os.path as p, mtl.data", {"os.path", "mtl.data"}),
        ("from mtl.data import cache, Batch", {"mtl.data.cache", "mtl.data"}),
        ("from mtl import data", {"mtl.data"}),
        ("from mtl import __version__", {"mtl"}),
        ("def f():\n    if True:\n        from mtl.cli import main", {"mtl.cli"}),
        ("if TYPE_CHECKING:\n    import mtl.cli", {"mtl.cli"}),
        ("from . import cache", {"mtl.data.cache"}),
        ("from .cache import cached", {"mtl.data.cache"}),
        ("from .. import cli", {"mtl.cli"}),
        ("from ..cli import main", {"mtl.cli"}),
        ("x = 'import mtl.cli'", set()),
    ],
)
def test_an_import_is_found(source: str, found: set[str]) -> None:
    modules = {"mtl", "mtl.cli", "mtl.data", "mtl.data.cache"}
    assert imported(source, "mtl.data.room", False, modules) == found


def test_a_relative_import_of_a_package_starts_at_the_package() -> None:
    modules = {"mtl", "mtl.data", "mtl.data.cache"}
    assert imported("from .cache import x", "mtl.data", True, modules) == {"mtl.data.cache"}
    assert imported("from . import cache", "mtl.data", True, modules) == {"mtl.data.cache"}


@pytest.mark.parametrize(
    ("module", "other", "is_wrong"),
    [
        ("mtl.training.loop", "mtl.audit", False),
        ("mtl.data.files.items", "mtl.data.generated.sprites", False),
        ("mtl.cli", "mtl", True),
        ("mtl.config", "torch.nn", False),
        ("mtl.audit.report", "mtl.training.loop", True),
        ("mtl.freeze", "mtl.audit.report", True),  # the same floor
        ("mtl.audit", "mtl.freeze", True),
        ("mtl.model.heads", "mtl.data", True),
        ("mtl", "mtl.cli", False),
        ("mtl.training.loop", "mtl.new", True),  # no floor
        ("mtl.new", "mtl.config", True),
    ],
)
def test_an_import_that_does_not_point_downward_is_found(module: str, other: str, is_wrong: bool) -> None:
    assert wrong_imports({module: {other}}) == ([f"{module} imports {other}"] if is_wrong else [])


def test_a_circle_is_found() -> None:
    assert cycle({"mtl.a": {"mtl.b", "os"}, "mtl.b": {"os"}}) == []
    assert set(cycle({"mtl.a": {"mtl.b"}, "mtl.b": {"mtl.c"}, "mtl.c": {"mtl.a"}})) == {"mtl.a", "mtl.b", "mtl.c"}
