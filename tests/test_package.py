"""What `import mtl` offers, and under which name it is installed."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import forks
import mtl
from mtl.runtime.version import __version__
from processes import HANGS_S
from runs import exact_metrics, tiny_config

ROOT = Path(__file__).parent.parent


# --- names


def promised() -> dict[str, tuple[str, str]]:
    """The names that type checkers see: each with its module, and its name there."""
    tree = ast.parse((ROOT / "mtl/__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (node.module or "", alias.name) for node in imports for alias in node.names}


def test_the_names_that_a_type_checker_sees_are_those_that_are_imported_when_used() -> None:
    names = {"GradientAudit", "TaskScheduler", "TaskWeights", "attach", "enforce", "load", "plan_freeze", "train"}
    assert promised().keys() == names
    for name, (module, inside) in promised().items():
        assert getattr(mtl, name) is getattr(import_module(module), inside)
    assert {*promised(), "__version__"} == set(mtl.__all__) <= set(dir(mtl))
    assert mtl.__version__ == __version__


def test_names_are_listed_and_nearest_ones_offered_without_torch() -> None:
    program = (
        "import sys, mtl\n"
        "assert 'GradientAudit' in dir(mtl)\n"
        "try: mtl.GradientAudits\nexcept AttributeError as error: print(error)\n"
        "assert not hasattr(mtl, 'zzz') and 'torch' not in sys.modules\n"
        "mtl.TaskScheduler\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "module 'mtl' has no attribute 'GradientAudits'; nearest: GradientAudit\n"


@pytest.mark.slow
def test_training_from_python_is_what_the_command_does_and_returns_what_came_out(tmp_path: Path) -> None:
    file = tiny_config(tmp_path)
    result = mtl.train(file, "phases.finetune.steps=1", quiet=True)
    assert result.report.ok and list(result.scores) == ["warm-heads", "finetune"]
    command = ["-m", "mtl", "train", str(file), "-q", "phases.finetune.steps=1", "name=other"]
    forks.run(command, timeout=HANGS_S, check=True, cwd=tmp_path)
    rows = [exact_metrics(run_dir) for run_dir in (result.run_dir, tmp_path / "runs/other")]
    assert rows[0] == rows[1]
    assert {file.name for file in result.run_dir.iterdir()} == {
        file.name for file in (tmp_path / "runs/other").iterdir()
    }


# --- the distribution


def test_it_is_installed_under_a_name_that_no_other_program_has_and_imported_as_mtl() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    assert settings["metadata"]["name"] == "mtl-freeze"
    assert settings["metadata"]["version"] == "attr: mtl.runtime.version.__version__"
    assert settings["options.packages.find"]["include"] == "mtl*"
    assert "mtl = mtl.cli:main" in settings["options.entry_points"]["console_scripts"]


TEXTS = [
    file.relative_to(ROOT).as_posix()
    for pattern in ("mtl/**/*.py", "scripts/*", "docs/*.md", "configs/*.yaml", "*.md", ".ci/*", "setup.cfg")
    for file in sorted(ROOT.glob(pattern))
    if file.is_file() and not file.name.startswith("CHANGELOG")
]


@pytest.mark.parametrize("file", TEXTS)
def test_nothing_says_to_install_another_program_called_mtl(file: str) -> None:
    found = re.findall(r".*install[^\n]*[\s'\"]mtl(?:\[|[\s'\"]|$).*", (ROOT / file).read_text(encoding="utf-8"))
    assert found == []


def test_what_an_installation_leaves_next_to_the_code_is_ignored_by_git() -> None:
    done = subprocess.run(
        ["git", "check-ignore", "mtl_freeze.egg-info/PKG-INFO"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 128:
        pytest.skip("no git checkout")
    assert done.returncode == 0
