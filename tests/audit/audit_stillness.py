"""Loops in which something trains for a while and then stands still, for a wrong reason or for a right one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR

from audit_faults import (
    HEAD,
    HEAD_B,
    Scene,
    TwoHeads,
    X,
    add_scaler,
    at,
    correct,
    distance,
    each,
    fault,
    plain,
    two_heads,
    uneven,
)
from audit_loops import Tiny, freeze_by_hand, trainable

LONG = 120


class Noisy(Tiny):
    """Sees other inputs at every step, so that it never stands at an optimum."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x + torch.randn_like(x)))


class NoisyHeads(TwoHeads):
    """The same, with two heads."""

    def task(self, name: str, x: Tensor) -> Tensor:
        output: Tensor = self.heads[name](self.trunk(x + torch.randn_like(x)))
        return output


def noisy_heads(weight_of_b: Callable[[int], float], **rest: Any) -> Scene:
    """Head b's loss has a weight that depends on the step."""
    model = NoisyHeads()
    return plain(
        model,
        loss=lambda step: distance(model.task("a", X)) + weight_of_b(step) * distance(model.task("b", X)),
        num_steps=LONG,
        **rest,
    )


def stopped(*names: str) -> list[tuple[str, str]]:
    return each("stopped_training", names)


# --- faults


@fault("stillness", "the rate falls to 0 at a wrong milestone", *stopped(*HEAD))
def wrong_milestone() -> Scene:
    scene = plain(Noisy(), num_steps=LONG)
    schedule = MultiStepLR(scene.optimizers[0], milestones=[20], gamma=0.0)
    scene.after = lambda _: schedule.step()
    return scene


@fault("stillness", "the rate of one of two groups falls to 0", *stopped(*HEAD_B))
def one_group_falls() -> Scene:
    model = NoisyHeads()
    groups = [{"params": list(head.parameters())} for head in model.heads.values()]
    optimizer = AdamW(groups, lr=0.01)
    schedule = LambdaLR(optimizer, [lambda _: 1.0, lambda step: float(step < 20)])
    return Scene(model, [optimizer], num_steps=LONG, after=lambda _: schedule.step())


@fault("stillness", "a loss weight decays to 0", *stopped(*HEAD_B))
def weight_decays() -> Scene:
    return noisy_heads(lambda step: max(0.0, 1 - step / 30))


@fault("stillness", "a loss weight decays exponentially", *stopped(*HEAD_B))
def weight_decays_exponentially() -> Scene:
    return noisy_heads(lambda step: 0.3**step)


@fault("stillness", "a loss weight of the only loss is annealed to 0", *stopped(*HEAD))
def only_weight_decays() -> Scene:
    model = Noisy()
    return plain(model, loss=lambda step: max(0.0, 1 - step / 30) * distance(model(X)), num_steps=LONG)


@fault("stillness", "a grad scaler gives up", *stopped(*HEAD))
def scaler_gives_up() -> Scene:
    model = Noisy()
    scene = plain(model, num_steps=LONG)
    add_scaler(scene)
    inner = scene.backward
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def backward(step: int) -> None:
        # From step 15 on, an overflow in every step.
        scaler.scale(distance(model(X)) * (math.inf if step > 15 else 1.0)).backward()

    def update(_: int) -> None:
        scaler.step(scene.optimizers[0])
        scaler.update()

    assert inner is not None
    scene.backward, scene.update = backward, update
    return scene


@fault("stillness", "a grad scaler around a fused optimizer gives up", *stopped(*HEAD))
def fused_scaler_gives_up() -> Scene:
    scene = scaler_gives_up()
    scene.optimizers[0] = Adam(scene.model.head.parameters(), lr=0.01, fused=True)
    return scene


@fault("stillness", "updates of bfloat16 round to nothing after a while", *stopped("head.weight"))
def rounds_to_nothing() -> Scene:
    model = Noisy().to(torch.bfloat16)
    scene = Scene(model, [SGD(trainable(model), lr=0.1)], num_steps=LONG)
    scene.loss = lambda _: distance(model(X.to(torch.bfloat16)))
    schedule = LambdaLR(scene.optimizers[0], lambda step: 1.0 if step < 10 else 1e-6)
    scene.after = lambda _: schedule.step()
    return scene


