"""What is not computed on the meta device has the shapes that are computed on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl.config.optim import OptimizerConfig
from mtl.model.on_meta import ByShape
from mtl.optim.optimizers import build_optimizer, parameters_of


def described(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.stride())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_has_the_output_and_gradients_of_one_that_is_computed(
    training: bool, wanted: tuple[bool, bool], affine: bool, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    found: dict[str, Any] = {}
    for device in ("cpu", "meta"):
        norm = nn.BatchNorm2d(3, affine=affine, device=device, dtype=dtype).train(training)
        images = torch.zeros(2, 3, 4, 5, device=device, dtype=dtype).to(memory_format=layout)
        images.requires_grad_(wanted[0] or not affine)
        for parameter in norm.parameters():
            parameter.requires_grad_(wanted[1])
        with ByShape():
            output = norm(images)
            output.sum().backward()
        tensors = [output, images.grad, *(parameter.grad for parameter in norm.parameters())]
        found[device] = [described(each) for each in tensors]
    assert found["meta"] == found["cpu"]


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop", "nadam", "adagrad"])
def test_an_optimizer_keeps_what_it_keeps_after_a_step_that_is_computed(name: str) -> None:
    found: dict[str, Any] = {}
    for device in ("cpu", "meta"):
        with torch.device(device):
            parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (5,), (2, 3, 4))]
        options = {"momentum": 0.9} if name == "sgd" else {}
        group = {"params": parameters, "lr": 0.1, "weight_decay": 0.0}
        optimizer = build_optimizer(OptimizerConfig(name=name, options=options), [group])
        for parameter in parameters_of(optimizer):
            parameter.grad = torch.zeros_like(parameter)
        with ByShape():
            optimizer.step()
        states = [optimizer.state[parameter] for parameter in parameters]
        found[device] = [{key: described(torch.as_tensor(value)) for key, value in each.items()} for each in states]
        assert all(found[device])
    assert found["meta"] == found["cpu"]


def test_on_a_cpu_everything_is_computed() -> None:
    torch.manual_seed(0)
    images, norm = torch.randn(4, 3, 2, 2), nn.BatchNorm2d(3)
    with ByShape():
        output = norm(images)
        values = [torch.ones(2)]
        torch._foreach_mul_(values, 3.0)
    assert output.mean().item() == pytest.approx(0, abs=1e-6)
    assert output.var(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert values[0].tolist() == [3, 3]
