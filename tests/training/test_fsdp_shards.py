"""Runs whose processes write shards are killed, damaged and gone on from, with any number of processes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fsdp_runs import DCP, SPREAD, check_same, run, run_alone, write_config
from mtl.checkpoint.files import read_state
from mtl.checkpoint.load import newest_first
from mtl.config import load_config
from mtl.config.yaml_source import ConfigError
from runs import read_memory, read_model


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    return run_alone(tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that was never stopped."""
    return start(tmp_path_factory.mktemp("two") / "run", 2)


def start(folder: Path, number: int, *overrides: str, **order: Any) -> Path:
    write_config(folder)
    run(folder, number, SPREAD, DCP, *overrides, **order)
    return folder / "runs/run"


def killed(folder: Path, number: int = 2, *overrides: str, **order: Any) -> Path:
    """The checkpoints of a run of which one process was killed."""
    with pytest.raises(subprocess.CalledProcessError):
        start(folder, number, *overrides, **order)
    return folder / "runs/run/checkpoints"


def check_same_bits(got: Path, expected: Path) -> None:
    for read in (read_model, read_memory):
        found, wanted = (read(each / "checkpoints/last") for each in (got, expected))
        assert found.keys() == wanted.keys() and len(found) > 50
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.slow
def test_it_continues_with_three_processes_then_alone(one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    checkpoints = killed(folder, 2, die_at=4)
    assert [read_state(each)["step"] for each in newest_first(checkpoints)] == [3, 2]
    killed(folder, 3, "resume=auto", die_at=6)
    newest = newest_first(checkpoints)
    assert [read_state(each)["step"] for each in newest] == [5, 4]
    assert len(list((newest[0] / "model").iterdir())) == 3
    run(folder, 1, "resume=auto", SPREAD, DCP)
    # Alone it writes plain ones.
    assert (checkpoints / "last/model.safetensors").is_file()
    # Sums are rounded in another order: see `check_same` for the tolerance.
    check_same(folder / "runs/run", one)


@pytest.mark.slow
def test_it_resumes_from_plain_ones_and_with_ddp(one: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    write_config(plain)
    with pytest.raises(subprocess.CalledProcessError):
        run(plain, 2, SPREAD, die_at=4)
    start(plain, 2, "resume=auto")
    check_same(plain / "runs/run", one)
    ddp = tmp_path / "ddp"
    killed(ddp, die_at=4)
    run(ddp, 2, "resume=auto")
    check_same(ddp / "runs/run", one)


@pytest.mark.slow
def test_another_run_resumes_from_it(two: Path, tmp_path: Path) -> None:
    killed(tmp_path / "old", die_at=6)
    old, new = tmp_path / "old/runs/run/checkpoints", tmp_path / "old/runs/new"
    run(tmp_path / "old", 2, SPREAD, DCP, f"resume={old.parent}", "name=new")
    check_same_bits(new, two)
    frozen = {file.stat().st_ino for file in old.glob("step-*/frozen/*")}
    adopted = {file.stat().st_ino for file in (new / "checkpoints").glob("step-*/frozen/*")}
    # The best weights of the old run are still those of the new one: their frozen shards are linked, not copied.
    assert frozen & adopted


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a flipped byte", "a lost file", "another layout"])
def test_damage_is_found_and_all_processes_take_an_older_one(damage: str, two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    newest = newest_first(killed(folder, die_at=4))[0]
    file = sorted((newest / "model").iterdir())[1]
    if damage == "a lost file":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        place = -3 if damage == "a flipped byte" else content.index(b"saved_offsets") + len(b'saved_offsets\\": [')
        content[place] ^= 1
        file.write_bytes(content)
    run_dir = start(folder, 2, "resume=auto")
    check_same_bits(run_dir, two)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "writing"), [(1, 4), (0, 5), (0, 8), (1, 8)])
def test_who_is_killed_while_writing_leaves_the_checkpoints_before(
    rank: int, writing: int, two: Path, tmp_path: Path
) -> None:
    # A first checkpoint has three writings: of what is trained, of what is next to it, and of what is frozen. The next
    # one has two, and the first of the next phase, where other tensors are frozen, three again.
    checkpoints = killed(tmp_path / "run", die_writing=[rank, writing])
    before = [read_state(each)["step"] for each in newest_first(checkpoints)]
    assert before == ([1] if writing < 6 else [2, 1])
    # The first process clears away what is half written, unless it is the one.
    assert len(list(checkpoints.glob(".step-*.tmp"))) == (rank == 0)
    run_dir = start(tmp_path / "run", 2, "resume=auto")
    check_same_bits(run_dir, two)
    assert not list((run_dir / "checkpoints").glob(".*")) and not list((run_dir / "checkpoints/frozen").glob(".*"))


@pytest.mark.slow
def test_frozen_shards_are_stored_once(two: Path) -> None:
    # The last phase freezes less than the one before, and both best and last are there.
    checkpoints = two / "checkpoints"
    stored = {file.stat().st_ino for file in (checkpoints / "frozen").glob("*/*")}
    held = {file.stat().st_ino for file in checkpoints.glob("step-*/frozen/*")}
    assert stored == held and held
    numbers = {file.stat().st_ino: file.stat().st_nlink for file in checkpoints.glob("step-*/frozen/*")}
    assert max(numbers.values()) >= 3


@pytest.mark.slow
def test_a_process_that_cannot_write_ends_all_with_its_reason(two: Path, tmp_path: Path) -> None:
    # The fourth writing is the second checkpoint's first.
    with pytest.raises(subprocess.CalledProcessError) as ended:
        start(tmp_path / "run", 2, full_at=[1, 4])
    checkpoints = tmp_path / "run/runs/run/checkpoints"
    said = str(ended.value.output)
    assert "step-00000002 cannot be written" in said and "process 1: [Errno 27] File too large" in said
    assert sorted(path.name for path in checkpoints.iterdir()) == ["frozen", "last", "step-00000001"]
    check_same_bits(start(tmp_path / "run", 2, "resume=auto"), two)


def test_shards_of_a_model_that_is_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"distributed: .*checkpoint: dcp only with strategy: fsdp2"):
        load_config(write_config(tmp_path / "run"), [DCP])
