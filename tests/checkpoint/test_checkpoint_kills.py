"""Checkpoints under a killed writer, and on a disk that is full."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import checkpoint_kills
import forks
from mtl.checkpoint.folder import Checkpoints, SaveError
from mtl.checkpoint.load import load_newest, newest_first
from processes import HANGS_S


def outcomes(verb: str, *arguments: str) -> list[list[Any]]:
    """What a process of checkpoint_kills.py says: survived, last step that was saved, newest step that is there."""
    done = forks.run([checkpoint_kills.__file__, verb, *arguments], timeout=HANGS_S, check=True)
    found: list[list[Any]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_writer_killed_at_any_file_operation_leaves_the_last_one_that_it_saved_or_the_next(
    tmp_path: Path, in_thread: bool
) -> None:
    *killed, last = outcomes("kill_at_every_file_operation", str(tmp_path), str(int(in_thread)))
    assert last == [True, 4, 4]
    assert len(killed) > 60
    assert all(saved <= there <= saved + 1 for _, saved, there in killed), killed
    assert {there for *_, there in killed} == {1, 2, 3, 4}


@pytest.mark.slow
def test_a_writer_killed_at_random_leaves_the_last_one_that_it_saved_or_the_next(tmp_path: Path) -> None:
    killed = outcomes("kill_at_random", str(tmp_path), "60")
    assert len(killed) == 60
    assert all(saved <= there <= saved + 1 for _, saved, there in killed), killed


# Full disks


def model(value: float) -> nn.Module:
    """About 200 kB frozen and 200 kB that train."""
    module = nn.ModuleDict({"trunk": nn.Linear(224, 224), "head": nn.Linear(224, 224)})
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)
    return module


def check_refused(folder: Path, step: int, frozen: list[str], reason: str) -> None:
    before = {path: (path.stat().st_ino, path.stat().st_size) for path in folder.rglob("*")}
    with pytest.raises(SaveError, match=rf"step-0000000{step} cannot be written: it needs 40\d,\d+ bytes") as caught:
        Checkpoints(folder).save(model(step), frozen, {}, {"step": step}, ["last"])
    assert reason in str(caught.value) and caught.value.__cause__ is not None
    assert {path: (path.stat().st_ino, path.stat().st_size) for path in folder.rglob("*")} == before
    target = model(0)
    path, state, _, refused = load_newest(folder, target)
    assert (path, state, refused) == (newest_first(folder)[0], {"step": 2}, [])
    assert target.state_dict()["head.bias"].unique().tolist() == [2]


@pytest.mark.parametrize("free", [0, 20_000, 150_000, 250_000, 390_000])
@pytest.mark.parametrize("step", [2, 3])
def test_on_a_full_disk_a_checkpoint_is_refused_with_what_it_needs_and_the_others_stay(
    small_disk: Path, free: int, step: int
) -> None:
    folder = small_disk / "checkpoints"
    frozen = ["trunk.weight", "trunk.bias"]
    for before in (1, 2):
        Checkpoints(folder).save(model(before), frozen, {}, {"step": before}, ["last"])
    (small_disk / "else").write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - free)))
    # Of step 2 again, the frozen tensors are there; so it is saved with others.
    check_refused(folder, step, [*frozen, "head.bias"], "No space left on device")
    (small_disk / "else").unlink()
    Checkpoints(folder).save(model(step), frozen, {}, {"step": step}, ["last"])
    assert load_newest(folder, model(0))[1] == {"step": step}


def test_a_file_that_may_not_be_so_long_is_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        Checkpoints(tmp_path).save(model(step), [], {}, {"step": step}, ["last"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        check_refused(tmp_path, 3, [], "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=r"file/checkpoints/step-00000001 cannot be written"):
        Checkpoints(tmp_path / "file/checkpoints").save(nn.Linear(1, 1), [], {}, {"step": 1}, ["last"])
