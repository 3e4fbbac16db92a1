"""Set-ups with a hazard: nothing frozen moves, but it could, or its output is not constant; and their correct twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from audit_faults import TRUNK, Scene, X, correct, distance, each, hazard, normed, plain, uneven
from audit_loops import Normed, Tiny, freeze_by_hand, trainable

IN_OPTIMIZER, REQUIRES_GRAD = ("in_optimizer", TRUNK), ("requires_grad", TRUNK)


# --- frozen, but not constant


@hazard("constancy", "dropout of a frozen trunk in train mode", ("active_dropout", "trunk.2"))
def active_dropout() -> Scene:
    model = normed()
    model.trunk[2].train()
    return plain(model)


@hazard("constancy", "dropout inside an attention layer", ("active_dropout", "trunk"))
def attention_dropout() -> Scene:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.MultiheadAttention(2, 1, dropout=0.1)
            self.head = nn.Linear(2, 1)
            freeze_by_hand(self.trunk)
            self.trunk.train()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.trunk(x, x, x, need_weights=False)[0])

    return plain(Attending())


@hazard("constancy", "a stochastic depth of timm in train mode", ("active_dropout", "trunk.1"))
def drop_path() -> Scene:
    from timm.layers import DropPath

    model = Tiny()
    model.trunk = nn.Sequential(nn.Linear(2, 2), DropPath(0.2))
    model.trunk.requires_grad_(False)
    return plain(model)


@hazard("constancy", "BatchNorm without statistics, in eval mode", ("batch_statistics", "trunk.1"))
def without_statistics() -> Scene:
    model = normed()
    model.trunk[1] = nn.BatchNorm1d(4, track_running_stats=False)
    freeze_by_hand(model.trunk)
    return plain(model)


@hazard(
    "constancy",
    "track_running_stats = False on a norm that is left in train mode",
    ("train_mode", "trunk.1"),
    ("batch_statistics", "trunk.1"),
)
def tracking_switched_off() -> Scene:
    model = normed()
    model.trunk[1].train()
    model.trunk[1].track_running_stats = False
    return plain(model)


@hazard("constancy", "BatchNorm with momentum 0 in train mode", ("train_mode", "trunk.1"))
def momentum_of_zero() -> Scene:
    model = normed()
    model.trunk[1].momentum = 0.0
    model.trunk[1].train()
    # Without a counter, nothing of it moves.
    model.trunk[1].num_batches_tracked = None
    return plain(model)


@correct("constancy", "dropout of a part that trains, in train mode")
def dropout_of_a_head() -> Scene:
    return plain(normed())


@correct("constancy", "GroupNorm and InstanceNorm in a frozen trunk in train mode")
def other_norms() -> Scene:
    model = Tiny()
    model.trunk = nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2), nn.LayerNorm(2))
    model.trunk.requires_grad_(False)
    return plain(model)


@correct("constancy", "a dropout of rate 0 in train mode")
def dropout_of_zero() -> Scene:
    model = Tiny()
    model.trunk = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))
    model.trunk.requires_grad_(False)
    return plain(model)


@correct("constancy", "a norm of which only the weight is frozen")
def half_a_norm() -> Scene:
    model = Normed()
    model.trunk[1].weight.requires_grad_(False)
    return plain(model, freeze=("trunk.1.weight",))


# --- what frozen tensors are held by, and asked


@hazard("optimizer", "SGD over all parameters, flags off, gradients None", IN_OPTIMIZER)
def over_all() -> Scene:
    model = uneven()
    return Scene(model, [SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)])


@hazard("optimizer", "AdamW over all parameters, flags off, gradients None, attach()", IN_OPTIMIZER)
def over_all_attached() -> Scene:
    model = uneven()
    return Scene(model, [AdamW(model.parameters(), lr=0.01)], attach=True)


@hazard("flag", "after a detach, with the flag left on", REQUIRES_GRAD)
def behind_a_detach() -> Scene:
    model = uneven()
    model.trunk.requires_grad_(True)
    return Scene(
        model, [SGD(model.head.parameters(), lr=0.05)], loss=lambda _: distance(model.head(model.trunk(X).detach()))
    )


@hazard("flag", "after a detach, and in the optimizer", REQUIRES_GRAD, IN_OPTIMIZER)
def behind_a_detach_in_optimizer() -> Scene:
    scene = behind_a_detach()
    scene.optimizers = [AdamW(scene.model.parameters(), lr=0.01)]
    return scene


@correct("flag", "frozen between forward and backward of the step before the phase")
def frozen_between() -> Scene:
    model = uneven()
    model.trunk.requires_grad_(True)
    loss = distance(model(X))
    freeze_by_hand(model.trunk)
    losses = [loss]
    return plain(model, loss=lambda _: losses.pop() if losses else distance(model(X)))


@hazard("buffer", "a cache that no checkpoint holds is made again", ("identity_changed", "trunk.cached"))
def cache_made_again() -> Scene:
    model = uneven()
    model.trunk.register_buffer("cached", torch.ones(2), persistent=False)
    return plain(model, after=lambda step: step == 4 and setattr(model.trunk, "cached", torch.ones(4)))


# --- what is trained, and what is fixed


class Positioned(Tiny):
    """A fixed table of positions is a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.pos_embed)


