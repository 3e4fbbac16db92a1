"""Gradient checkpointing: the same bits with activations computed twice, statistics moved once."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from mtl.config import ConfigError
from mtl.model.grad_checkpointing import enable_grad_checkpointing
from mtl.training.run import train
from runs import small_parts


def step(trunk: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    images = torch.randn(4, 3, trunk.size, trunk.size)  # type: ignore[arg-type]
    for _ in range(2):
        for level in trunk.forward_intermediates(images, intermediates_only=True):  # type: ignore[operator]
            level.square().mean().backward(retain_graph=True)
    gradients = {f"{name}.grad": each.grad for name, each in trunk.named_parameters() if each.grad is not None}
    return {name: tensor.clone() for name, tensor in {**trunk.state_dict(), **gradients}.items()}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        ("test_efficientnet", {"drop_path_rate": 0.3}),
        ("test_vit", {"drop_path_rate": 0.3}),
        ("test_convnext", {}),
    ],
)
def test_a_trunk_that_computes_again_has_the_same_gradients_and_statistics_to_the_bit(
    name: str, options: dict[str, float]
) -> None:
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        trunk = timm.create_model(name, num_classes=0, **options).train()
        trunk.size = trunk.pretrained_cfg["input_size"][-1]
        calls: list[bool] = []
        if again:
            enable_grad_checkpointing(trunk)
        for module in trunk.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(lambda *_: calls.append(torch._C._current_graph_task_id() != -1))  # noqa: B023
        results.append(step(trunk))
        assert any(calls) == again, "something is computed in the backward, or nothing is"
        assert all(module.track_running_stats for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)), (
            "all are awake again"
        )
    plain, computed = results
    assert plain.keys() == computed.keys()
    assert [key for key in plain if not torch.equal(plain[key], computed[key])] == []


def test_a_run_with_it_has_the_weights_of_one_without(tmp_path: Path) -> None:
    phases = [{"name": "a", "freeze": ["trunk"], "epochs": 1}, {"name": "b", "freeze": ["trunk@first:1"], "epochs": 1}]
    states = []
    for again in ("false", "true"):
        parts = small_parts(tmp_path, f"trunk.checkpointing={again}", f"name=run-{again}", phases=phases)
        result = train(parts, quiet=True)
        assert result.report.ok
        states.append({name: tensor.clone() for name, tensor in parts.root.state_dict().items()})
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_a_trunk_that_cannot_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trunk\.checkpointing: timm does not support it for 'inception_v3'"):
        data = {"image_size": 80, "num_train": 8}
        small_parts(tmp_path, "trunk={name: inception_v3, checkpointing: true}", data=data)
