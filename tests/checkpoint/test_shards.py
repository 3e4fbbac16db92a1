"""Shards that processes wrote are read as the tensors that they make, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mtl.audit.offline.run import audit_run
from mtl.checkpoint.files import CheckpointError, DamagedCheckpoint, complete_state, read_state
from mtl.checkpoint.frozen import FrozenFiles
from mtl.checkpoint.load import load_checkpoint, load_newest
from mtl.checkpoint.sharded import write_plain
from mtl.checkpoint.tensor_file import Shards, TensorFileError, UnreadableError, described, file_digest, read_contents
from mtl.runtime.files import write_json

WEIGHT = torch.arange(15.0).reshape(5, 3)
BIAS = torch.tensor([1.0, -0.0, 2.0, 3.0, 4.0])
FILES = [f"model/shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]


def write_file(file: Path, shards: dict[str, tuple[list[int], Tensor]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    layout = {name: {"saved_offsets": offsets} for name, (offsets, _) in shards.items()}
    save_file({name: shard for name, (_, shard) in shards.items()}, file, {"DCP_SHARDING_INFO": json.dumps(layout)})


def write(folder: Path, step: int = 1, **changes: Any) -> Path:
    """A checkpoint of a linear layer as two processes write it: three rows and two of the weight, the bias by one."""
    write_file(folder / FILES[0], {"weight": ([0, 0], WEIGHT[:3].contiguous()), "bias": ([0], BIAS)})
    write_file(folder / FILES[1], {"weight": ([3, 0], WEIGHT[3:].contiguous()), "bias": ([5], BIAS[5:])})
    write_state(folder, step, **changes)
    return folder


def write_state(folder: Path, step: int = 1, **changes: Any) -> None:
    shards = {"model": {"weight": described(WEIGHT), "bias": described(BIAS)}}
    digests = {name: file_digest(folder / name) for name in FILES}
    own = {"optimizer": {"dict": {}}, "tied": {}, "shards": shards, "digests": digests} | changes
    found = {name: digest or "" for name, digest in own.pop("digests").items()}
    write_json(folder / "state.json", complete_state({"step": step}, own, found))


def test_shards_are_put_together_and_fill_a_module(tmp_path: Path) -> None:
    folder, module = write(tmp_path / "step-00000001"), nn.Linear(3, 5)
    assert load_checkpoint(folder, module) == ({"step": 1}, {})
    assert torch.equal(module.weight, WEIGHT)
    assert torch.signbit(module.bias[1]) and torch.equal(module.bias, BIAS)
    assert read_contents(folder).tensors.keys() == {"weight", "bias"}


def test_made_plain_they_are_what_one_process_writes(tmp_path: Path) -> None:
    folder = write(tmp_path / "step-00000001")
    write_plain(folder, tmp_path / "plain")
    module = nn.Linear(3, 5)
    assert load_checkpoint(tmp_path / "plain", module)[0] == {"step": 1}
    assert torch.equal(module.weight, WEIGHT) and "shards" not in read_state(tmp_path / "plain")
    assert load_file(tmp_path / "plain/optimizer.safetensors") == {}
    with pytest.raises(FileExistsError, match="expected a new folder"):
        write_plain(folder, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="is plain already; copy it"):
        write_plain(tmp_path / "plain", tmp_path / "again")


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("place", [-1, -70, 0, 9, 40, 100])
@pytest.mark.parametrize("number", [0, 1])
def test_a_flipped_byte_is_found_and_an_older_checkpoint_taken(place: int, number: int, tmp_path: Path) -> None:
    write(tmp_path / "step-00000001", 1)
    file = write(tmp_path / "step-00000002", 2) / FILES[number]
    flip(file, place)
    module = nn.Linear(3, 5)
    path, state, _, refused = load_newest(tmp_path, module)
    assert path.name == "step-00000001" and state == {"step": 1} and torch.equal(module.weight, WEIGHT)
    (reason,) = refused
    assert FILES[number] in reason or file.name in reason
    with pytest.raises(DamagedCheckpoint):
        write_plain(file.parent.parent, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("name", [*FILES, "state.json"])
def test_a_lost_file_is_found_and_the_module_stays(name: str, tmp_path: Path) -> None:
    folder, module = write(tmp_path / "step-00000001"), nn.Linear(3, 5)
    before = module.weight.detach().clone()
    (folder / name).unlink()
    with pytest.raises(DamagedCheckpoint, match=f"it has no {name}"):
        load_checkpoint(folder, module)
    assert torch.equal(module.weight, before)
    with pytest.raises(UnreadableError):
        read_contents(folder)


def test_a_file_of_which_nobody_knows_is_not_read(tmp_path: Path) -> None:
    folder, module = write(tmp_path / "step-00000001"), nn.Linear(3, 5)
    write_file(folder / "model/other.safetensors", {"weight": ([0, 0], torch.zeros(5, 3))})
    load_checkpoint(folder, module)
    assert torch.equal(module.weight, WEIGHT)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"weight": ([2, 0], WEIGHT[3:].contiguous())}, "its chunks overlap"),
        ({"weight": ([4, 0], WEIGHT[3:].contiguous())}, "is not inside"),
        ({"weight": ([3], WEIGHT[3:].contiguous())}, "is not inside"),
        ({"weight": ([3, 0], WEIGHT[3:].double())}, "expected shards of torch.float32, got torch.float64"),
        (
            {"weight": ([3, 0], WEIGHT[3:].contiguous()), "odd": ([0], BIAS)},
            "holds odd, which state.json does not",
        ),
        ({"bias": ([5], BIAS[5:])}, "leave a gap"),
    ],
    ids=["overlap", "outside", "another rank", "another type", "an unknown tensor", "a gap"],
)
def test_shards_that_do_not_make_a_tensor_are_refused(
    second: dict[str, tuple[list[int], Tensor]], reason: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "step-00000001")
    write_file(folder / FILES[1], second)
    write_state(folder)
    with pytest.raises(TensorFileError, match=reason):
        Shards(folder, read_state(folder), ["model"])["weight"]
    with pytest.raises(UnreadableError, match=reason):
        read_contents(folder)


@pytest.mark.parametrize("text", ["", "load 3", "float32 -3", "float32 x", 3, None])
def test_a_description_that_is_none_is_refused(text: object, tmp_path: Path) -> None:
    folder = write(tmp_path / "step-00000001", shards={"model": {"weight": text, "bias": described(BIAS)}})
    with pytest.raises(DamagedCheckpoint, match="expected a type and a shape"):
        load_checkpoint(folder, nn.Linear(3, 5))


def test_a_file_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_file(tmp_path / "model/x.safetensors", {"weight": ([0, 0], WEIGHT)})
    folder = write(tmp_path / "step-00000001", digests={"../model/x.safetensors": "0"})
    with pytest.raises(DamagedCheckpoint, match="outside the folder; not read"):
        load_checkpoint(folder, nn.Linear(3, 5))


def test_a_checkpoint_of_another_model_is_said_without_reading_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=r"of another shape are weight \(expected \(4, 3\), got \(5, 3\)\)"):
        load_checkpoint(folder, nn.Linear(3, 4))


def test_the_cold_audit_names_the_damaged_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoints/step-00000001")
    write_json(tmp_path / "audit.json", {"ok": True, "phases": []})
    assert not audit_run(tmp_path).is_broken
    flip(folder / FILES[1], -1)
    (finding,) = audit_run(tmp_path).findings
    assert finding == f"{folder / FILES[1]}: holds other tensors than were written at this step"


def test_frozen_shards_of_another_run_are_linked_and_damaged_ones_are_not(tmp_path: Path) -> None:
    source, store = write(tmp_path / "step-00000001") / "model", FrozenFiles(tmp_path / "frozen")
    store.adopt_shards(tmp_path / "one/frozen", source)
    (kept,) = store.folder.iterdir()
    assert {file.stat().st_ino for file in source.iterdir()} == {file.stat().st_ino for file in kept.iterdir()}
    # A copy, since a link would be damaged with it.
    name = Path(FILES[0]).name
    content = (kept / name).read_bytes()
    (kept / name).unlink()
    (kept / name).write_bytes(content[:-1] + b"x")
    store.adopt_shards(tmp_path / "two/frozen", source)
    assert (tmp_path / "two/frozen" / name).read_bytes() == (kept / name).read_bytes() == content
    store.sweep([tmp_path / "one"])
    assert list(store.folder.iterdir()) == [kept]
    store.sweep([])
    assert not store.folder.exists()