FIXED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a table of positions": (Positioned, ["pos_embed"]),
    "a table in a module of its own": (lambda: with_module(Fixed()), ["other.table"]),
    "an embedding from vectors": (
        lambda: with_module(nn.Embedding.from_pretrained(torch.ones(2, 2), freeze=True)),
        ["other.weight"],
    ),
    "the bias of a norm": (lambda: with_bias_off(), ["other.bias"]),
}


class Fixed(nn.Module):
    """Keeps nothing but a fixed parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(2), requires_grad=False)


def with_module(other: nn.Module) -> nn.Module:
    model = Tiny()
    model.other = other
    return model


def with_bias_off() -> nn.Module:
    class Necked(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.LayerNorm(2)
            self.other.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.other(self.trunk(x)))

    return Necked()


def fixed(make: Callable[[], nn.Module]) -> Scene:
    model = make()
    return Scene(model, [SGD(trainable(model), lr=0.05)])


for _name, (_make, _names) in FIXED.items():
    hazard("liveness", f"fixed by design: {_name}", *each("fixed_parameter", _names))(
        lambda make=_make: fixed(make)  # type: ignore[misc]
    )


@correct("tasks", "a curriculum that drops a task, which is named idle", idle=("heads.b",))
def curriculum() -> Scene:
    from audit_faults import TwoHeads

    model = TwoHeads()

    def loss(step: int) -> Tensor:
        return distance(model(X)) if step <= 40 else distance(model.task("a", X))

    return Scene(model, [SGD(trainable(model), lr=0.02)], loss=loss, num_steps=160)


@correct("optimizer", "a wrapper that passes its steps on, attach()")
def wrapped() -> Scene:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.inner = optimizer
            self.param_groups = optimizer.param_groups

        def step(self) -> None:
            self.inner.step()

        def zero_grad(self) -> None:
            self.inner.zero_grad()

    model = uneven()
    return Scene(model, [Wrapper(SGD(trainable(model), lr=0.05))], attach=True)


@correct("optimizer", "accelerate's wrapper, attach()", needs="accelerate")
def accelerated() -> Scene:
    from accelerate.optimizer import AcceleratedOptimizer

    model = uneven()
    optimizer = AcceleratedOptimizer.__new__(AcceleratedOptimizer)
    optimizer.optimizer = SGD(trainable(model), lr=0.05)
    inner = optimizer.optimizer

    return Scene(model, [optimizer], attach=True, update=lambda _: inner.step(), clear=lambda _: inner.zero_grad())


@correct("optimizer", "Lookahead of timm, attach()")
def lookahead() -> Scene:
    from timm.optim import Lookahead

    model = uneven()
    return Scene(model, [Lookahead(SGD(trainable(model), lr=0.05), k=3)], attach=True)


@correct("structure", "TorchScript in the frozen trunk", ignore="`torch.jit")
def scripted() -> Scene:
    model = Tiny()
    model.trunk = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval())
    for parameter in model.trunk.parameters():
        parameter.requires_grad_(False)
    return plain(model)


@correct("structure", "a lazy head, attach()", ignore="Lazy modules")
def lazy_attached() -> Scene:
    model = Tiny()
    model.head = nn.LazyLinear(1)
    return Scene(model, [SGD(model.head.parameters(), lr=0.05)], attach=True)


@correct("structure", "a frozen parameter of a subclass that wraps others")
def wrapping_subclass() -> Scene:
    from torch.testing._internal.two_tensor import TwoTensor

    model = Tiny()
    model.trunk.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)), requires_grad=False)

    return plain(model, loss=lambda _: distance(model.head(X @ model.trunk.weight.a)))
