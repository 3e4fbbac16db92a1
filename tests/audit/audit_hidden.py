"""Loops with tensors that torch does not register, tensors added in mid-phase, and changes undone before a check."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD

from audit_faults import HEAD, TRUNK, Scene, X, at, correct, distance, each, fault, plain, uneven
from audit_loops import Tiny, freeze_by_hand, trainable
from audit_stillness import LONG, Noisy

ATTRIBUTE = "attr_changed"


# --- tensors outside the module tree


class Holder:
    """A plain object with a tensor in it."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale


class Slotted:
    """A plain object without a dictionary."""

    __slots__ = ("scale",)

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale


@dataclass
class Table:
    """A dataclass with a tensor in it."""

    rows: list[Tensor] = field(default_factory=list)


WAYS: dict[str, tuple[Callable[[Tensor], dict[str, Any]], str]] = {
    "a private attribute": (lambda scale: {"_scale": scale}, "_scale"),
    "a private dictionary": (lambda scale: {"_tables": {"a": scale}}, "_tables.a"),
    "five levels deep": (lambda scale: {"deep": [[[[[scale]]]]]}, "deep.0.0.0.0.0"),
    "a deque": (lambda scale: {"queue": deque([scale])}, "queue.0"),
    "a SimpleNamespace": (lambda scale: {"space": SimpleNamespace(scale=scale)}, "space.scale"),
    "a plain object": (lambda scale: {"holder": Holder(scale)}, "holder.scale"),
    "a plain object with slots": (lambda scale: {"holder": Slotted(scale)}, "holder.scale"),
    "a dataclass": (lambda scale: {"table": Table([scale])}, "table.rows.0"),
    "an object in a list in an object": (lambda scale: {"o": Holder([SimpleNamespace(x=scale)])}, "o.scale.0.x"),
    "a set": (lambda scale: {"several": {scale}}, "several.0"),
    "a partial function": (lambda scale: {"function": partial(torch.mul, scale)}, "function.args.0"),
    "a key with a dot": (lambda scale: {"tables": {"a.b": scale}}, "tables.a.b"),
}


def kept_in(way: Callable[[Tensor], dict[str, Any]]) -> Scene:
    """A frozen tensor that is kept in some way, and written to at step 4."""
    model = uneven()
    scale = torch.tensor([0.1, 0.2])
    vars(model.trunk).update(way(scale))
    return plain(model, after=at(4, lambda: scale.mul_(0.9)))


for _name, (_way, _path) in WAYS.items():
    fault("hidden", f"a tensor in {_name} is written", (ATTRIBUTE, f"trunk.{_path}"))(partial(kept_in, _way))


@fault("hidden", "a class attribute is written", (ATTRIBUTE, "trunk.table"))
def class_attribute() -> Scene:
    class Tabled(nn.Linear):
        table: ClassVar[Tensor] = torch.tensor([1.0, 2.0])

    model = Tiny()
    model.trunk = Tabled(2, 2, bias=False)
    freeze_by_hand(model.trunk)
    return plain(model, after=at(4, lambda: Tabled.table.add_(1)))


@fault("hidden", "a module in a private attribute, past torch's register", ("param_changed", "trunk._adapter.weight"))
def private_module() -> Scene:
    model = uneven()
    adapter = nn.Linear(2, 2)
    freeze_by_hand(adapter)
    model.trunk.__dict__["_adapter"] = adapter
    return plain(model, after=at(4, lambda: adapter.weight.data.mul_(2)))


@fault("hidden", "a module in a plain object", ("buffer_changed", "trunk.holder.scale.running_mean"))
def module_in_object() -> Scene:
    model = uneven()
    norm = nn.BatchNorm1d(2)
    freeze_by_hand(norm)
    model.trunk.holder = Holder(norm)  # type: ignore[arg-type]
    return plain(model, after=at(4, lambda: norm.running_mean.add_(1)))


