"""A model spread over processes trains as a plain one does, and its checkpoints are plain ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import fsdp_script
from mtl.distributed import World, WorldError
from mtl.fsdp import blocks, full_state_dict, load_full, shard
from processes import run_in_processes


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("test_resnet", 2),
        pytest.param("test_vit", 2, marks=pytest.mark.slow),
        pytest.param("test_resnet", 3, marks=pytest.mark.slow),
        pytest.param("test_vit", 3, marks=pytest.mark.slow),
    ],
)
def test_a_spread_model_trains_as_a_plain_one_and_is_taken_up(name: str, number: int, tmp_path: Path) -> None:
    script = Path(fsdp_script.__file__).read_text().replace('("test_resnet", "test_vit")', f'("{name}",)')
    run_in_processes(script, tmp_path, number)
    found: list[dict[str, Any]] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(number)]
    assert sum(each[name]["local"] for each in found) == found[0][name]["all"]
    for rank, each in enumerate(found):
        got = each[name]
        assert got["names"] and got["local"] < 1.1 * got["all"] / len(found)
        for phase, (spread, plain) in got["losses"].items():
            assert spread == pytest.approx(plain, rel=2e-5), phase
            # What was frozen is as it was and has no gradient, all else has one, and nothing is left gathered.
            assert got[f"{phase} still"] and got[f"{phase} moved"] and got[f"{phase} sharded"], phase
        assert (got["names on rank"] > 0) == (rank == 0)
        assert got["go on"][0] == got["go on"][1]
    first = found[0][name]
    # The rate times the rounding of gradients, which AdamW divides by 1e-2 at most.
    assert first["difference"] < 1e-5
    assert first["loaded"] == first["plain"] == first["taken up"] == 0


@pytest.mark.parametrize(("name", "number"), [("test_resnet", 8), ("test_vit", 6)])
def test_blocks_are_the_members_of_a_trunks_sequences(name: str, number: int) -> None:
    trunk = timm.create_model(name, num_classes=0)
    found = list(blocks(trunk))
    assert len(found) == len(set(found)) >= number - 1
    inside = [p for block in found for p in block.parameters()]
    assert len(inside) == len(set(inside)) and sum(p.numel() for p in inside) > 0.8 * sum(
        p.numel() for p in trunk.parameters()
    )


def test_alone_a_model_stays_as_it_is_and_its_state_is_loaded_back() -> None:
    model = fsdp_script.build("test_resnet")
    shard(model, World.alone())
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())
    full = full_state_dict(model, World.alone())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    load_full(model, full)
    assert all(torch.equal(tensor, full[name]) for name, tensor in model.state_dict().items())
    del full["trunk.bn1.weight"]
    with pytest.raises(WorldError, match=r"trunk.bn1.weight is in one of the two only"):
        load_full(model, full)


def test_a_layout_that_cannot_be_spread_is_refused() -> None:
    model = fsdp_script.build("test_resnet").to(memory_format=torch.channels_last)
    with pytest.raises(WorldError, match=r"trunk.conv1.0.weight: FSDP takes contiguous tensors only"):
        shard(model, World(0, 2, 0))
