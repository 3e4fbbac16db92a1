"""Which parameters a task reaches, against the gradients of a real backward, on trunks of many families."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mtl.config import TrunkConfig
from mtl.model import MultiTaskModel
from mtl.model.reachability import reached_parameters
from mtl.tasks import Classification, Depth, Normals, Segmentation, Task

TASKS: dict[str, dict[str, Task]] = {
    "dense": {"depth": Depth(), "normals": Normals()},
    "vector": {"one": Classification(3), "two": Classification(2)},
    "mixed": {"segmentation": Segmentation(4), "object": Classification(3)},
}
# Trunks at image sizes they can be built for; the last ones compute for long at their own size.
TRUNKS = [
    ("test_resnet", 32),
    ("test_vit", 64),
    ("test_convnext", 32),
    ("resnet18", 32),
    ("tf_efficientnet_lite0", 32),
    ("convnext_atto", 32),
    ("mobilenetv3_small_100", 32),
    ("mixer_s32_224", 64),
    ("swin_tiny_patch4_window7_224", 64),
    ("vit_tiny_patch16_224", 64),
]
HEAVY = [
    ("swin_tiny_patch4_window7_224", 224),
    ("vit_tiny_patch16_224", 224),
    ("mixer_s32_224", 224),
    ("cait_xxs24_224", 64),
    ("deit_tiny_distilled_patch16_224", 64),
]


def model_of(trunk: str, size: int, tasks: dict[str, Task], device: str = "cpu") -> MultiTaskModel:
    torch.manual_seed(0)
    with torch.device(device):
        return MultiTaskModel(TrunkConfig(name=trunk), tasks, size)


def with_gradient(model: MultiTaskModel, size: int, task: str) -> set[str]:
    """The names of the parameters that have a gradient after a backward of a loss on one task's output."""
    model.zero_grad(set_to_none=True)
    images = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    model(images)[task].square().sum().backward()
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}


# Of every trunk with tasks of both kinds; with those of one kind, which leave other parts of a trunk out, of one
# trunk of each way to build them: convolutions, convolutions with a head that only pooling reads, and tokens.
CASES = [(trunk, size, "mixed") for trunk, size in TRUNKS]
CASES += [
    (trunk, size, kind)
    for trunk, size in (("test_resnet", 32), ("tf_efficientnet_lite0", 32), ("test_vit", 64))
    for kind in ("dense", "vector")
]
SLOW = [(trunk, size, "mixed") for trunk, size in HEAVY]
SLOW += [("cait_xxs24_224", 64, "vector"), ("deit_tiny_distilled_patch16_224", 64, "vector")]


@pytest.mark.parametrize(
    ("trunk", "size", "kind"), [*CASES, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_what_is_reached_is_what_a_backward_gives_a_gradient(trunk: str, size: int, kind: str) -> None:
    model = model_of(trunk, size, TASKS[kind])
    reached = reached_parameters(model)
    assert list(reached) == list(TASKS[kind])
    for task in TASKS[kind]:
        assert reached[task] == with_gradient(model, size, task)
    assert reached_parameters(model_of(trunk, size, TASKS[kind], "meta")) == reached, "on the meta device"


def test_a_task_reaches_its_own_head_and_no_other() -> None:
    reached = reached_parameters(model_of("test_resnet", 32, TASKS["mixed"]))
    for task, other in (("segmentation", "object"), ("object", "segmentation")):
        assert any(name.startswith(f"heads.{task}.") for name in reached[task])
        assert not any(name.startswith(f"heads.{other}.") for name in reached[task])
        assert any(name.startswith("trunk.layer1.") for name in reached[task])


def test_layers_that_only_pooling_needs_are_reached_by_vector_tasks_alone() -> None:
    reached = reached_parameters(model_of("tf_efficientnet_lite0", 32, TASKS["mixed"]))
    head = {"trunk.conv_head.weight", "trunk.bn2.weight", "trunk.bn2.bias"}
    assert head <= reached["object"]
    assert not head & reached["segmentation"]


def test_what_asks_for_no_gradient_is_not_reached() -> None:
    model = model_of("test_resnet", 32, TASKS["mixed"])
    before = reached_parameters(model)
    model.get_parameter("trunk.bn1.weight").requires_grad_(False)
    after = reached_parameters(model)
    assert {task: before[task] - after[task] for task in before} == {task: {"trunk.bn1.weight"} for task in before}


def test_every_name_of_a_tied_parameter_is_reached() -> None:
    model = model_of("test_resnet", 32, TASKS["vector"])
    one, two = model.heads["one"].get_submodule("out"), model.heads["two"].get_submodule("out")
    two.weight, two.bias = one.weight, nn.Parameter(torch.zeros(3))
    reached = reached_parameters(model)
    assert {name for name in reached["two"] if name.startswith("heads.")} == {
        "heads.one.out.weight",
        "heads.two.out.weight",
        "heads.two.out.bias",
    }


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


@pytest.mark.parametrize("trunk", ["test_resnet", "test_vit"])
def test_the_model_and_the_random_state_are_left_as_they_were(trunk: str) -> None:
    model = model_of(trunk, 64, TASKS["mixed"])
    model.train()
    model.trunk.eval()
    model.trunk.get_submodule("norm" if trunk == "test_vit" else "bn1").train()
    modes = {name: module.training for name, module in model.named_modules()}
    assert len({*modes.values()}) == 2
    kept = {name: _bits(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    random_state = torch.get_rng_state()
    reached_parameters(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: _bits(t) for name, t in [*model.named_parameters(), *model.named_buffers()]} == kept
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_gradients_that_are_there_stay_and_no_grad_around_makes_no_difference() -> None:
    model = model_of("test_resnet", 32, TASKS["mixed"])
    expected = reached_parameters(model)
    with_gradient(model, 32, "object")
    before = {name: None if p.grad is None else _bits(p.grad) for name, p in model.named_parameters()}
    with torch.no_grad():
        assert reached_parameters(model) == expected
        assert not torch.is_grad_enabled()
    assert {name: None if p.grad is None else _bits(p.grad) for name, p in model.named_parameters()} == before


def test_a_trunk_that_keeps_tensors_of_eval_mode_is_left_without_them() -> None:
    # LeViT keeps its attention biases, with their graph, until it is in train mode again.
    model = model_of("levit_128s", 64, TASKS["vector"])
    reached_parameters(model)
    with_gradient(copy.deepcopy(model).eval(), 64, "one")
    assert not any(module.attention_bias_cache for module in model.modules() if hasattr(module, "attention_bias_cache"))
