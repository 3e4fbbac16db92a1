"""Checkpoints in folders: the chunks of torch.distributed.checkpoint, and the shards of Hugging Face."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from mtl.audit.offline.compare import compare
from mtl.checkpoint.tensor_file import TensorFileError, UnreadableError, join_chunks, read_contents
from mtl.cli import main
from processes import run_in_two_processes

TENSORS = {
    "trunk.conv.weight": torch.tensor([[1.0, -0.0], [float("nan"), 2.0]]),
    "trunk.steps": torch.tensor(3),
    "trunk.empty": torch.zeros(0, 2),
    "heads.out.bias": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16),
}


def save(state: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def optimizer_state() -> dict[str, Any]:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def edit(folder: Path, change: Callable[[Metadata], None]) -> None:
    """Writes the metadata of a folder again after a change."""
    content = pickle.loads((folder / ".metadata").read_bytes())
    change(content)
    (folder / ".metadata").write_bytes(pickle.dumps(content))


class Planted:
    """Would make a file if it were unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.file)!r}, 'w').close()",)


# --- forms of a state


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"model": t, "optimizer": optimizer_state(), "epoch": 3},
        lambda t: {"app": {"model": t, "optim": optimizer_state()}},
        lambda t: {"state_dict": {f"module.{name}": x for name, x in t.items()}, "ema": torch.zeros(1)},
        lambda t: {f"_orig_mod.{name}": x for name, x in t.items()},
        lambda t: {"trunk": {n[6:]: x for n, x in t.items() if "trunk" in n}, "heads": {"out": {"bias": t[BIAS]}}},
        lambda t: {name: nn.Parameter(x) if x.is_floating_point() else x for name, x in t.items()},
    ],
)
def test_every_usual_state_has_the_names_of_the_plain_one(
    tmp_path: Path, wrap: Callable[[Any], dict[str, Any]]
) -> None:
    read = read_contents(save(wrap(TENSORS), tmp_path / "dcp")).tensors
    assert compare(TENSORS, read).ok and len(read) == len(TENSORS)
    assert not any(tensor.requires_grad for tensor in read.values())


BIAS = "heads.out.bias"


def test_a_model_whose_own_names_begin_with_model_is_left_whole(tmp_path: Path) -> None:
    state = {"model.layer.weight": torch.ones(2), "lm_head.weight": torch.zeros(2)}
    assert compare(state, read_contents(save(state, tmp_path / "dcp")).tensors).ok


def test_what_older_versions_write_is_read(tmp_path: Path) -> None:
    folder = save(TENSORS, tmp_path / "dcp")
    old = io.BytesIO()

    class Pickler(pickle._Pickler):
        """Writes names as older versions have them, enum members as Python 3.11.2 does, and paths as 3.13 does."""

        def save_global(self, obj: Any, name: str | None = None) -> None:
            moved = {
                "TensorProperties": "torch.distributed._shard.sharded_tensor.metadata",
                "PosixPath": "pathlib._local",
            }
            if (module := moved.get(getattr(obj, "__name__", ""))) is None:
                return super().save_global(obj, name)
            self.write(f"c{module}\n{obj.__name__}\n".encode())
            self.memoize(obj)
            return None

        def reducer_override(self, obj: Any) -> Any:
            is_member = type(obj).__name__ == "_MEM_FORMAT_ENCODING"
            return (getattr, (type(obj), obj.name)) if is_member else NotImplemented

        dispatch: ClassVar = {**pickle._Pickler.dispatch, type: save_global}

    Pickler(old, 4).dump(pickle.loads((folder / ".metadata").read_bytes()))
    assert all(word in old.getvalue() for word in (b"_shard.sharded_tensor", b"pathlib._local", b"getattr"))
    (folder / ".metadata").write_bytes(old.getvalue())
    assert compare(TENSORS, read_contents(folder).tensors).ok


def test_a_state_that_was_not_flattened_keeps_its_names(tmp_path: Path) -> None:
    folder = save({"model": TENSORS}, tmp_path / "dcp")
    edit(folder, lambda m: setattr(m, "planner_data", None))
    assert list(read_contents(folder).tensors) == [f"model.{name}" for name in TENSORS]


