"""The three textbook ways to freeze a part of a model, each on our own interface and each with real steps.

In each: what is frozen keeps its bytes and never has a gradient, everything else moves, and the audit agrees.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from mtl.audit import GradientAudit
from mtl.freeze import enforce, plan_freeze, trainable_parameters

NUM_STEPS = 5


def bits(tensor: Tensor) -> Tensor:
    """A copy of a tensor's bytes: -0.0 differs from 0.0, NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).clone()


def all_bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in after if not torch.equal(before[name], after[name])}


def train(
    model: nn.Module,
    freeze: list[str],
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    loss: Callable[[], Tensor],
) -> set[str]:
    """Trains under a freeze and a raising audit, and returns the names of the tensors that moved."""
    plan = plan_freeze(model, freeze)
    enforce(model, plan)
    optimizer = make_optimizer(list(trainable_parameters(model, plan).values()))
    frozen = [parameter for name, parameter in model.named_parameters() if name in plan.names.frozen]
    before = all_bits(model)
    audit = GradientAudit(model, freeze=freeze, optimizers=[optimizer])
    with audit.phase("textbook") as record:
        for _ in range(NUM_STEPS):
            # As every training loop does at the head of an epoch.
            model.train()
            loss().backward()
            assert all(parameter.grad is None for parameter in frozen)
            audit.after_backward()
            optimizer.step()
            audit.after_step()
            optimizer.zero_grad()
    assert audit.report.ok
    assert record.num_steps == NUM_STEPS
    assert record.num_trained == record.num_trainable > 0
    assert {*record.fingerprints} == {*plan.names.frozen, *plan.names.frozen_buffers}
    assert len(frozen) > 0
    return moved(before, all_bits(model))


def names_below(model: nn.Module, *prefixes: str) -> set[str]:
    """Names of all parameters and buffers whose name starts so."""
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {name for name in names if name.startswith(prefixes)}


# --- 1. the first children of a Sequential


def test_the_first_two_children_of_a_sequential_stay_and_all_others_move() -> None:
    model = nn.Sequential(
        nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
    )
    x, y = torch.randn(16, 3), torch.randn(16, 2)
    changed = train(
        model,
        ["0", "1"],
        lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda: nn.functional.mse_loss(model(x), y),
    )
    # What the textbook writes as `for parameter in model[:2].parameters(): parameter.requires_grad = False`.
    stays = {id(tensor) for tensor in [*model[:2].parameters(), *model[:2].buffers()]}
    names = dict([*model.named_parameters(), *model.named_buffers()])
    assert changed == {name for name, tensor in names.items() if id(tensor) not in stays}
    assert {name for name in names if name not in changed} == {
        "0.weight",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }


# --- 2. a list of substrings


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh())


class MultiTask(nn.Module):
    """A trunk with layer1, layer2 and layer10, and a head for each of three tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleDict({name: Block() for name in ("layer1", "layer2", "layer10")})
        self.heads = nn.ModuleDict(
            {"segmentation": nn.Linear(6, 4), "depth": nn.Linear(6, 1), "normals": nn.Linear(6, 3)}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.trunk.values():
            x = layer(x)
        return {task: head(x) for task, head in self.heads.items()}


NOT_TRAIN = ["trunk.layer1", "heads.depth"]


def train_tasks(freeze: list[str]) -> tuple[MultiTask, set[str]]:
    model = MultiTask()
    x = torch.randn(12, 6)
    labels = {task: torch.randn(12, head.out_features) for task, head in model.heads.items()}

    def loss() -> Tensor:
        return torch.stack([nn.functional.mse_loss(y, labels[task]) for task, y in model(x).items()]).sum()

    return model, train(model, freeze, lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.05), loss)


def test_a_list_of_substrings_freezes_what_the_classic_loop_freezes_across_tasks() -> None:
    model, changed = train_tasks([f"~{text}" for text in NOT_TRAIN])
    # The classic loop over names; it catches layer10 as well.
    classic = {name for name, _ in model.named_parameters() if any(text in name for text in NOT_TRAIN)}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == classic
    assert names_below(model, "trunk.layer10.") != set()
    assert changed == names_below(model, "trunk.layer2.", "heads.segmentation.", "heads.normals.")


def test_dotted_patterns_freeze_layer1_and_let_layer10_train() -> None:
    model, changed = train_tasks(NOT_TRAIN)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        "trunk.layer1.0.weight",
        "trunk.layer1.1.weight",
        "trunk.layer1.1.bias",
        "heads.depth.weight",
        "heads.depth.bias",
    }
    assert changed == names_below(model, "trunk.layer2.", "trunk.layer10.", "heads.segmentation.", "heads.normals.")
    assert len(names_below(model, "trunk.layer10.")) == 6


# --- 3. the first stages of a ResNet


def test_layer1_and_layer2_of_a_resnet18_stay_and_adamw_over_the_rest_moves_the_rest() -> None:
    model = timm.create_model("resnet18", pretrained=False, num_classes=4)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    changed = train(
        model,
        ["layer1", "layer2"],
        lambda parameters: AdamW(parameters, lr=1e-3, weight_decay=0.05),
        lambda: nn.functional.cross_entropy(model(x), y),
    )
    everything = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    frozen = names_below(model, "layer1.", "layer2.")
    assert changed == everything - frozen
    # Below, next to and above the frozen stages.
    assert {"conv1.weight", "bn1.running_mean", "layer3.0.downsample.0.weight", "fc.bias"} <= changed
    assert len([name for name, _ in model.named_parameters() if name in frozen]) == 27
