"""Checkpoints that are written in a thread while training continues."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtl.checkpoint.folder
from mtl.checkpoint.folder import Checkpoints, SaveError
from mtl.checkpoint.load import load_newest, newest_first

FROZEN = ["0.weight", "0.bias"]


def model(value: float) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)
    return module


def moments(value: float) -> dict[str, dict[str, dict[str, Tensor]]]:
    return {"adam": {"1.weight": {"exp_avg": torch.full((4, 4), value)}}}


class Gate:
    """Holds every write of tensors until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, self.threads = threading.Event(), list[str]()
        write = mtl.checkpoint.folder.write_tensors

        def held(*arguments: Any) -> None:
            self.threads.append(threading.current_thread().name)
            if threading.current_thread() is not threading.main_thread():
                assert self.open.wait(600)
            write(*arguments)

        patch.setattr(mtl.checkpoint.folder, "write_tensors", held)


def test_what_is_written_is_what_was_there_when_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, network, state = Checkpoints(tmp_path), model(1), moments(1)
    checkpoints.save(network, FROZEN, state, {"step": 1}, ["last"])
    gate = Gate(monkeypatch)
    checkpoints.save(network, FROZEN, state, {"step": 2}, ["last"], in_thread=True)
    assert [folder.name for folder in newest_first(tmp_path)] == ["step-00000001"]
    with torch.no_grad():
        network[1].weight.fill_(7)
        state["adam"]["1.weight"]["exp_avg"].fill_(7)
    gate.open.set()
    checkpoints.wait()
    target = model(0)
    _, saved, tensors, refused = load_newest(tmp_path, target)
    assert (saved, refused) == ({"step": 2}, [])
    assert [tensor.unique().tolist() for tensor in target.state_dict().values()] == [[1]] * 4
    assert tensors["adam"]["1.weight"]["exp_avg"].unique().tolist() == [1]
    assert {*gate.threads} == {"mtl-checkpoint_0"}


def test_the_next_one_and_whoever_asks_for_a_link_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    gate = Gate(monkeypatch)
    checkpoints.save(model(1), [], {}, {"step": 1}, ["last"], in_thread=True)
    threading.Timer(0, gate.open.set).start()
    checkpoints.save(model(2), [], {}, {"step": 2}, ["last", "best"], in_thread=True)
    best = checkpoints.find("best")
    assert best is not None and best.resolve().name == "step-00000002"
    assert [folder.name for folder in newest_first(tmp_path)] == ["step-00000002", "step-00000001"]


def test_frozen_tensors_that_are_not_on_disk_and_large_ones_are_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, gate = Checkpoints(tmp_path), Gate(monkeypatch)
    checkpoints.save(model(1), FROZEN, {}, {"step": 1}, ["last"], in_thread=True)
    checkpoints.save(model(2), FROZEN, {}, {"step": 2}, ["last"], in_thread=True)
    monkeypatch.setattr(mtl.checkpoint.folder, "_MOST_COPIED", 79)
    checkpoints.save(model(2), FROZEN, {}, {"step": 3}, ["last"], in_thread=True)
    assert {*gate.threads} == {"MainThread"}
    monkeypatch.setattr(mtl.checkpoint.folder, "_MOST_COPIED", 80)
    gate.open.set()
    checkpoints.save(model(2), FROZEN, {}, {"step": 4}, ["last"], in_thread=True)
    checkpoints.wait()
    assert {*gate.threads} == {"MainThread", "mtl-checkpoint_0"}


def test_what_cannot_be_written_is_raised_once_to_whoever_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model(1), [], {}, {"step": 1}, ["last"])
    message = "step-00000002 cannot be written: it needs"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for come in (checkpoints.wait, lambda: checkpoints.find("last"), lambda: checkpoints.drop_newer(9)):
        with monkeypatch.context() as patch:
            patch.setattr(mtl.checkpoint.folder, "write_state", full)
            checkpoints.save(model(2), [], {}, {"step": 2}, ["last"], in_thread=True)
            with pytest.raises(SaveError, match=message):
                come()
        checkpoints.wait()
        assert load_newest(tmp_path, model(0))[1] == {"step": 1}
    checkpoints.save(model(2), [], {}, {"step": 2}, ["last"], in_thread=True)
    checkpoints.wait()
    assert load_newest(tmp_path, model(0))[1] == {"step": 2}
