"""Copies of the model are whole and independent: deep copies, pickles and files of torch.save, enforced or compiled."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtl.config import TrunkConfig
from mtl.freeze import enforce, plan_freeze
from mtl.model import MultiTaskModel
from mtl.tasks import Classification, Depth


def through_torch(model: MultiTaskModel) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[MultiTaskModel], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch,
}
FROZEN = ["trunk.bn1", "trunk.layer1", "heads.depth"]


def a_model(layout: torch.memory_format = torch.channels_last) -> MultiTaskModel:
    return MultiTaskModel(TrunkConfig(name="test_resnet"), {"depth": Depth(), "object": Classification(3)}, 32, layout)


def outputs(model: MultiTaskModel) -> dict[str, torch.Tensor]:
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(images)


def modes(model: MultiTaskModel) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_copy_computes_the_same_and_shares_no_memory(how: str, layout: torch.memory_format) -> None:
    model = a_model(layout).eval()
    model.trunk.requires_grad_(False)
    twin = COPIES[how](model)
    assert type(twin) is MultiTaskModel and twin.memory_format == layout and twin.trunk_is_frozen
    assert all(
        torch.equal(one, other) for one, other in zip(outputs(model).values(), outputs(twin).values(), strict=True)
    )
    before = outputs(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(0.5)
    assert all(torch.equal(one, other) for one, other in zip(outputs(model).values(), before.values(), strict=True))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_an_enforced_model_holds_its_own_modules_in_eval_mode(how: str) -> None:
    model = a_model()
    enforce(model, plan_freeze(model, FROZEN))
    expected = modes(model)
    twin = COPIES[how](model)
    assert modes(twin) == expected
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    for module in (*model.modules(), *twin.modules()):
        module.training = True
    twin.train()
    assert modes(twin) == expected and not expected["trunk.bn1"] and expected["trunk"]
    assert all(modes(model).values()), "the copy does not touch the model that it was made of"


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_an_enforced_model_takes_another_freeze_and_leaves_the_first_one_as_it_is(how: str) -> None:
    model = a_model()
    enforce(model, plan_freeze(model, FROZEN))
    expected = modes(model)
    twin = COPIES[how](model)
    enforce(twin, plan_freeze(twin, ["heads.object"]))
    model.train()
    assert modes(model) == expected
    assert not modes(twin)["heads.object"] and modes(twin)["trunk.bn1"]


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_compiled_model_runs_its_own_weights(how: str) -> None:
    model = a_model().eval()
    model.recompile()  # nothing is compiled before it runs
    twin = COPIES[how](model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(not output.any() for output in outputs(twin).values())
