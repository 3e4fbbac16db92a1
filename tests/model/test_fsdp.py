"""A model sharded over processes trains as a plain one does; each writes its shards, which make a plain checkpoint."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

import fsdp_script
from mtl.checkpoint.sharded import write_plain
from mtl.checkpoint.tensor_file import read_shards
from mtl.distributed.world import World, WorldError
from mtl.model.fsdp import blocks, shard
from processes import run_in_processes


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_sharded_model_trains_as_a_plain_one_and_is_resumed(name: str, number: int, tmp_path: Path) -> None:
    script = Path(fsdp_script.__file__).read_text().replace('("test_resnet", "test_vit")', f'("{name}",)')
    run_in_processes(script, tmp_path, number)
    found: list[dict[str, Any]] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(number)]
    assert sum(each[name]["local"] for each in found) == found[0][name]["all"]
    for rank, each in enumerate(found):
        got = each[name]
        assert got["names"] and got["local"] < 1.1 * got["all"] / len(found)
        for phase, (sharded, plain) in got["losses"].items():
            assert sharded == pytest.approx(plain, rel=2e-5), phase
            # What was frozen is as it was and has no gradient, all else has one, and nothing is left gathered.
            assert got[f"{phase} still"] and got[f"{phase} moved"] and got[f"{phase} sharded"], phase
        assert (got["names on rank"] > 0) == (rank == 0)
        assert got["continue"][0] == got["continue"][1]
    first = found[0][name]
    # The rate times the rounding of gradients, which AdamW divides by 1e-2 at most.
    assert first["difference"] < 1e-5
    assert first["resumed"] == 0 and all(each[name]["state sharded"] for each in found)
    check_shards(tmp_path / name, number)


def check_shards(folder: Path, number: int) -> None:
    """Each process has written its share, what is frozen once; made plain, all is what the first one would write."""
    one, two = folder / "shards/step-00000001", folder / "shards/step-00000002"
    for kind in ("model", "frozen"):
        sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in (two / kind).iterdir()]
        assert len(sizes) == number and max(sizes) < 0.6 * sum(sizes)
    for file in (two / "frozen").iterdir():
        # Of the two checkpoints, and of the folder that is there to find it.
        assert file.stat().st_nlink == 3 and file.stat().st_ino == (one / "frozen" / file.name).stat().st_ino
    write_plain(two, folder / "converted")
    files = sorted(path.name for path in (folder / "plain/last").iterdir())
    assert files == ["frozen.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert files == sorted(path.name for path in (folder / "converted").iterdir())
    for file in files:
        assert (folder / "converted" / file).read_bytes() == (folder / "plain/last" / file).read_bytes(), file
    check_that_torch_reads(two / "model")


def check_that_torch_reads(folder: Path) -> None:
    """What torch's own reader finds is what ours does: the folder is one of torch.distributed.checkpoint."""
    expected = read_shards(folder.parent, [folder.name])
    found = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    with warnings.catch_warnings():
        # Without a process group it says that it assumes one process.
        warnings.simplefilter("ignore")
        load(found, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(("name", "number"), [("test_resnet", 8), ("test_vit", 6)])
def test_blocks_are_the_members_of_a_trunks_sequences(name: str, number: int) -> None:
    trunk = timm.create_model(name, num_classes=0)
    found = list(blocks(trunk))
    assert len(found) == len(set(found)) >= number - 1
    inside = [p for block in found for p in block.parameters()]
    assert len(inside) == len(set(inside)) and sum(p.numel() for p in inside) > 0.8 * sum(
        p.numel() for p in trunk.parameters()
    )


def test_alone_a_model_stays_as_it_is() -> None:
    model = fsdp_script.build("test_resnet")
    shard(model, World.alone())
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())


def test_a_layout_that_cannot_be_sharded_is_refused() -> None:
    model = fsdp_script.build("test_resnet").to(memory_format=torch.channels_last)
    with pytest.raises(WorldError, match=r"trunk.conv1.0.weight: FSDP takes contiguous tensors only"):
        shard(model, World(0, 2, 0))