@fault("stillness", "a head is not-a-number from step 2", *each("not_finite", HEAD_B))
def nan_from_step_2() -> Scene:
    model = NoisyHeads()
    return plain(
        model,
        loss=lambda step: distance(model.task("a", X)) + distance(model.task("b", X)) * (1.0 if step < 2 else math.nan),
        num_steps=LONG,
    )


@fault("stillness", "all is not-a-number, in a short phase", *each("not_finite", HEAD))
def nan_in_a_short_phase() -> Scene:
    model = Tiny()
    return plain(model, loss=lambda step: distance(model(X)) / (step - 3), num_steps=8)


@fault("stillness", "a head dies after 5 steps, detached", *stopped(*HEAD_B))
def dies_detached() -> Scene:
    model = NoisyHeads()

    def loss(step: int) -> Tensor:
        second = model.task("b", X)
        return distance(model.task("a", X)) + distance(second if step <= 5 else second.detach())

    return plain(model, loss=loss, num_steps=LONG)


@fault("stillness", "a head dies after 5 steps, its units all negative", *stopped(*HEAD_B))
def dies_by_relu() -> Scene:
    model = NoisyHeads()

    def kill() -> None:
        with torch.no_grad():
            model.heads["b"].bias.fill_(-1e4)

    def loss(_: int) -> Tensor:
        return distance(model.task("a", X)) + distance(model.task("b", X).relu())

    return plain(model, loss=loss, after=at(5, kill), num_steps=LONG)


@fault("stillness", "one of two optimizers is stepped for 10 steps only", *stopped(*HEAD_B))
def forgotten_optimizer() -> Scene:
    model = NoisyHeads()
    optimizers = [SGD(head.parameters(), lr=0.05) for head in model.heads.values()]

    def update(step: int) -> None:
        optimizers[0].step()
        if step <= 10:
            optimizers[1].step()

    return Scene(model, list(optimizers), update=update, num_steps=LONG)


@fault("stillness", "an optimizer is stepped in one of ten iterations", ("gradients_dropped", "head.bias"))
def stepped_now_and_then() -> Scene:
    scene = plain(Noisy(), num_steps=LONG)
    scene.update = lambda step: scene.optimizers[0].step() if step % 10 == 0 else None
    return scene


@fault("stillness", "an optimizer is stepped in one of ten iterations, attach()", ("gradients_dropped", "head.bias"))
def stepped_now_and_then_attached() -> Scene:
    scene = stepped_now_and_then()
    scene.attach = True
    return scene


@correct("stillness", "five tasks whose gradients are projected by hand")
def projected_by_hand() -> Scene:
    scene = plain(Noisy(), num_steps=LONG)
    parameters = trainable(scene.model)

    def backward(_: int) -> None:
        rows = []
        for task in range(5):
            scene.optimizers[0].zero_grad()
            (distance(scene.model(X)) * 0.01 * (task + 1)).backward()
            rows.append([parameter.grad.clone() for parameter in parameters])
        for parameter, gradients in zip(parameters, zip(*rows, strict=True), strict=True):
            parameter.grad = torch.stack(gradients).mean(0)

    scene.backward = backward
    return scene


@fault("stillness", "written back after every step from the tenth on", *stopped(*HEAD))
def written_back_later() -> Scene:
    model = Noisy()
    kept: list[dict[str, Tensor]] = []

    def keep(step: int) -> None:
        if step == 10:
            kept.append({name: tensor.clone() for name, tensor in model.head.state_dict().items()})
        if step > 10:
            model.head.load_state_dict(kept[0])

    return plain(model, after=keep, num_steps=LONG)


@fault("stillness", "clipped to a norm of 0 after a while", *stopped(*HEAD))
def clipped_later() -> Scene:
    model = Noisy()
    scene = plain(model, num_steps=LONG)

    def update(step: int) -> None:
        if step > 15:
            nn.utils.clip_grad_norm_(model.parameters(), 0.0)
        scene.optimizers[0].step()

    scene.update = update
    return scene


@fault("liveness", "a dead table whose name has bias in it", ("never_received_grad", "relative_position_bias_table"))
def dead_bias_table() -> Scene:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(2, 4)
            self.head = nn.Linear(4, 1)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(3, 2))
            freeze_by_hand(self.trunk)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.trunk(x)) + 0.0 * self.relative_position_bias_table.sum()

    return plain(Attention())


