"""`name: auto`: the file's name and the next free number, one for each run, also of runs that begin at once."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import wandb_file
from mtl.cli import main
from mtl.config import ConfigError, load_config
from mtl.training.run_dir import check_run_dir, own_name
from processes import wait_until
from runs import small_config

ROOT = Path(__file__).parents[2]
SHORT = [{"name": "a", "freeze": ["trunk"], "steps": 2}]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs").iterdir())


def test_runs_are_numbered_one_after_the_other_and_know_their_names(tmp_path: Path) -> None:
    file = small_config(tmp_path, name="auto", phases=SHORT, tracking={"mode": "offline"})
    for _ in range(2):
        assert main(["train", str(file), "-q"]) == 0
    assert names(tmp_path) == ["tiny-001", "tiny-002"]
    second = tmp_path / "runs/tiny-002"
    assert load_config(second / "config.yaml").name == "tiny-002"
    (run,) = wandb_file.of_kind(wandb_file.offline_file(second), "run")
    assert run.display_name == "tiny-002"
    # It keeps its name when it is resumed.
    assert main(["train", str(file), "-q", "name=tiny-002", "resume=auto"]) == 0
    assert names(tmp_path) == ["tiny-001", "tiny-002"]
    # A run may begin from another one's weights, under a name of its own.
    assert main(["train", str(file), "-q", f"resume={tmp_path}/runs/tiny-001/checkpoints/last"]) == 2
    assert names(tmp_path) == ["tiny-001", "tiny-002"], "what came to nothing leaves nothing"


@pytest.mark.parametrize(
    ("there", "stem", "expected"),
    [
        ([], "scenes", "scenes-001"),
        (["scenes-001", "scenes-007"], "scenes", "scenes-008"),
        (["scenes-9999", "scenes-x", "other-12345", "scenes-001-002"], "scenes", "scenes-10000"),
        ([], "my config (2)", "my-config--2--001"),
        (["..-001"], ".hidden.v1", "hidden.v1-001"),
    ],
)
def test_the_next_number_follows_the_highest_one_of_the_file_s_name(
    tmp_path: Path, there: list[str], stem: str, expected: str
) -> None:
    file = small_config(tmp_path, name="auto").rename(tmp_path / f"{stem}.yaml")
    for name in there:
        (tmp_path / "runs" / name).mkdir(parents=True)
    config = load_config(file)
    check_run_dir(config)
    with own_name(config, is_main=True, broadcast=str) as named:
        assert named.name == expected and named.run_dir.is_dir()
        assert load_config(file, [f"name={named.name}"]).name == expected, "it is a name that can be written"
    assert not named.run_dir.exists(), "nothing was written to it"


def test_runs_that_begin_at_once_have_different_names(tmp_path: Path) -> None:
    config = load_config(small_config(tmp_path, name="auto"))

    def begin(number: int) -> str:
        with own_name(config, is_main=True, broadcast=str) as named:
            (named.run_dir / "file").write_text(str(number))
            return named.name

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(begin, range(32)))
    assert sorted(found) == [f"tiny-{number:03d}" for number in range(1, 33)]


def test_a_process_that_does_not_choose_takes_the_name_that_was_chosen(tmp_path: Path) -> None:
    config = load_config(small_config(tmp_path, name="auto"))
    with own_name(config, is_main=False, broadcast=lambda mine: "tiny-042" if mine is None else mine) as named:
        assert named.name == "tiny-042"
    assert not (tmp_path / "runs").exists()


def test_a_run_with_a_name_keeps_it(tmp_path: Path) -> None:
    config = load_config(small_config(tmp_path))
    with own_name(config, is_main=True, broadcast=str) as named:
        assert named is config
    assert not (tmp_path / "runs").exists()


def test_resume_auto_needs_the_name_of_a_run(tmp_path: Path) -> None:
    config = load_config(small_config(tmp_path, name="auto"), ["resume=auto"])
    with pytest.raises(ConfigError, match=r"name=auto begins a run .*; to resume one, give its name"):
        check_run_dir(config)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    config = load_config(small_config(tmp_path, name="auto"))
    with pytest.raises(ConfigError, match=r"runs_dir: .*runs cannot be made"):
        check_run_dir(config)


@pytest.mark.slow
def test_a_stopped_run_says_the_name_under_which_it_resumes(tmp_path: Path) -> None:
    file = small_config(tmp_path, name="auto", phases=[{"name": "a", "freeze": ["trunk"], "steps": 10_000}])
    command = [sys.executable, "-m", "mtl", "train", str(file), "checkpoint.every_steps=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **quiet) as run:  # type: ignore[call-overload]
        wait_until(lambda: (tmp_path / "runs/tiny-001/checkpoints/last").exists())
        run.terminate()
        assert run.stderr is not None
        said = run.stderr.read()
    assert run.returncode == 1 and "To resume, rerun with name=tiny-001 resume=auto." in said
