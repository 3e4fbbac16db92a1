"""The wheel, built and installed into a folder of its own: it has its data, and plans from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from processes import HANGS_S

ROOT = Path(__file__).parents[2]
NEEDED = ["mtl", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"symlinks": True, "ignore": shutil.ignore_patterns("__pycache__")} if copy is shutil.copytree else {}
        copy(ROOT / name, folder / "source" / name, **options)  # type: ignore[operator]
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "..", ".", cwd=folder / "source")
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_the_code_the_data_and_the_examples_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.startswith("mtl_freeze-")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {file.relative_to(ROOT).as_posix() for file in (ROOT / "mtl").rglob("*.py")}
    data = {file.relative_to(ROOT).as_posix() for file in (ROOT / "mtl/data/assets").iterdir()}
    # Sweeps call a script of the checkout.
    shown = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/recipes").glob("*.yaml")]
    examples = {f"mtl/config/shipped/{file.relative_to(ROOT / 'configs').as_posix()}" for file in shown}
    assert packed == code | data | examples | {"mtl/py.typed"}


def test_what_is_installed_plans_and_renders_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    run("-m", "pip", "install", "-q", "--no-deps", "--target", str(installed), str(wheel), cwd=empty)
    path = {"PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    where = run("-c", "import mtl; print(mtl.__file__)", cwd=empty, **path)
    assert Path(where.strip()) == installed / "mtl/__init__.py"
    plan = json.loads(run("-m", "mtl", "plan", "recipes/lp_ft", "--json", cwd=empty, **path))
    assert [phase["name"] for phase in plan["phases"]] == ["probe", "finetune"]
    assert "finetune: 3 epochs" in run(str(installed / "bin/mtl"), "plan", "scenes", cwd=empty, **path)
    # The images of the scenes are data of the package.
    small = ["data.num_train=8", "data.num_val=8", f"data.cache_dir={tmp_path / 'scenes'}"]
    assert "scenes, train: 8 images" in run("-m", "mtl", "data", "check", "scenes", *small, cwd=empty, **path)
    assert list(empty.iterdir()) == []
