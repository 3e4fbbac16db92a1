"""CORAL: one weight vector for all questions, against the formulas of its authors' code, in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mtl.cli import main
from mtl.config import HeadConfig, SettingError, TrunkConfig
from mtl.model import MultiTaskModel, set_output_bias
from mtl.model.heads.shared_linear import SharedLinear
from mtl.tasks import Classification, Ordinal, Task
from mtl.tasks.ordinal import Coral, Corn
from runs import read_model, tiny_config

HEADS = ("linear", "mlp", "attention_pool")
NUM_CLASSES = 5


def model_of(task: Task, head: str | None = None) -> MultiTaskModel:
    torch.manual_seed(0)
    chosen = None if head is None else HeadConfig(name=head)
    return MultiTaskModel(TrunkConfig(name="test_vit"), {"t": task}, 32, heads={"t": chosen})


def layer_of(num_classes: int = NUM_CLASSES, seed: int = 0) -> SharedLinear:
    """Random weights and biases, in float64."""
    torch.manual_seed(seed)
    layer = SharedLinear(7, num_classes - 1).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    return layer


def coral_loss(logits: Tensor, label: Tensor) -> Tensor:
    """That of coral-pytorch, with its levels: the first `label` of K - 1 are 1."""
    levels = torch.tensor([[1.0] * y + [0.0] * (NUM_CLASSES - 1 - y) for y in label.tolist()], dtype=torch.float64)
    terms = functional.logsigmoid(logits) * levels + (functional.logsigmoid(logits) - logits) * (1 - levels)
    return (-terms.sum(dim=1)).mean()


@pytest.mark.parametrize("head", [None, *HEADS])
def test_the_last_layer_has_one_weight_vector_and_a_bias_for_each_question(head: str | None) -> None:
    state = model_of(Ordinal(NUM_CLASSES, loss=Coral()), head).heads["t"].state_dict()
    assert state["out.weight"].shape[0] == 1 and state["out.bias"].shape == (NUM_CLASSES - 1,)
    for free in (Ordinal(NUM_CLASSES, loss=Corn()), Ordinal(NUM_CLASSES), Classification(NUM_CLASSES - 1)):
        state = model_of(free, head).heads["t"].state_dict()
        assert state["out.weight"].shape[0] == NUM_CLASSES - 1


def test_layer_and_loss_are_those_of_the_authors_with_their_gradients() -> None:
    task, layer = Ordinal(NUM_CLASSES, loss=Coral()), layer_of()
    x, label = torch.randn(40, 7, dtype=torch.float64), torch.arange(40) % NUM_CLASSES
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in layer.parameters())
    expected = coral_loss((x * weight[0]).sum(dim=1, keepdim=True) + bias, label)
    found = task.loss(layer(x), label)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    mine, theirs = torch.autograd.grad(found, [*layer.parameters()]), torch.autograd.grad(expected, [weight, bias])
    for own, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("seed", range(5))
def test_probabilities_fall_for_every_image_with_random_weights_and_fitted_biases(head: str, seed: int) -> None:
    task = Ordinal(NUM_CLASSES, loss=Coral())
    model = model_of(task, head).double().eval()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    # One class has no image, and some have few.
    set_output_bias(model.heads["t"], task.fit(torch.tensor([0, 1, 1, 1, 4, 4, 4, 4, 4, 4])))
    with torch.no_grad():
        output = model(torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8))["t"]
    assert output[:, 0].std() > 1e-3
    assert (output.diff(dim=1) <= 0).all()
    # So the questions whose answer is yes are the first ones, as many as the class says.
    yes = output.sigmoid() > 0.5
    assert torch.equal(yes.sum(dim=1), yes.cumprod(dim=1).sum(dim=1))


def test_free_outputs_have_no_such_order() -> None:
    torch.manual_seed(0)
    assert (torch.nn.Linear(7, 4)(torch.randn(40, 7)).diff(dim=1) > 0).any()


def test_the_questions_have_one_order_for_all_images_whatever_the_biases() -> None:
    layer = layer_of(seed=3)
    differences = layer(torch.randn(40, 7, dtype=torch.float64)).diff(dim=1)
    torch.testing.assert_close(differences, layer.bias.diff().expand_as(differences), rtol=1e-9, atol=1e-9)


def test_at_the_least_loss_the_biases_fall_wherever_they_began() -> None:
    task, layer = Ordinal(NUM_CLASSES, loss=Coral()), layer_of()
    with torch.no_grad():
        layer.bias.copy_(torch.linspace(-3, 3, NUM_CLASSES - 1))  # in the wrong order
    x = torch.randn(200, 7, dtype=torch.float64)
    label = (x[:, 0] + 0.5 * torch.randn(200) > torch.tensor([[-1.0], [-0.3], [0.4], [1.2]])).sum(dim=0)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = task.loss(layer(x), label)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    assert (layer.bias.diff() < 0).all()


def test_a_head_without_a_linear_last_layer_is_refused_at_its_key(tmp_path: Path) -> None:
    (tmp_path / "conv.py").write_text(
        "from torch import nn\nfrom mtl.model import Head\n\n"
        "class Own(Head):\n    output, reads = 'vector', frozenset({'pyramid'})\n\n"
        "    def __init__(self, shape, num_outputs):\n        super().__init__()\n"
        "        self.out = nn.Conv2d(shape.pyramid[-1], num_outputs, 1)\n\n"
        "    def forward(self, features, size):\n        return self.out(features.pyramid[-1]).mean((2, 3))\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(SettingError, match=r"tasks\.t\.head: .* has to be an nn\.Linear, got Conv2d"):
            model_of(Ordinal(3, loss=Coral()), "conv:Own")
        assert model_of(Ordinal(3), "conv:Own")
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("conv", None)


def test_it_trains_under_the_audit(tmp_path: Path) -> None:
    tasks = {"object": {"type": "ordinal", "num_classes": 10, "loss": "coral", "head": "mlp"}}
    file = tiny_config(tmp_path, tasks=tasks, phases=[{"name": "a", "freeze": ["trunk"], "epochs": 1}])
    assert main(["train", str(file), "-q"]) == 0
    assert main(["audit", str(tmp_path / "runs/tiny")]) == 0
    bias = read_model(tmp_path / "runs/tiny/checkpoints/last")["heads.object.out.bias"]
    assert bias.shape == (9,)
