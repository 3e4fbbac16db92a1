"""The self-installing scripts, run for real: on a project of no dependencies, with its own virtual environments."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from processes import HANGS_S, wait_until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with our scripts, whose package needs nothing from anywhere."""
    folder = tmp_path / "a project"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "small").mkdir()
    (folder / "small/__init__.py").write_text("")
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (folder / "setup.cfg").write_text(
        "[metadata]\nname = small\nversion = 1\n[options]\npackages = small\n"
        "[options.extras_require]\nweights =\ndev =\n"
    )
    (folder / "scripts/use.sh").write_text(
        'set -euo pipefail\nsource "$(dirname "${BASH_SOURCE[0]}")/setup.sh"\n'
        'setup_environment "${EXTRAS:-weights}" ${MODULES:-small}\n'
        'exec "$PYTHON" -c "import small, sys; print(sys.prefix)"\n'
    )
    return folder


def surroundings(**changes: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")}
    return clean | changes


def start(project: Path, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(project / "scripts/use.sh")],
        cwd="/",
        env=surroundings(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def use(project: Path, **changes: str) -> tuple[int, str, str]:
    process = start(project, **changes)
    out, err = process.communicate(timeout=HANGS_S)
    return process.returncode, out.strip(), err


def test_the_first_call_sets_up_and_the_second_starts_at_once(project: Path) -> None:
    code, prefix, said = use(project)
    assert (code, prefix) == (0, str(project / ".venv")), said
    assert "Setting up" in said
    made = {path: path.stat().st_mtime_ns for path in (project / ".venv").rglob("*") if "__pycache__" not in path.parts}
    assert use(project) == (0, prefix, "")
    assert {path: path.stat().st_mtime_ns for path in made} == made, "nothing is installed again"

    # Another set of extras is added to the same environment, a changed setup.cfg is noticed.
    assert "Bringing" in use(project, EXTRAS="weights,dev")[2]
    assert use(project) == use(project, EXTRAS="weights,dev") == (0, prefix, "")
    with (project / "setup.cfg").open("a") as stream:
        stream.write("\n# changed\n")
    assert "Bringing" in use(project)[2]
    assert use(project)[2] == ""


def test_an_interrupted_set_up_is_made_again(project: Path) -> None:
    process = start(project)
    wait_until((project / ".venv/bin/python").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(project.glob(".venv/.stamp-*"))
    code, prefix, said = use(project)
    assert (code, prefix) == (0, str(project / ".venv")), said
    assert "Setting up" in said


def test_two_first_calls_at_once_wait_for_each_other(project: Path) -> None:
    processes = [start(project), start(project)]
    results = [(*process.communicate(timeout=HANGS_S), process.returncode) for process in processes]
    assert [code for _, _, code in results] == [0, 0], results
    said = "".join(err for _, err, _ in results)
    assert said.count("Setting up") == 1 and said.count("Another set-up is running; waiting for it.") == 1


def test_an_active_environment_that_has_everything_is_used_as_it_is(project: Path, tmp_path: Path) -> None:
    subprocess.run(["python3", "-m", "venv", "--without-pip", str(tmp_path / "mine")], check=True)
    active = {"VIRTUAL_ENV": str(tmp_path / "mine"), "PATH": f"{tmp_path / 'mine/bin'}:{os.environ['PATH']}"}
    assert use(project, MODULES="small json", **active) == (0, str(tmp_path / "mine"), "")
    assert not (project / ".venv").exists()
    code, prefix, _ = use(project, MODULES="small no_such_module", **active)
    assert (code, prefix) == (0, str(project / ".venv")), "one that lacks something is left alone"


def test_a_python_without_venv_is_named_with_the_package_to_install(project: Path, tmp_path: Path) -> None:
    python = shutil.which("python3")
    for name in ("python3", "python"):
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        # The real interpreter, but without the module that Debian ships in a package of its own.
        fake.write_text(
            f'#!/bin/bash\ncase "$*" in *ensurepip*) exit 1 ;; esac\nexec {python} "$@"\n',
        )
        fake.chmod(0o755)
    code, out, said = use(project, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert (code, out) == (1, "")
    assert "cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv" in said


def test_a_python_that_is_too_old_is_named(project: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "cat", "cksum", "flock", "rm"):
        (tools / tool).symlink_to(shutil.which(tool) or "/missing")
    code, out, said = use(project, PATH=str(tools))
    assert (code, out) == (1, "")
    assert said == "error: no Python 3.11 or newer on the PATH\n"


def test_the_trainer_s_script_takes_the_default_configuration_and_passes_everything_on(tmp_path: Path) -> None:
    script = str(ROOT / "scripts/train_mtl.sh")
    for arguments, message in [
        (["no.such=1"], "error: command line: no: unknown key"),
        (["nowhere.yaml"], "error: nowhere.yaml: no such file"),
        ([str(ROOT / "configs/multifashion.yaml"), "seed=x"], "error: command line: seed: expected a valid integer"),
    ]:
        result = subprocess.run(
            ["bash", script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS_S, check=False
        )
        assert result.returncode == 2 and message in result.stderr, result.stderr