def test_the_command_finds_a_changed_bit_and_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain.pth"
    torch.save(TENSORS, plain)
    same = save({"model": TENSORS, "optimizer": optimizer_state()}, tmp_path / "same")
    other = save({"model": {**TENSORS, "trunk.steps": torch.tensor(2)}}, tmp_path / "other")
    assert main(["audit", str(plain), str(same), "--freeze", "trunk"]) == 0
    assert main(["audit", str(same), str(other), "--freeze", "trunk"]) == 3
    assert "trunk.steps: changed by up to 1" in capsys.readouterr().out
    assert main(["audit", str(same), str(other), "--freeze", "heads"]) == 0


def test_any_one_changed_byte_of_a_shard_is_found_or_refused_and_raises_nothing_else(tmp_path: Path) -> None:
    values = {"w": torch.arange(4.0)}
    folder = save(values, tmp_path / "dcp")
    shard = folder / "__0_0.distcp"
    good = shard.read_bytes()
    payload = good.find(values["w"].numpy().tobytes())
    for place in [*range(0, len(good), 7), *range(payload, payload + 16)]:
        shard.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            same = compare(values, read_contents(folder).tensors).ok
        except UnreadableError:
            same = False
        assert not (same and payload <= place < payload + 16)


# --- what is refused


def bad_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"nonsense")


def cut_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-40])


def other_pickle(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))


def code_in_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Planted(folder / "ran")))


def code_in_planner_data(folder: Path) -> None:
    edit(folder, lambda m: setattr(m, "planner_data", {"w": Planted(folder / "ran")}))


def code_by_getattr(folder: Path) -> None:
    """A call of `Path.touch`, which names only what a good file may name too."""
    call = b"cbuiltins\ngetattr\n(cpathlib\nPosixPath\nS'touch'\ntR(cpathlib\nPosixPath\n(S'%b'\ntRtR."
    (folder / ".metadata").write_bytes(call % str(folder / "ran").encode())


def other_code_of_torch(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"ctorch\nload\n(S'x'\ntR.")