# --- correct loops


@correct("stillness", "a constant rate, 120 steps")
def constant() -> Scene:
    return plain(Noisy(), num_steps=LONG)


@correct("stillness", "a cosine down to 0, 120 steps")
def cosine() -> Scene:
    scene = plain(Noisy(), num_steps=LONG)
    schedule = CosineAnnealingLR(scene.optimizers[0], T_max=LONG)
    scene.after = lambda _: schedule.step()
    return scene


@correct("stillness", "milestones that leave a rate, 120 steps")
def milestones() -> Scene:
    scene = plain(Noisy(), num_steps=LONG)
    schedule = MultiStepLR(scene.optimizers[0], milestones=[40, 80], gamma=0.1)
    scene.after = lambda _: schedule.step()
    return scene


@correct("stillness", "a regression that has reached its optimum", slow=True)
def at_the_optimum() -> Scene:
    return Scene(model := Tiny(), [SGD(trainable(model), lr=0.03)], num_steps=900)


@correct("stillness", "two heads that both have reached their optimum", slow=True)
def both_at_the_optimum() -> Scene:
    scene = two_heads(lambda model, _: distance(model.task("b", X)))
    scene.optimizers, scene.num_steps = [SGD(trainable(scene.model), lr=0.1)], 2000
    return scene


@correct("stillness", "a random task, 120 steps")
def drawn_for_long() -> Scene:
    model = NoisyHeads()
    return plain(model, loss=lambda _: distance(model.task("ab"[int(torch.rand(()) < 0.5)], X)), num_steps=LONG)


@correct("stillness", "a task that is drawn once in ten steps, 240 steps")
def rarely_drawn() -> Scene:
    model = NoisyHeads()
    return plain(model, loss=lambda step: distance(model.task("b" if step % 10 == 0 else "a", X)), num_steps=240)


@correct("stillness", "a loss weight that falls to a floor")
def weight_with_a_floor() -> Scene:
    return noisy_heads(lambda step: max(0.1, 1 - step / 30))


@correct("stillness", "a grad scaler that skips every fifth step")
def skips_now_and_then() -> Scene:
    model = Noisy()
    scene = plain(model, num_steps=LONG)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def backward(step: int) -> None:
        scaler.scale(distance(model(X)) * (math.inf if step % 5 == 0 else 1.0)).backward()

    def update(_: int) -> None:
        scaler.step(scene.optimizers[0])
        scaler.update()

    scene.backward, scene.update = backward, update
    return scene


@correct("stillness", "a logit scale that is clamped at its bound")
def clamped_scale() -> Scene:
    class Contrastive(Noisy):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.logit_scale.exp()

    model = Contrastive()

    def clamp(_: int) -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(max=-3.0)

    return Scene(model, [SGD(trainable(model), lr=1e-3)], after=clamp, num_steps=LONG)


@correct("stillness", "bfloat16 with float32 master weights")
def master_weights() -> Scene:
    model = Noisy()

    def loss(_: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(X)
        return distance(output.float())

    return plain(model, loss=loss, num_steps=LONG)


@correct("stillness", "a row of an embedding that is never looked up")
def unused_rows() -> Scene:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(2, 2)
            self.words = nn.Embedding(5, 2)
            freeze_by_hand(self.trunk)

        def forward(self, _: Tensor) -> Tensor:
            return self.trunk(self.words(torch.randint(0, 3, (4,))))

    return plain(Words(), num_steps=LONG)


@correct("stillness", "not-a-number in a padding row that is never looked up")
def nan_padding() -> Scene:
    scene = unused_rows()
    with torch.no_grad():
        scene.model.words.weight[4] = math.nan
    return scene


@correct("stillness", "a phase of accumulated gradients, 120 backwards")
def accumulated_for_long() -> Scene:
    scene = plain(Noisy(), num_steps=LONG)
    scene.update = lambda step: scene.optimizers[0].step() if step % 8 == 0 else None
    scene.clear = lambda step: scene.optimizers[0].zero_grad() if step % 8 == 0 else None
    return scene


@correct("stillness", "LambdaLR with a warm-up of 40 steps")
def long_warm_up() -> Scene:
    scene = plain(uneven(), num_steps=LONG)
    scene.model.head.reset_parameters()
    schedule = LambdaLR(scene.optimizers[0], lambda step: min(1.0, step / 40))
    scene.after = lambda _: schedule.step()
    return scene


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "Adam": lambda parameters: Adam(parameters, lr=0.01),
    "AdamW": lambda parameters: AdamW(parameters, lr=0.01),
    "SGD, momentum": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9),
    "SGD, decay": lambda parameters: SGD(parameters, lr=0.01, weight_decay=1e-3),
}


