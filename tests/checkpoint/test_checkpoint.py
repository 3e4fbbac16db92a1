"""Checkpoints: whole or not at all, each tensor once, frozen tensors once for all checkpoints, no code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mtl.checkpoint.files import CheckpointError, DamagedCheckpoint, read_state, state_digest
from mtl.checkpoint.folder import Checkpoints
from mtl.checkpoint.load import load_checkpoint, load_newest, newest_first
from mtl.runtime.files import write_json, write_text
from mtl.runtime.fingerprint import fingerprint
from runs import read_model

TRUNK = ["trunk.weight", "trunk.bias"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("unkept", torch.ones(1), persistent=False)


def small(value: float = 0.0, frozen: float = 0.5) -> nn.Module:
    """A trunk and a head, filled."""
    module = nn.ModuleDict({"trunk": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(frozen if name in TRUNK else value)
    return module


def save(checkpoints: Checkpoints, step: int, frozen: float = 0.5, names: tuple[str, ...] = ("last",)) -> None:
    moments = {"sgd": {"head.weight": {"momentum_buffer": torch.full((2, 4), float(step))}}}
    checkpoints.save(small(step, frozen), TRUNK, moments, {"step": step}, names)


def bits(module: nn.Module) -> dict[str, str]:
    return {name: fingerprint(tensor) for name, tensor in module.state_dict().items()}


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what comes back


@pytest.mark.parametrize("frozen", [[], ["conv.weight", "conv.bias"], ["a.weight", "b.weight", "norm.running_mean"]])
def test_a_checkpoint_comes_back_to_the_bit_with_tied_and_channels_last_tensors(
    tmp_path: Path, frozen: list[str]
) -> None:
    source = Tied().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    source.norm.running_mean.fill_(0.25)
    Checkpoints(tmp_path).save(source, frozen, {}, {"step": 7, "note": "x"}, ["last"])
    for target in (Tied(), Tied().to(memory_format=torch.channels_last)):  # type: ignore[call-overload]
        layout = target.conv.weight.stride()
        assert load_checkpoint(tmp_path / "last", target) == ({"step": 7, "note": "x"}, {})
        assert bits(target) == bits(source)
        assert target.conv.weight.stride() == layout and target.a.weight is target.b.weight
    assert read_model(tmp_path / "last").keys() == source.state_dict().keys() - {"b.weight"}
    state = read_state(tmp_path / "last")
    assert (state["tied"], state["version"]) == ({"b.weight": "a.weight"}, 2)


def test_what_is_tied_here_and_not_there_is_filled_if_it_is_the_same_and_refused_if_not(tmp_path: Path) -> None:
    loose = Tied()
    loose.b.weight = nn.Parameter(torch.zeros(3, 3))
    Checkpoints(tmp_path).save(Tied(), [], {}, {"step": 1}, ["last"])
    load_checkpoint(tmp_path / "last", loose)
    assert torch.equal(loose.b.weight, loose.a.weight)
    Checkpoints(tmp_path).save(loose, [], {}, {"step": 2}, ["last"])
    load_checkpoint(tmp_path / "last", Tied())
    loose.b.weight.data.zero_()
    Checkpoints(tmp_path).save(loose, [], {}, {"step": 3}, ["last"])
    with pytest.raises(CheckpointError, match=r"one tensor in the model, and two in it, are a\.weight and b\.weight"):
        load_checkpoint(tmp_path / "last", Tied())


def test_tensors_that_share_memory_are_kept_as_they_are(tmp_path: Path) -> None:
    memory = torch.arange(6.0)
    module = nn.Module()
    for name, view in {"a": memory[:4], "b": memory[2:], "c": memory.view(2, 3).T, "e": memory[:0]}.items():
        module.register_buffer(name, view)
    Checkpoints(tmp_path).save(module, ["a"], {}, {"step": 1}, ["last"])
    found = read_model(tmp_path / "last")
    assert {name: fingerprint(tensor) for name, tensor in found.items()} == bits(module)


def test_what_is_not_a_dense_tensor_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    module = nn.Module()
    module.register_buffer("odd", torch.eye(2).to_sparse())
    with pytest.raises(TypeError, match=r"odd is a tensor of torch\.sparse_coo, torch\.float32, which"):
        Checkpoints(tmp_path).save(module, [], {}, {"step": 1}, ["last"])
    with pytest.raises(TypeError, match=r"optimizer state at own:Kind/weight/odd: expected .*, got a set"):
        Checkpoints(tmp_path).save(small(), [], {"own:Kind": {"weight": {"odd": {1}}}}, {"step": 1}, ["last"])
    assert list(tmp_path.iterdir()) == []


def test_a_text_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old")
    write_json(file, {"new": 1})
    assert json.loads(file.read_text()) == {"new": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            nn.Linear(2, 2),
            r"it lacks weight, bias; it has, and the model has not, head\.bias, head\.weight, trunk\.bias",
        ),
        (
            nn.ModuleDict({"trunk": nn.Linear(3, 4), "head": nn.Linear(4, 3)}),
            r"fit this model: of another shape are head\.weight \(expected \(3, 4\), got \(2, 4\)\), head\.bias",
        ),
        (nn.ModuleDict({"trunk": nn.Linear(3, 4)}), r"model: it has, and the model has not, head\.bias, head\.weight$"),
    ],
)
def test_another_model_is_refused_with_names_and_shapes_and_is_no_damage(
    tmp_path: Path, other: nn.Module, message: str
) -> None:
    save(Checkpoints(tmp_path), 1)
    before = bits(other)
    for load in (lambda: load_checkpoint(tmp_path / "last", other), lambda: load_newest(tmp_path, other)):
        with pytest.raises(CheckpointError, match=message) as caught:
            load()
        assert not isinstance(caught.value, DamagedCheckpoint)
    assert bits(other) == before


# --- which are kept


def test_last_and_best_point_to_their_steps_and_the_rest_is_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    steps: dict[str, list[int]] = {"last": [], "best": []}
    for step, names in [(1, ("last", "best")), (2, ("last",)), (3, ("last", "best")), (4, ("last",)), (5, ("last",))]:
        save(checkpoints, step, names=names)
        for name, seen in steps.items():
            seen.append(read_state(tmp_path / name)["step"])
            assert read_model(tmp_path / name)["head.weight"].unique().tolist() == [seen[-1]]
    assert steps == {"last": [1, 2, 3, 4, 5], "best": [1, 1, 3, 3, 3]}
    steps_there = ["step-00000003", "step-00000004", "step-00000005"]
    assert inside(tmp_path) == ["best", "frozen", "last", *steps_there]


@pytest.mark.parametrize(("keep_last", "expected"), [(0, [2, 6]), (1, [2, 6]), (3, [2, 4, 5, 6]), (9, [*range(1, 7)])])
def test_the_newest_are_kept_to_fall_back_to_and_those_that_shall_stay_permanently(
    tmp_path: Path, keep_last: int, expected: list[int]
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=keep_last)
    for step in range(1, 7):
        checkpoints.save(small(step), [], {}, {"step": step}, ["last"], keep=step == 2)
    assert [read_state(folder)["step"] for folder in reversed(newest_first(tmp_path))] == expected
    assert (tmp_path / "kept-00000002").readlink() == Path("step-00000002")


def test_a_step_that_is_there_is_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    checkpoints.save(small(9), [], {}, {"step": 1}, ["last"])
    assert inside(tmp_path) == ["last", "step-00000001"]
    assert read_model(tmp_path / "last")["head.bias"].tolist() == [9, 9]
    assert not (tmp_path / "last/frozen.safetensors").exists()


def test_one_that_a_killed_process_left_moved_aside_is_found_and_put_back(tmp_path: Path) -> None:
    for step in (1, 2):
        save(Checkpoints(tmp_path), step)
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.old")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000001.old")
    assert load_newest(tmp_path, small())[1] == {"step": 2}
    Checkpoints(tmp_path)
    assert inside(tmp_path) == ["frozen", "last", "step-00000001", "step-00000002"]
    path, state, _, refused = load_newest(tmp_path, small())
    assert (path, state, refused) == (tmp_path / "step-00000002", {"step": 2}, [])


def test_those_newer_than_a_step_are_dropped_with_their_links(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    for step in range(1, 5):
        save(checkpoints, step, frozen=step, names=("last", "best") if step < 3 else ("last",))
    checkpoints.drop_newer(2)
    assert inside(tmp_path) == ["best", "frozen", "step-00000001", "step-00000002"]
    assert len(inside(tmp_path / "frozen")) == 2


# --- what is frozen


def test_what_is_frozen_is_on_the_disk_once(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        save(checkpoints, step)
    (file,) = (tmp_path / "frozen").iterdir()
    assert file.stem == read_state(tmp_path / "last")["digests"]["frozen"]
    assert {(folder / "frozen.safetensors").stat().st_ino for folder in newest_first(tmp_path)} == {file.stat().st_ino}
    assert load_file(file).keys() == {*TRUNK}
    assert load_file(tmp_path / "last/model.safetensors").keys() == {"head.weight", "head.bias"}


def test_frozen_tensors_that_changed_are_another_file_and_the_old_one_goes_with_its_last_checkpoint(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(tmp_path)
    counts = []
    for step, value in enumerate([1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0], start=1):
        save(checkpoints, step, frozen=value)
        counts.append(len(inside(tmp_path / "frozen")))
        for folder in newest_first(tmp_path):
            load_checkpoint(folder, small())
    assert counts == [1, 1, 2, 1, 2, 1, 1]
    for step in (8, 9):
        checkpoints.save(small(), [], {}, {"step": step}, ["last"])
    assert not (tmp_path / "frozen").exists(), "nothing is frozen any more"


def test_all_may_be_frozen(tmp_path: Path) -> None:
    module = small(3)
    Checkpoints(tmp_path).save(module, [*module.state_dict(), "not.persistent"], {}, {"step": 1}, ["last"])
    target = small()
    load_checkpoint(tmp_path / "last", target)
    assert bits(target) == bits(module)
    assert load_file(tmp_path / "last/model.safetensors") == {}


def test_a_damaged_frozen_file_is_not_linked_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    (file,) = (tmp_path / "frozen").iterdir()
    flip_in_place(file, -1)
    save(checkpoints, 2)
    load_checkpoint(tmp_path / "last", small())
    with pytest.raises(DamagedCheckpoint, match=r"step-00000001/frozen\.safetensors is damaged"):
        load_checkpoint(tmp_path / "step-00000001", small())


def test_a_file_system_without_hard_links_has_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        save(checkpoints, step)
        assert load_newest(tmp_path, small())[1] == {"step": step}
    assert inside(tmp_path) == ["last", "step-00000002", "step-00000003"]


def test_a_folder_that_was_copied_is_complete(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path / "run"), 1)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run/last", copy)
    shutil.rmtree(tmp_path / "run")
    assert load_checkpoint(copy, small())[0] == {"step": 1}


def test_one_of_another_run_is_adopted_with_a_link_to_what_is_frozen(tmp_path: Path) -> None:
    for step in (1, 2):
        save(Checkpoints(tmp_path / "old"), step)
    here = Checkpoints(tmp_path / "new")
    here.adopt(tmp_path / "old/last", 2, "last")
    here.adopt(tmp_path / "old/step-00000001", 1, "best")
    save(here, 3)
    files = [*(tmp_path / "new").rglob("*frozen.safetensors"), *(tmp_path / "new/frozen").iterdir()]
    assert len(files) == 4 and len({file.stat().st_ino for file in files}) == 1
    assert files[0].stat().st_ino == (tmp_path / "old/last/frozen.safetensors").stat().st_ino
    assert inside(tmp_path / "new") == ["best", "frozen", "last", *(f"step-0000000{step}" for step in (1, 2, 3))]
    for step in (4, 5):
        here.save(small(), [], {}, {"step": step}, ["last", "best"])
    assert not (tmp_path / "new/frozen").exists(), "the other run's link holds nothing here"
    load_checkpoint(tmp_path / "old/last", small())


# --- damage


def flip_in_place(file: Path, place: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def copy_from_other(folder: Path, name: str) -> None:
    other = next(path for path in newest_first(folder.parent) if path != folder)
    shutil.copy(other / name, folder / name)


def change_tensor(file: Path) -> None:
    tensors = load_file(file)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, file)


FILES = ["model.safetensors", "frozen.safetensors", "optimizer.safetensors", "state.json"]
DAMAGE: dict[str, Callable[[Path], object]] = {
    **{f"{name} missing": lambda folder, name=name: (folder / name).unlink() for name in FILES},
    **{f"{name} cut": lambda folder, name=name: os.truncate(folder / name, 40) for name in FILES},
    **{f"{name} empty": lambda folder, name=name: os.truncate(folder / name, 0) for name in FILES},
    **{f"{name} of another": lambda folder, name=name: copy_from_other(folder, name) for name in FILES},
    **{f"{name} with another tensor": lambda folder, name=name: change_tensor(folder / name) for name in FILES[:3]},
    "a number in state.json": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"step": 2', '"step": 3')
    ),
    **{
        f"state.json is {text}": lambda folder, text=text: (folder / "state.json").write_text(text)
        for text in ("[1]", "{}", "3", '{"digests": 3}', '{"digests": {"state": "x"}}', "[" * 100_000)
    },
    "state.json is no text": lambda folder: (folder / "state.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_touches_nothing_and_the_one_before_is_taken(
    tmp_path: Path, damage: str
) -> None:
    for step in (1, 2):
        save(Checkpoints(tmp_path), step, frozen=step)
    folder = (tmp_path / "last").resolve()
    DAMAGE[damage](folder)
    target = small(7, 7)
    before = bits(target)
    with pytest.raises(DamagedCheckpoint, match=r"is damaged|it has no") as caught:
        load_checkpoint(folder, target)
    assert bits(target) == before
    path, state, moments, refused = load_newest(tmp_path, target)
    assert (path.name, state, refused) == ("step-00000001", {"step": 1}, [str(caught.value)])
    assert bits(target) == bits(small(1, 1)) and str(folder) in refused[0]
    assert moments["sgd"]["head.weight"]["momentum_buffer"].unique().tolist() == [1]


def test_if_all_are_damaged_each_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        save(Checkpoints(tmp_path), step)
    (file,) = (tmp_path / "frozen").iterdir()
    flip_in_place(file, -1)
    with pytest.raises(CheckpointError, match=r"no checkpoint that is sound: .*step-00000002/fro.*step-00000001/fro"):
        load_newest(tmp_path, small())
    with pytest.raises(CheckpointError, match=r"nowhere has no checkpoints"):
        load_newest(tmp_path / "nowhere", small())


def test_another_version_is_no_damage(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path), 1)
    file = tmp_path / "last/state.json"
    state = json.loads(file.read_text()) | {"version": 3}
    state["digests"]["state"] = state_digest(state)
    file.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"state\.json is of version 3; this program reads version 2") as caught:
        load_newest(tmp_path, small())
    assert not isinstance(caught.value, DamagedCheckpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_bit_turned_anywhere_is_found_or_changes_nothing(tmp_path: Path, name: str) -> None:
    save(Checkpoints(tmp_path), 1)
    file = tmp_path / "last" / name
    content, sound, target = file.read_bytes(), bits(small(1)), small(7)
    moments = torch.full((2, 4), 1.0)
    num_found = 0
    for place in range(len(content)):
        flip_in_place(file, place, place % 8)
        before = bits(target)
        try:
            state, found = load_checkpoint(tmp_path / "last", target)
        except DamagedCheckpoint:
            num_found += 1
            assert bits(target) == before
        else:
            assert (bits(target), state) == (sound, {"step": 1})
            assert torch.equal(found["sgd"]["head.weight"]["momentum_buffer"], moments)
        file.write_bytes(content)
    assert num_found > 0.8 * len(content)


class Trap:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path("trapped").touch, ()


@pytest.mark.parametrize("name", FILES)
def test_code_in_a_file_is_not_run(tmp_path: Path, name: str) -> None:
    save(Checkpoints(tmp_path), 1)
    torch.save({"weight": Trap()}, tmp_path / "last" / name)
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(tmp_path / "last", small())
    assert not Path("trapped").exists()
    with (tmp_path / "last" / name).open("rb") as stream:
        torch.load(stream, weights_only=False)
    assert Path("trapped").exists(), "the trap works"