@fault("hidden", "an attribute is rebound after it stayed for some steps", (ATTRIBUTE, "trunk.scale"))
def rebound() -> Scene:
    model = uneven()
    model.trunk.scale = torch.tensor([0.1, 0.2])
    return plain(model, after=lambda step: step >= 5 and setattr(model.trunk, "scale", model.trunk.scale * 0.9))


@fault("hidden", "an entry of a list is rebound", (ATTRIBUTE, "trunk.scales.0"))
def rebound_in_list() -> Scene:
    model = uneven()
    model.trunk.scales = [torch.tensor([0.1, 0.2])]
    return plain(model, after=at(6, lambda: model.trunk.scales.__setitem__(0, torch.zeros(2))))


@correct("hidden", "a result that a forward rebinds in every step")
def result() -> Scene:
    model = uneven()

    def before(step: int) -> None:
        model.trunk._last = torch.full((2,), float(step))

    return plain(model, before=before)


@correct("hidden", "a cache that is made again for another size")
def cache_of_another_size() -> Scene:
    model = uneven()
    model.trunk._positions = torch.arange(4.0)
    return plain(model, after=at(6, lambda: setattr(model.trunk, "_positions", torch.arange(8.0))))


@correct("hidden", "an attribute is bound to the same bytes")
def rebound_to_the_same() -> Scene:
    model = uneven()
    model.trunk.scale = torch.tensor([0.1, 0.2])
    return plain(model, after=at(6, lambda: setattr(model.trunk, "scale", model.trunk.scale.clone())))


@correct("hidden", "references to what is registered, in lists and objects")
def references() -> Scene:
    model = uneven()
    model.trunk.parts = list(model.parameters())
    model.everything = SimpleNamespace(model=model, head=model.head, parameters=[model.head.weight])
    model._cycle = [model]
    return plain(model)


@correct("hidden", "a trainer with its optimizer in an attribute")
def with_trainer() -> Scene:
    scene = plain(uneven())
    scene.model.__dict__["_trainer"] = SimpleNamespace(optimizer=scene.optimizers[0], model=scene.model)
    return scene


@correct("hidden", "a queue of negatives next to a frozen trunk")
def queue() -> Scene:
    model = Tiny()
    model.negatives = deque([torch.zeros(2)], maxlen=4)
    return plain(model, after=lambda _: model.negatives.append(torch.randn(2)))


# --- new or replaced in mid-phase


def put_in(model: nn.Module, optimizer: SGD, loss: Callable[[Tensor], Tensor]) -> Scene:
    """A second head comes at step 3, and into the optimizer; `loss` makes of its output what is minimised."""

    def enter() -> None:
        model.extra = nn.Linear(2, 1)
        optimizer.add_param_group({"params": list(model.extra.parameters())})

    def both(_: int) -> Tensor:
        first = distance(model(X))
        return first if not hasattr(model, "extra") else first + loss(model.extra(model.trunk(X)))

    return Scene(model, [optimizer], loss=both, before=at(3, enter), num_steps=LONG)


@fault("mid-phase", "a head put in at step 3, dead", *each("never_received_grad", ["extra.weight", "extra.bias"]))
def put_in_dead() -> Scene:
    model = Noisy()
    return put_in(model, SGD(trainable(model), lr=0.05), lambda output: 0.0 * output.sum())


@fault("mid-phase", "a head put in at step 3, detached", *each("never_received_grad", ["extra.weight", "extra.bias"]))
def put_in_detached() -> Scene:
    model = Noisy()
    return put_in(model, SGD(trainable(model), lr=0.05), lambda output: output.detach().sum())


@correct("mid-phase", "a head put in at step 3, alive")
def put_in_alive() -> Scene:
    model = Noisy()
    return put_in(model, SGD(trainable(model), lr=0.05), distance)


@fault("mid-phase", "an adapter is appended inside the frozen trunk", ("identity_changed", "trunk.adapter.weight"))
def appended_adapter() -> Scene:
    model = uneven()
    return plain(model, after=at(4, lambda: model.trunk.add_module("adapter", nn.Linear(2, 2))))