def code_after_a_dot(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x04true\x85R.")


def attribute_of_a_class(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"ctorch.distributed.checkpoint.metadata\nMetadata\n}S'x'\nI1\nsb.")


def code_in_a_shard(folder: Path) -> None:
    shard = io.BytesIO()
    torch.save({"w": Planted(folder / "ran")}, shard)
    (folder / "__0_0.distcp").write_bytes(shard.getvalue())

    def change(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = replace(info, offset=0, length=len(shard.getvalue()))

    edit(folder, change)


def places(**values: Any) -> Callable[[Path], None]:
    """Changes where the metadata says the chunks are."""

    def change(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = replace(info, **values)

    return lambda folder: edit(folder, change)


def cut_shard(folder: Path) -> None:
    (folder / "__0_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes()[:-1])


def no_shard(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def zero_shard(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))


def chunks(*boxes: tuple[list[int], list[int]]) -> Callable[[Path], None]:
    """Describes other chunks of the tensor of four elements, all with the bytes of the one that there is."""

    def change(metadata: Metadata) -> None:
        (info,) = metadata.storage_data.values()
        made = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
        metadata.state_dict_metadata["w"].chunks = made
        metadata.storage_data = {MetadataIndex("w", offsets): info for offsets, _ in boxes}

    return lambda folder: edit(folder, change)


def no_place(folder: Path) -> None:
    edit(folder, lambda m: m.storage_data.clear())


def larger_than_its_chunks(folder: Path) -> None:
    edit(folder, lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([1 << 50])))


def another_type(folder: Path) -> None:
    edit(folder, lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.int32))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (bad_metadata, "is no pickle of metadata"),
        (cut_metadata, "is no pickle of metadata"),
        (other_pickle, "not the metadata of a distributed checkpoint"),
        (code_in_metadata, "names builtins.exec, which the metadata of a checkpoint does not need; not run"),
        (code_in_planner_data, "names builtins.exec, "),
        (code_by_getattr, "is no pickle of metadata"),
        (other_code_of_torch, "names torch.load, which the metadata of a checkpoint does not need; not run"),
        (code_after_a_dot, "names torch.os.system"),
        (attribute_of_a_class, "is no pickle of metadata"),
        (code_in_a_shard, "w: __0_0.distcp: it holds an exec, which is code; not run"),
        (places(relative_path="../outside.distcp"), "names ../outside.distcp, which is outside the folder; not read"),
        (places(relative_path="/etc/passwd"), "outside the folder"),
        (places(relative_path="a\\..\\..\\outside"), "outside the folder"),
        (places(relative_path="."), "is missing"),
        (places(relative_path=3), "names 3 as a file"),
        (places(offset=-1), "has no place"),
        (places(offset=1), "cut short"),
        (places(length=1 << 60), "cut short"),
        (places(length=10), "w: __0_0.distcp: "),
        (places(transform_descriptors=["stream.zstd/1"]), r"written with \['stream.zstd/1'\], which is not undone"),
        (cut_shard, "__0_0.distcp ends before byte .*: it was cut short"),
        (no_shard, "names __0_0.distcp, which is missing"),
        (zero_shard, "w: __0_0.distcp: "),
        (no_place, r"w: its chunk at \[0\] is in no file"),
        (chunks(), "w: its chunks leave a gap: 0 of 4 elements"),
        (chunks(([0], [2])), r"w: its chunk at \[0\] has another shape"),
        (chunks(([0], [4]), ([0], [4])), "w: its chunks overlap: 8 of 4 elements"),
        (chunks(([2], [4])), r"w: a chunk at \[2\] of sizes \[4\] is not inside \[4\]"),
        (chunks(([0, 0], [2, 2])), "w: "),
        (larger_than_its_chunks, "w: its chunks leave a gap: 4 of"),
        (another_type, r"w: its chunk at \[0\] has another shape or type"),
    ],
)
def test_a_spoiled_folder_is_exit_code_2_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], message: str
) -> None:
    folder = save({"w": torch.ones(4)}, tmp_path / "dcp")
    (tmp_path / "outside.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    assert main(["audit", str(folder), str(folder)]) == 0
    spoil(folder)
    capsys.readouterr()
    with pytest.raises(UnreadableError, match=message):
        read_contents(folder)
    assert main(["audit", str(folder), str(folder)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("plant", [code_in_metadata, code_in_planner_data, code_by_getattr])
def test_the_planted_code_would_have_run(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    folder = save({"w": torch.ones(4)}, tmp_path / "dcp")
    plant(folder)
    pickle.loads((folder / ".metadata").read_bytes())
    assert (folder / "ran").exists()


def test_a_shard_that_only_the_optimizer_needs_may_not_be_cut_either(tmp_path: Path) -> None:
    folder = save({"model": TENSORS, "optimizer": optimizer_state()}, tmp_path / "dcp")
    cut_shard(folder)
    with pytest.raises(UnreadableError, match="cut short"):
        read_contents(folder)


# --- chunks


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """A shape, and boxes that cover it: every box is cut in two again and again, at a random place."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    boxes = [([0] * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[dim]))
        for start, size in ((0, cut), (cut, sizes[dim] - cut)):
            moved, kept = list(offsets), list(sizes)
            moved[dim], kept[dim] = offsets[dim] + start, size
            boxes.append((moved, kept))
    return shape, draw(st.permutations(boxes))


def cut_out(whole: Tensor, boxes: list[tuple[list[int], list[int]]]) -> Iterator[tuple[list[int], list[int], Tensor]]:
    for offsets, sizes in boxes:
        yield offsets, sizes, whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]


@settings(max_examples=80)
@given(split=splits(), data=st.data())
def test_chunks_that_cover_make_the_tensor_and_others_are_refused(
    split: tuple[list[int], list[tuple[list[int], list[int]]]], data: st.DataObject
) -> None:
    shape, boxes = split
    whole = torch.arange(1, 1 + int(torch.tensor(shape).prod()), dtype=torch.int64).reshape(shape)
    assert torch.equal(join_chunks(shape, torch.int64, cut_out(whole, boxes)), whole)
    full = [box for box in boxes if 0 not in box[1]]
    if not full:
        return
    dropped = data.draw(st.sampled_from(full))
    with pytest.raises(TensorFileError, match="leave a gap"):
        join_chunks(shape, torch.int64, cut_out(whole, [box for box in boxes if box is not dropped]))
    with pytest.raises(TensorFileError, match="overlap"):
        join_chunks(shape, torch.int64, cut_out(whole, [*boxes, dropped]))


def test_chunks_that_overlap_and_leave_a_gap_of_one_size_are_refused() -> None:
    twice = [([0], [2], torch.ones(2)), ([1], [2], torch.ones(2))]
    with pytest.raises(TensorFileError, match=r"overlap at \[1\], and leave a gap elsewhere"):
        join_chunks([4], torch.float32, twice)


FSDP = """
import os, sys, torch
from torch import nn
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
torch.manual_seed(0)
# Rows that two do not divide, and a layer whose one row leaves the second process nothing.
model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 1, 1))
if dist.get_rank() == 0:
    torch.save(model.state_dict(), sys.argv[1] + "/plain.pth")
mesh = dist.init_device_mesh("cpu", (2,))
fully_shard(model, mesh=mesh)
optimizer = torch.optim.Adam(model.parameters())
dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=sys.argv[1] + "/before")
model(torch.randn(2, 3, 8, 8)).sum().backward()
model[1].requires_grad_(False)
model[0].weight.grad = None
optimizer.step()
dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=sys.argv[1] + "/after")
# All is written. At an ordinary exit, after the group was destroyed, 3 of 10 runs were aborted by a thread of gloo.
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_of_fsdp_write_what_the_audit_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_in_two_processes(FSDP, tmp_path)
    content = pickle.loads((tmp_path / "before/.metadata").read_bytes())
    assert len(content.state_dict_metadata["model.0.weight"].chunks) == 2
    before, after = (str(tmp_path / name) for name in ("before", "after"))
    assert main(["audit", str(tmp_path / "plain.pth"), before]) == 0
    assert main(["audit", before, after, "--freeze", "0.weight"]) == 0
    assert main(["audit", before, after, "--freeze", "0"]) == 3
    assert "0.bias: changed by up to" in capsys.readouterr().out
    (tmp_path / "after/__1_0.distcp").unlink()
    assert main(["audit", before, after]) == 2