def dead_from(step: int, num_steps: int, make: Callable[..., Any]) -> Scene:
    """The loss of head b counts nothing from a step on; decay and momentum keep moving it."""
    scene = noisy_heads(lambda number: float(number < step))
    scene.optimizers, scene.num_steps = [make(trainable(scene.model))], num_steps
    return scene


for _name, _make in OPTIMIZERS.items():
    for _from, _steps in ((20, 120), (100, 300)):
        _loop = f"a loss weight of 0 from step {_from} of {_steps}, {_name}"
        fault("stillness", _loop, *stopped(*HEAD_B), slow=_steps == 300)(partial(dead_from, _from, _steps, _make))


def steps_cease(scaler: bool) -> Scene:
    scene = plain(Noisy(), num_steps=200, attach=True)
    if scaler:
        scene = scaler_gives_up()
        scene.attach, scene.num_steps = True, 200
        return scene
    scene.update = lambda step: scene.optimizers[0].step() if step <= 40 else None
    return scene


@fault("stillness", "attach(): step() is no longer called", *stopped(*HEAD))
def steps_cease_attached() -> Scene:
    return steps_cease(scaler=False)


@fault("stillness", "attach(): a grad scaler gives up", *stopped(*HEAD))
def scaler_gives_up_attached() -> Scene:
    return steps_cease(scaler=True)


@fault("stillness", "stepped in one of ten iterations, gradients set to zero", ("gradients_dropped", "head.bias"))
def zeroed_now_and_then() -> Scene:
    scene = stepped_now_and_then()
    scene.clear = lambda _: scene.optimizers[0].zero_grad(set_to_none=False)
    return scene


@fault("stillness", "some rows become not-a-number", ("not_finite", "words.weight"))
def some_rows_are_nan() -> Scene:
    scene = unused_rows()

    def spoil() -> None:
        with torch.no_grad():
            scene.model.words.weight[4] = math.nan

    scene.after = at(20, spoil)
    return scene


@correct("stillness", "LBFGS with a closure that clears, strong Wolfe")
def closure_that_clears() -> Scene:
    model = Tiny()
    optimizer = torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = distance(model(X))
        loss.backward()
        return loss

    return Scene(model, [optimizer], backward=lambda _: None, update=lambda _: optimizer.step(closure), num_steps=60)


def gradients_by_task(num_tasks: int) -> Scene:
    scene = plain(Noisy(), num_steps=60)
    parameters = trainable(scene.model)

    def backward(_: int) -> None:
        rows = []
        for _task in range(num_tasks):
            scene.optimizers[0].zero_grad()
            (distance(scene.model(X)) * 0.001).backward()
            rows.append([parameter.grad.clone() for parameter in parameters])
        for parameter, gradients in zip(parameters, zip(*rows, strict=True), strict=True):
            parameter.grad = torch.stack(gradients).sum(0)

    scene.backward = backward
    return scene


@correct("stillness", "twenty tasks whose gradients are put together by hand")
def twenty_tasks() -> Scene:
    return gradients_by_task(20)


@correct("stillness", "300 backwards of an analysis before the first step")
def analysis_first() -> Scene:
    scene = plain(Noisy(), num_steps=60)
    inner = scene._backward

    def backward(step: int) -> None:
        for _ in range(300 if step == 1 else 0):
            distance(scene.model(X)).backward()
            scene.optimizers[0].zero_grad()
        inner(step)

    scene.backward = backward
    return scene


@correct("stillness", "a task with a loss weight of 0 or 1, drawn")
def drawn_by_weight() -> Scene:
    return noisy_heads(lambda _: float(torch.rand(()) < 0.2))


@correct("liveness", "a head in no optimizer, which is named idle", idle=("heads.b",))
def idle_in_no_optimizer() -> Scene:
    model = NoisyHeads()
    optimizer = SGD(model.heads["a"].parameters(), lr=0.05)
    return Scene(model, [optimizer], clear=lambda _: model.zero_grad())