@fault("mid-phase", "a parameter is registered inside the frozen trunk", ("identity_changed", "trunk.gate"))
def registered_parameter() -> Scene:
    model = uneven()
    return plain(model, after=at(4, lambda: setattr(model.trunk, "gate", nn.Parameter(torch.ones(2)))))


@fault("mid-phase", "a child is put in past torch's register", ("identity_changed", TRUNK))
def swapped_past_the_register() -> Scene:
    model = uneven()
    return plain(model, after=at(4, lambda: model._modules.__setitem__("trunk", nn.Linear(2, 2, bias=False))))


@correct("mid-phase", "the first forward fills a cache that is a new buffer")
def rope_cache() -> Scene:
    class Rotary(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "cos_cached"):
                self.register_buffer("cos_cached", torch.ones(2), persistent=False)
            return super().forward(x) * self.cos_cached

    model = uneven()
    weight = model.trunk.weight
    model.trunk = Rotary(2, 2, bias=False)
    model.trunk.weight = weight
    freeze_by_hand(model.trunk)
    return plain(model)


# --- undone before the look


def perturbed(scene: Scene, loss: Callable[[], Tensor]) -> Scene:
    """Forward and backward see other frozen weights, which are put back before the step."""

    def backward(_: int) -> None:
        with torch.no_grad():
            scene.model.trunk.weight.add_(0.1)
        loss().backward()

    def update(_: int) -> None:
        with torch.no_grad():
            scene.model.trunk.weight.copy_(kept)
        scene.optimizers[0].step()

    kept = scene.model.trunk.weight.detach().clone()
    scene.backward, scene.update = backward, update
    return scene


@fault("undone", "weights perturbed for forward and backward", ("param_changed", TRUNK))
def perturbed_by_hand() -> Scene:
    model = uneven()
    return perturbed(plain(model), lambda: distance(model(X)))


@fault("undone", "weights perturbed for forward and backward, attach()", ("param_changed", TRUNK))
def perturbed_and_attached() -> Scene:
    model = uneven()
    return perturbed(plain(model, attach=True), lambda: distance(model(X)))


@fault("liveness", "attach(): zero_grad comes before every step", *each("never_received_grad", HEAD))
def zeroed_and_attached() -> Scene:
    scene = plain(uneven(), attach=True)

    def update(_: int) -> None:
        scene.optimizers[0].zero_grad()
        scene.optimizers[0].step()

    scene.update = update
    return scene


@fault("liveness", "a loop that never steps, with a phase around it alone", *each("never_trained", HEAD))
def never_steps() -> Scene:
    return plain(uneven(), update=lambda _: None, unheard=True)


@correct("optimizer", "a phase around a loop, with no other call")
def unheard() -> Scene:
    return plain(uneven(), unheard=True, num_steps=LONG)


@correct("optimizer", "an optimizer rebuilt in mid-phase, with watch and unwatch")
def rebuilt() -> Scene:
    return rebuilt_scene(unwatch=True)


@correct("optimizer", "an optimizer rebuilt in mid-phase, with watch alone")
def rebuilt_and_watched() -> Scene:
    return rebuilt_scene(unwatch=False)


def rebuilt_scene(unwatch: bool) -> Scene:
    scene = plain(Noisy(), num_steps=LONG)

    def rebuild() -> None:
        (old,), scene.optimizers = scene.optimizers, [SGD(trainable(scene.model), lr=0.02)]
        if scene.audit is not None:
            scene.audit.watch(scene.optimizers[0])
            if unwatch:
                scene.audit.unwatch(old)

    scene.before = at(20, rebuild)
    return scene


@fault("liveness", "a second optimizer steps the same from step 20 on", *each("in_several_groups", HEAD))
def second_optimizer() -> Scene:
    scene = plain(Noisy(), num_steps=LONG)

    def add() -> None:
        scene.optimizers.append(SGD(trainable(scene.model), lr=0.02))
        if scene.audit is not None:
            scene.audit.watch(scene.optimizers[1])

    scene.before = at(20, add)
    return scene