# --- shards of Hugging Face


def shards(folder: Path, form: str = "safetensors") -> Path:
    folder.mkdir()
    stem = "model" if form == "safetensors" else "pytorch_model"
    parts = [{name: t for name, t in TENSORS.items() if name.startswith(part)} for part in ("trunk", "heads")]
    placed = {}
    for i, part in enumerate(parts, 1):
        file = folder / f"{stem}-0000{i}-of-00002.{form}"
        save_file(part, file) if form == "safetensors" else torch.save(part, file)
        placed |= dict.fromkeys(part, file.name)
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return folder


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_with_an_index_are_one_checkpoint(tmp_path: Path, form: str) -> None:
    assert compare(TENSORS, read_contents(shards(tmp_path / "hf", form)).tensors).ok


def test_shards_may_be_links_to_elsewhere(tmp_path: Path) -> None:
    folder = shards(tmp_path / "hf")
    for file in list(folder.glob("*.safetensors")):
        file.rename(tmp_path / file.name)
        file.symlink_to(tmp_path / file.name)
    assert compare(TENSORS, read_contents(folder).tensors).ok


def test_a_whole_file_is_read_before_shards_and_a_bin_file_last(tmp_path: Path) -> None:
    folder = save({"chunked": torch.ones(1)}, tmp_path / "all")
    torch.save({"bin": torch.ones(1)}, folder / "pytorch_model.bin")
    assert list(read_contents(folder).tensors) == ["chunked"]
    save_file({"whole": torch.ones(1)}, folder / "model.safetensors")
    assert list(read_contents(folder).tensors) == ["whole"]
    for name in ("model.safetensors", ".metadata"):
        (folder / name).unlink()
    assert list(read_contents(folder).tensors) == ["bin"]


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        ({"heads.other": SECOND}, f"{SECOND}: lacks heads.other"),
        ({BIAS: "model-00001-of-00002.safetensors"}, f"00001-of-00002.safetensors: lacks {BIAS}"),
        ({"trunk.steps": SECOND}, "00001-of-00002.safetensors: holds, and the index not, trunk.steps"),
        ({"x": "none.safetensors"}, "names none.safetensors, which is missing"),
        ({"x": "../out.safetensors"}, "outside the folder"),
        ({"x": {}}, "as a file"),
        ([], "no index with a weight_map"),
    ],
)
def test_an_index_that_is_not_of_its_shards_is_refused(tmp_path: Path, placed: Any, message: str) -> None:
    folder = shards(tmp_path / "hf")
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    content["weight_map"] = {**content["weight_map"], **placed} if isinstance(placed, dict) else placed
    file.write_text(json.dumps(content))
    with pytest.raises(UnreadableError, match=message):
        read_contents(folder)
    assert main(["audit", str(folder), str(folder)]) == 2


def test_a_cut_shard_and_a_cut_index_are_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path / "hf")
    for name in (SECOND, "model.safetensors.index.json"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
        with pytest.raises(UnreadableError, match=name) as caught:
            read_contents(folder)
    assert str(caught.value).count(name) == 1 and str(caught.value).endswith("it is cut short, or is not JSON")


def test_a_folder_with_nothing_to_read_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=r"none of model.safetensors, .*index.json, .metadata, pytorch_model.bin"):
        read_contents(tmp_path)
