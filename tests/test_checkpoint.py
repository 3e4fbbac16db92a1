"""Checkpoints: whole or not at all, each tensor once, no code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mtl.checkpoint import CheckpointError, Checkpoints, load_checkpoint, write_json, write_text


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)


def test_a_checkpoint_comes_back_to_the_bit_with_tied_and_channels_last_tensors(tmp_path: Path) -> None:
    source = Tied().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    source.norm.running_mean.fill_(0.25)
    Checkpoints(tmp_path).save(source, {}, {"step": 7, "note": "x"}, ["last"])
    target = Tied()
    assert load_checkpoint(tmp_path / "last", target) == ({"step": 7, "note": "x"}, {})
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name


def test_last_and_best_point_to_their_steps_and_the_rest_is_removed(tmp_path: Path) -> None:
    checkpoints, model = Checkpoints(tmp_path), nn.Linear(2, 2)
    steps = {"last": [], "best": []}
    for step, names in [(1, ["last", "best"]), (2, ["last"]), (3, ["last", "best"]), (4, ["last"])]:
        with torch.no_grad():
            model.weight.fill_(step)
        checkpoints.save(model, {}, {"step": step}, names)
        for name, seen in steps.items():
            seen.append(json.loads((tmp_path / name / "state.json").read_text())["step"])
            assert load_file(tmp_path / name / "model.safetensors")["weight"].unique().tolist() == [seen[-1]]
    assert steps == {"last": [1, 2, 3, 4], "best": [1, 1, 3, 3]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "step-00000003", "step-00000004"]


def test_a_save_that_is_cut_short_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, model = Checkpoints(tmp_path), nn.Linear(2, 2)
    checkpoints.save(model, {}, {"step": 1}, ["last"])

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("mtl.checkpoint.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(model, {}, {"step": 2}, ["last"])
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "last", nn.Linear(2, 2)) == ({"step": 1}, {})
    checkpoints.save(model, {}, {"step": 2}, ["last"])
    assert load_checkpoint(tmp_path / "last", nn.Linear(2, 2)) == ({"step": 2}, {})


def test_another_model_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(nn.Linear(2, 2), {}, {"step": 1}, ["last"])
    with pytest.raises(CheckpointError, match=r"last does not fit this model: .*Missing key"):
        load_checkpoint(tmp_path / "last", Tied())


def test_a_text_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old")
    write_json(file, {"new": 1})
    assert json.loads(file.read_text()) == {"new": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_whatever_an_optimizer_remembers_of_plain_data_and_tensors_comes_back(tmp_path: Path) -> None:
    remembered = {
        "list": [torch.tensor([1.0, -0.0]), [torch.tensor(3), None]],
        "dict": {"inner": torch.tensor([2.0]), "count": 3},
        "numbers": (1, 2.5, float("inf"), True, "text"),
        "nothing": None,
    }
    Checkpoints(tmp_path).save(nn.Linear(1, 1), {"own:Kind": {"weight": remembered}}, {"step": 1}, ["last"])
    _, moments = load_checkpoint(tmp_path / "last", nn.Linear(1, 1))
    found = moments["own:Kind"]["weight"]
    assert torch.equal(found["list"][0], remembered["list"][0]) and found["list"][1][0].item() == 3
    assert found["dict"] == {"inner": torch.tensor([2.0]), "count": 3} and found["nothing"] is None
    assert found["numbers"] == [1, 2.5, float("inf"), True, "text"]


def test_what_cannot_be_kept_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"an optimizer remembers a set in own:Kind/weight/odd"):
        Checkpoints(tmp_path).save(nn.Linear(1, 1), {"own:Kind": {"weight": {"odd": {1}}}}, {"step": 1}, ["last"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "state", ["[1]", "{}", '{"optimizer": 3}', "{", '{"optimizer": {"k": {"w": {"m": {"tensor": "x"}}}}}']
)
def test_a_state_that_is_none_is_refused(tmp_path: Path, state: str) -> None:
    Checkpoints(tmp_path).save(nn.Linear(1, 1), {}, {"step": 1}, ["last"])
    (tmp_path / "last/state.json").write_text(state)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(tmp_path / "last", nn.Linear(1, 1))
