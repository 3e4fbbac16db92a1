"""The fault suite as data: loops with one planted fault each, correct loops that look suspicious, and set-ups with a
hazard, in which nothing has moved yet.

An entry builds a `Scene`, a loop cut into backward, update and clear; the audit, or any other checker, is wrapped
around it. Every fault states what has to be said of it: (kind, name of the tensor or module).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrizations, parametrize, prune, vector_to_parameters
from torch.optim import LBFGS, SGD, Adam, AdamW, RMSprop, SparseAdam
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from audit_loops import Normed, Tiny, X, freeze_by_hand, trainable, write_numpy_alias, write_smallest_bit
from mtl.audit import GradientAudit, Report

Act = Callable[[int], object]


def nothing(_: int) -> None:
    """What happens at most steps."""


@dataclass
class Phase:
    """One phase: what is done before it begins, and what is frozen in it if that is not what the scene says."""

    enter: Callable[[], object] = bool
    freeze: tuple[str, ...] | None = None


@dataclass
class Scene:
    """A loop as somebody wrote it, cut where a checker may look.

    Attributes:
        model: The model.
        optimizers: What the loop steps.
        freeze: Patterns of what was meant to be frozen.
        num_steps: Steps of each phase.
        before: Called with the number of the step, from 1, before its forward.
        after: The same after the optimizers' step.
        loss: The loss of a step; by default, that the model gives ones.
        backward: Forward and backward of a step, if they are not the usual ones.
        update: What takes the place of stepping every optimizer.
        clear: What takes the place of `zero_grad`.
        watched: The optimizers that a checker receives, if they are not all.
        also: Modules next to the model.
        ema: An average of the model.
        phases: One, or several of them.
        attach: Whether the audit is to look by itself.
        unheard: Whether the loop has a phase around it, and no call in it.
        audit: The audit, once it watches.
    """

    model: nn.Module
    optimizers: list[Any]
    freeze: tuple[str, ...] = ("trunk",)
    num_steps: int = 10
    before: Act = nothing
    after: Act = nothing
    loss: Callable[[int], Tensor] | None = None
    backward: Act | None = None
    update: Act | None = None
    clear: Act | None = None
    watched: list[Any] | None = None
    also: dict[str, nn.Module] = field(default_factory=dict)
    ema: nn.Module | None = None
    phases: list[Phase] = field(default_factory=lambda: [Phase()])
    attach: bool = False
    unheard: bool = False
    audit: GradientAudit | None = None

    def seen_optimizers(self) -> list[Any]:
        return self.optimizers if self.watched is None else self.watched

    def run(self, after_backward: Callable[[], object] = bool, after_step: Callable[[], object] = bool) -> None:
        """The steps of one phase."""
        for step in range(1, self.num_steps + 1):
            self.before(step)
            (self.backward or self._backward)(step)
            after_backward()
            (self.update or self._update)(step)
            self.after(step)
            after_step()
            (self.clear or self._clear)(step)

    def _backward(self, step: int) -> None:
        loss = self.loss(step) if self.loss else distance(self.model(X))
        if loss.requires_grad:
            loss.backward()

    def _update(self, _: int) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def _clear(self, _: int) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


@dataclass(frozen=True)
class Entry:
    """One loop of a table.

    Attributes:
        family: What it belongs to.
        name: Its own name.
        setup: Builds the loop again.
        expected: (kind, name) of what has to be found; nothing for a correct loop.
        hazards: (kind, name) of what has to be listed as a hazard; next to a fault, more may be.
        needs: A package that may be missing.
        ignore: The beginning of a warning that torch gives here and that means nothing to us.
        idle: Patterns of what may stay as it is.
        slow: Whether it takes more than a second.
        gap: What the audit gets wrong here so far.
    """

    family: str
    name: str
    setup: Callable[[], Scene]
    expected: frozenset[tuple[str, str]] = frozenset()
    hazards: frozenset[tuple[str, str]] = frozenset()
    needs: str = ""
    ignore: str = ""
    idle: tuple[str, ...] = ()
    slow: bool = False
    gap: str = ""


FAULTS: list[Entry] = []
CORRECT: list[Entry] = []
HAZARDS: list[Entry] = []


def fault(family: str, name: str, *expected: tuple[str, str], **rest: Any) -> Callable[..., Any]:
    """Puts a function that builds a loop with a fault into the table."""

    def enter(setup: Callable[[], Scene]) -> Callable[[], Scene]:
        FAULTS.append(Entry(family, name, setup, frozenset(expected), **rest))
        return setup

    return enter


def hazard(family: str, name: str, *hazards: tuple[str, str], **rest: Any) -> Callable[..., Any]:
    """Puts a function that builds a loop into the table in which nothing moves, and something could."""

    def enter(setup: Callable[[], Scene]) -> Callable[[], Scene]:
        HAZARDS.append(Entry(family, name, setup, hazards=frozenset(hazards), **rest))
        return setup

    return enter


def correct(family: str, name: str, **rest: Any) -> Callable[..., Any]:
    """Puts a function that builds a correct loop into the table."""

    def enter(setup: Callable[[], Scene]) -> Callable[[], Scene]:
        CORRECT.append(Entry(family, name, setup, **rest))
        return setup

    return enter


@contextmanager
def quiet(entry: Entry) -> Iterator[None]:
    """The same random numbers every time, and without the one warning that the entry names."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        if entry.ignore:
            warnings.filterwarnings("ignore", message=entry.ignore)
        yield


def audited(entry: Entry, strict: bool = False) -> Report:
    """Runs a loop under the audit."""
    with quiet(entry):
        scene = entry.setup()
        watched = scene.seen_optimizers()
        optimizers = () if scene.attach else watched
        audit = GradientAudit(scene.model, scene.freeze, optimizers, "collect", scene.also, scene.ema, strict=strict)
        if scene.attach:
            audit.attach(*watched)
        scene.audit = audit
        for number, phase in enumerate(scene.phases):
            phase.enter()
            optimizers = None if scene.attach else scene.seen_optimizers()
            with audit.phase(f"phase {number}", phase.freeze, optimizers, entry.idle):
                scene.run() if scene.attach or scene.unheard else scene.run(audit.after_backward, audit.after_step)
    return audit.report


# --- what the loops are made of


def distance(output: Tensor) -> Tensor:
    return (output - 1).square().mean()


def at(step: int, act: Callable[[], object]) -> Act:
    """Does something at one step."""
    return lambda number: act() if number == step else None


def uneven() -> Tiny:
    """`Tiny` with a trunk whose weights no short type can hold."""
    model = Tiny()
    with torch.no_grad():
        model.trunk.weight.copy_(torch.tensor([[0.1, -0.7], [0.3, 1.1]]))
    return model


def plain(model: nn.Module, **rest: Any) -> Scene:
    """A correct loop, to plant something in."""
    return Scene(model, [SGD(trainable(model), lr=0.05)], **rest)


class TwoHeads(nn.Module):
    """A frozen trunk under two heads, one for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(2, 4)
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
        freeze_by_hand(self.trunk)

    def forward(self, x: Tensor) -> Tensor:
        return self.task("a", x) + self.task("b", x)

    def task(self, name: str, x: Tensor) -> Tensor:
        output: Tensor = self.heads[name](self.trunk(x))
        return output


HEAD_B = ("heads.b.weight", "heads.b.bias")
HEAD = ("head.weight", "head.bias")
TRUNK = "trunk.weight"


def each(kind: str, names: Sequence[str]) -> list[tuple[str, str]]:
    return [(kind, name) for name in names]


# --- faults: moved by an optimizer


def careless(make: Callable[..., Any], zeroed: bool = True, **rest: Any) -> Scene:
    """The optimizer has stepped everything; then the trunk is frozen by its flag alone."""
    model = uneven()
    model.trunk.requires_grad_(True)
    optimizer = make(model.parameters())
    distance(model(X)).backward()
    optimizer.step()
    model.trunk.requires_grad_(False)
    if zeroed:
        optimizer.zero_grad(set_to_none=False)
    scene = Scene(model, [optimizer], **rest)
    scene.clear = scene.clear or (lambda _: clear_to_zero(model))
    return scene


def clear_to_zero(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.requires_grad:
            parameter.grad.zero_()


MOVED = [("param_changed", TRUNK), ("in_optimizer", TRUNK), ("grad_present", TRUNK)]
CARELESS: dict[str, Callable[..., Any]] = {
    "SGD, decay": partial(SGD, lr=0.05, weight_decay=0.1),
    "SGD, momentum": partial(SGD, lr=0.05, momentum=0.9),
    "SGD, Nesterov, foreach": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "Adam, moments": partial(Adam, lr=0.05),
    "AdamW, decay": partial(AdamW, lr=0.05, weight_decay=0.1, betas=(0.0, 0.0)),
    "AdamW, foreach": partial(AdamW, lr=0.05, foreach=True),
    "AdamW, fused": partial(AdamW, lr=0.05, fused=True),
    "RMSprop, momentum": partial(RMSprop, lr=0.01, momentum=0.9),
}
for _name, _make in CARELESS.items():
    fault("optimizer", f"built before the freeze: {_name}", *MOVED)(partial(careless, _make))
fault("optimizer", "a stale gradient that is never cleared", *MOVED)(
    partial(careless, partial(SGD, lr=0.05), zeroed=False)
)


@fault("optimizer", "LBFGS with a history from before the freeze", ("param_changed", TRUNK))
def lbfgs_before() -> Scene:
    scene = careless_lbfgs(frozen_first=False)
    scene.model.trunk.requires_grad_(False)
    return scene


def careless_lbfgs(frozen_first: bool) -> Scene:
    model = uneven()
    model.trunk.requires_grad_(not frozen_first)
    optimizer = LBFGS(trainable(model), lr=0.1, max_iter=3, history_size=20)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = distance(model(X))
        loss.backward()
        return loss

    optimizer.step(closure)
    return Scene(model, [optimizer], backward=nothing, update=lambda _: optimizer.step(closure))


@fault("optimizer", "the second of two optimizers holds the trunk", *MOVED)
def second_of_two() -> Scene:
    scene = careless(partial(SGD, lr=0.05, momentum=0.9))
    first = SGD(scene.model.head.parameters(), lr=0.05)
    groups = scene.optimizers[0].param_groups
    groups[0]["params"] = [p for p in groups[0]["params"] if not p.requires_grad]
    scene.optimizers = [first, scene.optimizers[0]]
    return scene


@fault("optimizer", "one optimizer is not watched", ("param_changed", TRUNK), ("grad_present", TRUNK))
def unwatched() -> Scene:
    scene = second_of_two()
    scene.watched = scene.optimizers[:1]
    return scene


def in_backward(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Scene:
    """Every parameter is stepped, and its gradient dropped, while the backward runs."""
    optimizers = {parameter: SGD([parameter], lr=0.05) for parameter in parameters}

    def step(parameter: Tensor) -> None:
        optimizer = optimizers[parameter]
        optimizer.step()
        optimizer.zero_grad()

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(step)
    return Scene(model, list(optimizers.values()), update=nothing, clear=nothing)


@fault("optimizer", "steps inside the backward", ("param_changed", TRUNK))
def stepped_in_backward() -> Scene:
    model = uneven()
    model.trunk.requires_grad_(True)
    return in_backward(model, list(model.parameters()))


@fault("optimizer", "a step by hand inside the backward", ("param_changed", TRUNK))
def by_hand_in_backward() -> Scene:
    model = uneven()

    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.data.add_(parameter.grad, alpha=-0.05)
        parameter.grad = None

    model.trunk.requires_grad_(True).weight.register_post_accumulate_grad_hook(step)
    return Scene(model, [SGD(model.head.parameters(), lr=0.05)])


@fault(
    "optimizer",
    "schedule-free swaps what it averaged",
    ("param_changed", TRUNK),
    needs="schedulefree",
)
def schedule_free() -> Scene:
    import schedulefree

    model = uneven()
    model.trunk.requires_grad_(True)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)
    optimizer.train()
    for _ in range(3):
        distance(model(X)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.trunk.requires_grad_(False)

    # The loop is left in eval mode, as it is when the best weights are saved.
    return Scene(model, [optimizer], after=at(10, optimizer.eval))


@fault("optimizer", "GradScaler around an optimizer with momentum", *MOVED)
def scaled() -> Scene:
    scene = careless(partial(SGD, lr=0.05, momentum=0.9))
    add_scaler(scene)
    return scene


def add_scaler(scene: Scene, factor: float = 1.0, init_scale: float = 8.0) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)

    def backward(_: int) -> None:
        scaler.scale(distance(scene.model(X)) * factor).backward()

    def update(_: int) -> None:
        scaler.step(scene.optimizers[0])
        scaler.update()

    scene.backward, scene.update = backward, update


@hazard("optimizer", "the trunk enters by add_param_group", ("in_optimizer", TRUNK))
def added_group() -> Scene:
    scene = plain(uneven())
    scene.after = at(4, lambda: scene.optimizers[0].add_param_group({"params": list(scene.model.trunk.parameters())}))
    return scene


# --- faults: written elsewhere


def replaced_data(weight: nn.Parameter) -> None:
    weight.data = weight.data + 1


def negative_zero(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[0, 0] = -0.0


def not_a_number(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[0, 0] = torch.nan


@torch.no_grad()
def permuted(weight: nn.Parameter) -> None:
    weight.copy_(weight.flip(0))


@torch.no_grad()
def averaged(weight: nn.Parameter) -> None:
    weight.copy_(0.9 * weight + 0.1 * torch.ones_like(weight))


@torch.no_grad()
def decayed(weight: nn.Parameter) -> None:
    weight.mul_(1 - 0.05 * 0.1)


def there_and_back(weight: nn.Parameter, kind: torch.dtype) -> None:
    weight.data = weight.data.to(kind).to(torch.float32)


def in_inference_mode(weight: nn.Parameter) -> None:
    with torch.inference_mode():
        weight.mul_(2)


def swapped(weight: nn.Parameter) -> None:
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() + 1, requires_grad=False))


@torch.no_grad()
def set_elsewhere(weight: nn.Parameter) -> None:
    weight.set_(torch.ones(2, 2))


def transposed(weight: nn.Parameter) -> None:
    weight.data = weight.data.t()


def over_the_same_bytes(weight: nn.Parameter) -> None:
    torch.frombuffer(weight.detach().numpy(), dtype=torch.float32).add_(1)


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    ".data written in place": lambda weight: weight.data.add_(1),
    ".data replaced": replaced_data,
    "numpy alias": write_numpy_alias,
    "a second tensor over the same bytes": over_the_same_bytes,
    "re-initialised": lambda weight: nn.init.xavier_uniform_(weight),
    "half and back": partial(there_and_back, kind=torch.float16),
    "bfloat16 and back": partial(there_and_back, kind=torch.bfloat16),
    "permuted": permuted,
    "not-a-number": not_a_number,
    "one bit": write_smallest_bit,
    "an average copied in": averaged,
    "weight decay by hand": decayed,
    "in inference mode": in_inference_mode,
    "clamped through .data": lambda weight: weight.data.clamp_(-0.5, 0.5),
    "foreach": lambda weight: torch._foreach_mul_([weight.data], 0.5),
    "swap_tensors": swapped,
    "noise by vector_to_parameters": lambda weight: vector_to_parameters(weight.detach().flatten() + 0.1, [weight]),
    "set_ to another storage": set_elsewhere,
    "its transpose, over the same bytes": transposed,
}


def written(write: Callable[[nn.Parameter], object]) -> Scene:
    model = uneven()
    return plain(model, after=at(4, lambda: write(model.trunk.weight)))


for _name, _write in WRITES.items():
    fault("write", _name, ("param_changed", TRUNK))(partial(written, _write))


@fault("write", "the sign of a zero", ("param_changed", TRUNK))
def sign_of_zero() -> Scene:
    model = uneven()
    with torch.no_grad():
        model.trunk.weight[0, 0] = 0.0
    return plain(model, after=at(4, lambda: negative_zero(model.trunk.weight)))


@fault("write", "module.half() and .float()", ("param_changed", TRUNK))
def module_there_and_back() -> Scene:
    model = uneven()
    return plain(model, after=at(4, lambda: model.half().float()))


@fault("write", "load_state_dict", ("param_changed", TRUNK))
def loaded() -> Scene:
    model = uneven()
    other = copy.deepcopy(Tiny().state_dict())
    return plain(model, after=at(4, lambda: model.load_state_dict(other)))


@fault("write", "load_state_dict(assign=True)", ("identity_changed", TRUNK), *each("not_in_optimizer", HEAD))
def loaded_by_assigning() -> Scene:
    model = uneven()
    other = copy.deepcopy(Tiny().state_dict())
    return plain(model, after=at(4, lambda: model.load_state_dict(other, assign=True)))


@fault("write", "the forward renormalises an embedding (max_norm)", ("param_changed", TRUNK))
def renormalised() -> Scene:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Embedding(5, 2, max_norm=0.5)
            self.head = nn.Linear(2, 1)
            freeze_by_hand(self.trunk)

    model = Words()
    return plain(model, loss=lambda _: distance(model.head(model.trunk(torch.arange(3)))))


@fault("write", "a LoRA is merged into its base in mid-phase", ("param_changed", TRUNK))
def merged() -> Scene:
    model = LowRank()
    return plain(model, after=at(6, lambda: model.trunk.weight.data.add_(model.up @ model.down)))


class LowRank(nn.Module):
    """A frozen trunk with a trainable low-rank part that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(2, 2)
        self.down = nn.Parameter(torch.randn(1, 2))
        self.up = nn.Parameter(torch.zeros(2, 1))
        freeze_by_hand(self.trunk)

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) + x @ self.down.T @ self.up.T


# --- faults: buffers and attributes

NORM = "trunk.1"
STATISTICS = [f"{NORM}.running_mean", f"{NORM}.running_var", f"{NORM}.num_batches_tracked"]


def normed() -> Normed:
    model = Normed()
    freeze_by_hand(model.trunk)
    return model


@fault("buffer", "BatchNorm in train mode", *each("buffer_changed", STATISTICS))
def norm_in_train_mode() -> Scene:
    model = normed()
    model.train()
    return plain(model)


@fault("buffer", "BatchNorm with cumulative statistics", *each("buffer_changed", STATISTICS))
def cumulative() -> Scene:
    model = normed()
    model.trunk[1].momentum = None
    return plain(model, before=at(5, model.train))


@fault("buffer", "a validation ends with model.train()", *each("buffer_changed", STATISTICS))
def careless_validation() -> Scene:
    model = normed()

    def validate() -> None:
        model.eval()
        with torch.no_grad():
            model(X)
        model.train()

    return plain(model, after=at(5, validate))


@fault("buffer", "statistics reset", *each("buffer_changed", STATISTICS[:1]))
def reset_statistics() -> Scene:
    model = normed()
    model.trunk[1].running_mean.fill_(0.25)
    return plain(model, after=at(5, model.trunk[1].reset_running_stats))


@fault("buffer", "train mode for one forward, unseen by every look", *each("buffer_changed", STATISTICS))
def for_one_forward() -> Scene:
    model = normed()

    def probe() -> None:
        model.train()
        model(X)
        model.trunk.eval()

    return plain(model, before=at(5, probe))


def with_buffer(persistent: bool, change: Callable[[nn.Module], object]) -> Scene:
    model = uneven()
    model.trunk.register_buffer("scale", torch.tensor([0.1, 0.2]), persistent=persistent)
    return plain(model, after=at(4, lambda: change(model.trunk)))


def assign_buffer(module: Any) -> None:
    module.scale = module.scale * 0.9


def lerp_buffer(module: Any) -> None:
    module.scale.lerp_(torch.ones(2), 0.1)


fault("buffer", "written, persistent", ("buffer_changed", "trunk.scale"))(partial(with_buffer, True, lerp_buffer))
fault("buffer", "written, not persistent", ("buffer_changed", "trunk.scale"))(partial(with_buffer, False, lerp_buffer))
fault("buffer", "replaced", ("identity_changed", "trunk.scale"))(partial(with_buffer, True, assign_buffer))


@fault("buffer", "a plain tensor attribute", ("attr_changed", "trunk.scale"))
def attribute() -> Scene:
    model = uneven()
    model.trunk.scale = torch.ones(2)
    return plain(model, after=at(4, lambda: model.trunk.scale.mul_(3)))


@fault(
    "buffer",
    "spectral norm iterates in train mode",
    *each("buffer_changed", [f"trunk.parametrizations.weight.0.{key}" for key in ("_u", "_v")]),
)
def spectral() -> Scene:
    model = Wide()
    parametrizations.spectral_norm(model.trunk, n_power_iterations=1)
    freeze_by_hand(model.trunk)
    return plain(model, before=lambda _: model.train())


class Wide(nn.Module):
    """trunk and head with eight features between them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(2, 8)
        self.head = nn.Linear(8, 1)
        freeze_by_hand(self.trunk)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


# --- faults: gradients and flags

NEVER_FROZEN = [("requires_grad", TRUNK), ("grad_present", TRUNK), ("in_optimizer", TRUNK), ("param_changed", TRUNK)]


def not_frozen(attempt: Callable[[nn.Linear], object]) -> Scene:
    """A freeze that does nothing, and an optimizer of what requires a gradient."""
    model = uneven()
    model.trunk.requires_grad_(True)
    attempt(model.trunk)
    return plain(model)


def set_flag_of_parameters(module: nn.Module, flag: str) -> None:
    for parameter in module.parameters():
        setattr(parameter, flag, False)


ATTEMPTS: dict[str, Callable[[nn.Linear], object]] = {
    "requires_grad never switched off": bool,
    "module.requires_grad = False": lambda module: setattr(module, "requires_grad", False),
    "typo: require_grad": partial(set_flag_of_parameters, flag="require_grad"),
    "typo: requre_grad": partial(set_flag_of_parameters, flag="requre_grad"),
    "only put into eval mode": lambda module: module.eval(),
}
for _name, _attempt in ATTEMPTS.items():
    fault("flag", _name, *NEVER_FROZEN)(partial(not_frozen, _attempt))


@fault("flag", "switched on again by model.requires_grad_()", ("requires_grad", TRUNK), ("grad_present", TRUNK))
def on_again() -> Scene:
    model = uneven()
    return plain(model, before=at(5, model.requires_grad_))


@hazard("flag", "under no_grad only", ("requires_grad", TRUNK), ("in_optimizer", TRUNK))
def under_no_grad() -> Scene:
    model = uneven()
    model.trunk.requires_grad_(True)

    def loss(_: int) -> Tensor:
        with torch.no_grad():
            features = model.trunk(X)
        return distance(model.head(features))

    return plain(model, loss=loss)


@fault("flag", "a gradient left over, in no optimizer", ("grad_present", TRUNK))
def left_over() -> Scene:
    model = uneven()
    model.trunk.weight.grad = torch.ones(2, 2)
    return plain(model)


class Layers(nn.Module):
    """Layers whose names contain each other."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def freeze_by_substring(model: nn.Module, text: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if text in name:
            parameter.requires_grad_(False)
    return model


@fault("flag", "a substring that catches too much", *each("never_trained", ["layer10.weight", "layer10.bias"]))
def too_much() -> Scene:
    return plain(freeze_by_substring(Layers(["layer1", "layer2", "layer10"]), "layer1"), freeze=("layer1",))


@fault(
    "flag",
    "a substring that misses",
    *each("requires_grad", ["stem.weight", "stem.bias"]),
    *each("param_changed", ["stem.weight", "stem.bias"]),
)
def too_little() -> Scene:
    return plain(freeze_by_substring(Layers(["stem", "layer1", "head"]), "layer"), freeze=("stem", "layer1"))


@fault("flag", "the bias forgotten", ("requires_grad", "trunk.bias"), ("param_changed", "trunk.bias"))
def forgotten_bias() -> Scene:
    model = Wide()
    assert model.trunk.bias is not None
    model.trunk.bias.requires_grad_(True)
    return plain(model)


# --- faults: structure


@fault("structure", "a tied weight, one name frozen", ("shared_storage", TRUNK))
def tied() -> Scene:
    model = uneven()
    model.other = nn.Linear(2, 2, bias=False)
    model.other.weight = model.trunk.weight
    return plain(model)


@fault("structure", "a view into the head's flat tensor", ("shared_storage", TRUNK), ("param_changed", TRUNK))
def viewed() -> Scene:
    model = uneven()
    flat = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    model.trunk.weight = nn.Parameter(flat[:4].view(2, 2), requires_grad=False)
    model.head.weight = nn.Parameter(flat[3:5].view(1, 2))
    return plain(model)


def hidden(container: Callable[[nn.Module], Any]) -> Scene:
    model = uneven()
    expert = nn.Linear(2, 2)
    model.trunk.experts = container(expert)
    return plain(model, loss=lambda _: distance(model.head(expert(model.trunk(X)))))


fault("structure", "a frozen module in a list", *each("requires_grad", ["trunk.experts.0.weight"]))(
    partial(hidden, lambda module: [module])
)
fault("structure", "a frozen module in a dictionary", *each("requires_grad", ["trunk.experts.x.weight"]))(
    partial(hidden, lambda module: {"x": module})
)


def swap_module(model: Any) -> None:
    model.trunk = nn.Linear(2, 2, bias=False).requires_grad_(False)


def add_module(model: Any) -> None:
    model.trunk.adapter = nn.Linear(2, 2, bias=False)


def register_again(model: Any) -> None:
    model.trunk.weight = nn.Parameter(model.trunk.weight.detach().clone(), requires_grad=False)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "a swapped module": (swap_module, TRUNK),
    "a module added": (add_module, "trunk.adapter.weight"),
    "registered again": (register_again, TRUNK),
    "a parametrization after the freeze": (
        lambda model: parametrize.register_parametrization(model.trunk, "weight", Doubled()),
        TRUNK,
    ),
    "pruned after the freeze": (lambda model: prune.l1_unstructured(model.trunk, "weight", amount=1), TRUNK),
    "weight norm after the freeze": (lambda model: parametrizations.weight_norm(model.trunk), TRUNK),
}


def changed(change: Callable[[Any], object]) -> Scene:
    model = uneven()
    return plain(model, after=at(4, lambda: change(model)))


for _name, (_change, _tensor) in CHANGES.items():
    fault("structure", _name, ("identity_changed", _tensor))(partial(changed, _change))


@fault("structure", "inside DataParallel", ("param_changed", TRUNK))
def parallel() -> Scene:
    model = uneven()
    return plain(nn.DataParallel(model), after=at(4, lambda: write_numpy_alias(model.trunk.weight)))


@fault("structure", "inside torch.compile", *NEVER_FROZEN)
def compiled_and_not_frozen() -> Scene:
    model = uneven()
    model.trunk.requires_grad_(True)
    return plain(compiled(model))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


class Uncertain(nn.Module):
    """A loss that learns its own scale."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))

    def forward(self, output: Tensor) -> Tensor:
        return distance(output) * torch.exp(-self.log_variance) + self.log_variance


@fault("structure", "a loss that learns, in no optimizer", ("not_in_optimizer", "loss.log_variance"))
def forgotten_loss() -> Scene:
    model, criterion = uneven(), Uncertain()
    return plain(model, loss=lambda _: criterion(model(X)), also={"loss": criterion})


@fault("structure", "an average that drifts by rounding", ("param_changed", "ema.trunk.weight"))
def drifting() -> Scene:
    model = uneven()
    average = copy.deepcopy(model)

    @torch.no_grad()
    def update(_: int) -> None:
        for mean, now in zip(average.parameters(), model.parameters(), strict=True):
            mean.copy_(0.9 * mean + 0.1 * now)

    return plain(model, after=update, ema=average)


class Rows(nn.Module):
    """A head with four rows, of which the first two are to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def mask_rows(gradient: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(gradient[:2]), gradient[2:]])


def with_rows(decay: float) -> Scene:
    model = Rows()
    model.head.weight.register_hook(mask_rows)
    return Scene(model, [AdamW(model.parameters(), lr=0.05, weight_decay=decay)], freeze=("head.weight[0:2]",))


fault("structure", "frozen rows moved by decay", ("param_changed", "head.weight[0:2]"))(partial(with_rows, 0.1))


# --- faults: what was meant to train does not


def two_heads(loss_b: Callable[[TwoHeads, int], Tensor | float], **rest: Any) -> Scene:
    model = TwoHeads()
    return plain(model, loss=lambda step: distance(model.task("a", X)) + loss_b(model, step), **rest)


def under_no_grad_b(model: TwoHeads, _: int) -> Tensor:
    with torch.no_grad():
        return distance(model.task("b", X))


NO_SIGNAL: dict[str, Callable[[TwoHeads, int], Tensor | float]] = {
    "a detached head": lambda model, _: distance(model.task("b", X).detach()),
    "a head that is not called": lambda *_: 0.0,
    "a head under no_grad": under_no_grad_b,
    "a loss by .item()": lambda model, _: distance(model.task("b", X)).item(),
    "a loss times 0": lambda model, _: 0 * distance(model.task("b", X)),
    "a dead ReLU": lambda model, _: distance(torch.relu(model.task("b", X) - 1e6)),
    "rounded outputs": lambda model, _: distance(model.task("b", X).round()),
}
for _name, _loss in NO_SIGNAL.items():
    fault("liveness", _name, *each("never_received_grad", HEAD_B))(partial(two_heads, _loss))


@fault("liveness", "a hook that zeroes the gradient", ("never_received_grad", "head.weight"))
def zeroing_hook() -> Scene:
    model = uneven()
    model.head.weight.register_hook(torch.zeros_like)
    return plain(model)


@fault("liveness", "in no optimizer", *each("not_in_optimizer", HEAD_B))
def in_no_optimizer() -> Scene:
    model = TwoHeads()
    return Scene(model, [SGD(model.heads["a"].parameters(), lr=0.05)])


@fault("liveness", "the optimizer holds a copy of the model", *each("not_in_optimizer", HEAD))
def of_a_copy() -> Scene:
    model = uneven()
    return Scene(model, [SGD(trainable(copy.deepcopy(model)), lr=0.05)], clear=lambda _: model.zero_grad())


@fault("liveness", "a group with the rate 0", *each("never_trained", HEAD_B))
def rate_of_zero() -> Scene:
    model = TwoHeads()
    groups = [{"params": list(model.heads[key].parameters()), "lr": rate} for key, rate in (("a", 0.05), ("b", 0.0))]
    return Scene(model, [SGD(groups, lr=0.05)])


@fault("liveness", "a schedule that is 0 from the start", *each("never_trained", HEAD))
def schedule_of_zero() -> Scene:
    scene = plain(uneven())
    schedule = LambdaLR(scene.optimizers[0], lambda step: step // 1000)
    scene.after = lambda _: schedule.step()
    return scene


@fault("liveness", "one of two optimizers is never stepped", *each("never_trained", HEAD_B))
def never_stepped() -> Scene:
    model = TwoHeads()
    optimizers = [SGD(head.parameters(), lr=0.05) for head in model.heads.values()]
    return Scene(model, optimizers, update=lambda _: optimizers[0].step())


@fault("liveness", "zero_grad between backward and step", *each("never_trained", HEAD))
def cleared_too_early() -> Scene:
    scene = plain(uneven())

    def update(_: int) -> None:
        scene.optimizers[0].zero_grad()
        scene.optimizers[0].step()

    scene.update = update
    return scene


@fault("liveness", "zero_grad before anybody looks", *each("never_received_grad", HEAD))
def cleared_at_once() -> Scene:
    scene = plain(uneven())

    def backward(_: int) -> None:
        distance(scene.model(X)).backward()
        scene.optimizers[0].zero_grad()

    scene.backward = backward
    return scene


@fault("liveness", "in two optimizers", *each("in_several_groups", HEAD))
def in_two_optimizers() -> Scene:
    model = uneven()
    return Scene(model, [SGD(trainable(model), lr=0.05), AdamW(trainable(model), lr=0.05)])


@fault("liveness", "a head in a Python list", *each("not_in_optimizer", ["heads.0.weight", "heads.0.bias"]))
def listed_head() -> Scene:
    model = uneven()
    model.heads = [nn.Linear(2, 1)]
    return plain(model, loss=lambda _: distance(model(X) + model.heads[0](X)))


@fault("liveness", "a plain tensor instead of a parameter", ("not_in_optimizer", "scale"))
def plain_tensor() -> Scene:
    model = uneven()
    model.scale = torch.ones(1, requires_grad=True)
    return plain(model, loss=lambda _: distance(model(X) * model.scale))


@fault("liveness", "the flag left off in the second phase", ("never_trained", TRUNK))
def flag_left_off() -> Scene:
    return plain(uneven(), phases=[Phase(), Phase(freeze=())])


@fault("liveness", "the optimizer not rebuilt in the second phase", ("not_in_optimizer", TRUNK))
def not_rebuilt() -> Scene:
    model = uneven()
    return plain(model, phases=[Phase(), Phase(model.trunk.requires_grad_, ())])


@fault("liveness", "updates below the precision of bfloat16", *each("never_trained", HEAD))
def below_precision() -> Scene:
    model = Tiny().bfloat16()
    loss = lambda _: distance(model(X.bfloat16()))  # noqa: E731
    return Scene(model, [SGD(trainable(model), lr=1e-6)], loss=loss, num_steps=60)


@fault("liveness", "every step skipped by the grad scaler", *each("never_trained", HEAD))
def all_skipped() -> Scene:
    scene = plain(uneven())
    add_scaler(scene, factor=float("inf"))
    return scene


@fault("liveness", "clipped to a norm of 0", *each("never_trained", HEAD))
def clipped_to_zero() -> Scene:
    scene = plain(uneven(), num_steps=60)

    def update(_: int) -> None:
        clip_grad_norm_(trainable(scene.model), 0.0)
        scene.optimizers[0].step()

    scene.update = update
    return scene


@fault("liveness", "written back after every step", *each("never_trained", HEAD))
def written_back() -> Scene:
    model = uneven()
    first = copy.deepcopy(model.state_dict())
    return plain(model, after=lambda _: model.load_state_dict(first), num_steps=60)


@fault("liveness", "the head swapped after the optimizer was built", *each("not_in_optimizer", HEAD))
def swapped_head() -> Scene:
    scene = plain(uneven())
    scene.model.head = nn.Linear(2, 1)
    return scene


# --- faults: some more of every family


@fault(
    "structure",
    "a plain tensor in a list",
    ("attr_changed", "trunk.scales.0"),
)
def listed_tensor() -> Scene:
    model = uneven()
    model.trunk.scales = [torch.ones(2)]
    return plain(model, after=at(4, lambda: model.trunk.scales[0].mul_(3)))


@fault(
    "structure",
    "a frozen parameter in a list",
    ("param_changed", "trunk.scales.0"),
)
def listed_frozen_parameter() -> Scene:
    model = uneven()
    scales = model.trunk.scales = [nn.Parameter(torch.ones(1))]
    optimizer = SGD([*model.head.parameters(), *scales], lr=0.05)
    return Scene(model, [optimizer], loss=lambda _: distance(model(X) * scales[0]))


@fault(
    "liveness",
    "a parameter in a Python list",
    ("not_in_optimizer", "scales.0"),
)
def listed_parameter() -> Scene:
    model = uneven()
    scales = model.scales = [nn.Parameter(torch.ones(1))]
    return plain(model, loss=lambda _: distance(model(X) * scales[0]))


@fault("structure", "tied with the loss", ("shared_storage", TRUNK))
def tied_with_the_loss() -> Scene:
    model, criterion = uneven(), nn.Module()
    criterion.center = model.trunk.weight
    return plain(model, also={"loss": criterion})


@fault("structure", "frozen in the loss, and stepped", ("param_changed", "loss.log_variance"))
def frozen_in_the_loss() -> Scene:
    model, criterion = uneven(), Uncertain()
    optimizer = SGD([*trainable(model), *criterion.parameters()], lr=0.05)
    loss = lambda _: criterion(model(X))  # noqa: E731
    return Scene(model, [optimizer], freeze=("trunk", "loss"), also={"loss": criterion}, loss=loss)


@fault("structure", "frozen rows moved by momentum", ("param_changed", "head.weight[0:2]"))
def rows_with_momentum() -> Scene:
    model = Rows()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    distance(model(X)).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.head.weight.register_hook(mask_rows)
    return Scene(model, [optimizer], freeze=("head.weight[0:2]",))


@fault("buffer", "InstanceNorm with statistics in train mode", ("buffer_changed", "trunk.running_mean"))
def instance_norm() -> Scene:
    model = nn.Sequential()
    model.trunk = nn.InstanceNorm1d(1, affine=True, track_running_stats=True)
    model.head = nn.Linear(2, 1)
    model.trunk.requires_grad_(False)
    return plain(model, loss=lambda _: distance(model(X[:, None])))


@fault("write", "another type at the last step", ("param_changed", TRUNK))
def another_type() -> Scene:
    model = uneven()
    return plain(model, after=at(10, model.trunk.double))


@fault("flag", "on during the backward only, and stepped by hand", ("param_changed", TRUNK))
def on_during_backward() -> Scene:
    model = uneven()

    def backward(_: int) -> None:
        model.trunk.requires_grad_(True)
        distance(model(X)).backward()
        assert model.trunk.weight.grad is not None
        model.trunk.weight.data.add_(model.trunk.weight.grad, alpha=-0.01)
        model.trunk.weight.grad = None
        model.trunk.requires_grad_(False)

    return plain(model, backward=backward)


@fault("optimizer", "a rate of 0 instead of a freeze", ("in_optimizer", TRUNK), ("requires_grad", TRUNK))
def rate_instead_of_freeze() -> Scene:
    model = uneven()
    model.trunk.requires_grad_(True)
    groups = [{"params": model.trunk.parameters(), "lr": 0.0}, {"params": model.head.parameters()}]
    return Scene(model, [SGD(groups, lr=0.05)])


@fault("liveness", "the head swapped in mid-phase", *each("not_in_optimizer", HEAD))
def swapped_in_mid_phase() -> Scene:
    model = uneven()
    return plain(model, after=at(4, lambda: setattr(model, "head", nn.Linear(2, 1))))


@fault("liveness", "the loop runs a copy of the model", *each("never_received_grad", HEAD))
def runs_a_copy() -> Scene:
    model = uneven()
    other = copy.deepcopy(model)
    return plain(model, loss=lambda _: distance(other(X)))


def stopped(stop: Callable[[nn.Module], object], **rest: Any) -> Scene:
    model = uneven()
    return plain(model, num_steps=80, after=at(12, lambda: stop(model)), **rest)


@fault("liveness", "requires_grad is switched off in mid-phase", ("stopped_training", "head.bias"))
def switched_off() -> Scene:
    return stopped(lambda model: model.head.bias.requires_grad_(False))


@fault("liveness", "requires_grad is switched off, gradients are zeroed", ("stopped_training", "head.bias"))
def switched_off_and_zeroed() -> Scene:
    scene = stopped(lambda model: model.head.bias.requires_grad_(False))
    return replace(scene, clear=lambda _: scene.optimizers[0].zero_grad(set_to_none=False))


@fault(
    "liveness", "a head is left out from some step on", *each("stopped_training", ("heads.b.weight", "heads.b.bias"))
)
def left_out_later() -> Scene:
    model = TwoHeads()
    tasks = ("a", "b")
    loss = lambda step: sum(distance(model.task(name, X)) for name in (tasks if step < 12 else tasks[:1]))  # noqa: E731
    return Scene(model, [SGD(model.heads.parameters(), lr=0.05)], num_steps=80, loss=loss)


@fault("liveness", "a head's weight is a new parameter", ("not_in_optimizer", "head.weight"))
def new_head_weight() -> Scene:
    model = uneven()
    return plain(model, after=at(4, lambda: setattr(model.head, "weight", nn.Parameter(torch.ones(1, 2)))))


@fault(
    "liveness",
    "attach(): the first of two optimizers is never stepped",
    *each("never_trained", ("heads.a.weight", "heads.a.bias")),
)
def first_never_stepped() -> Scene:
    model = TwoHeads()
    optimizers = [SGD(head.parameters(), lr=0.05) for head in model.heads.values()]
    return Scene(model, optimizers, update=lambda _: optimizers[1].step(), attach=True)


@fault(
    "liveness",
    "attach(): no optimizer is ever stepped",
    *each("never_trained", HEAD),
)
def attached_and_never_stepped() -> Scene:
    return plain(uneven(), update=nothing, attach=True)


@fault("structure", "two weights over one numpy array", ("shared_storage", TRUNK), ("param_changed", TRUNK))
def one_array() -> Scene:
    model = uneven()
    array = torch.full((4,), 0.1).numpy()
    model.trunk.weight = nn.Parameter(torch.from_numpy(array).view(2, 2), requires_grad=False)
    model.head.weight = nn.Parameter(torch.from_numpy(array[:2]).view(1, 2))
    return plain(model)


@fault("structure", "the trunk of an average is swapped", ("identity_changed", "ema.trunk.weight"))
def swapped_average() -> Scene:
    model = uneven()
    average = copy.deepcopy(model)
    return plain(model, ema=average, after=at(4, lambda: swap_module(average)))


@fault("structure", "frozen rows without a mask", ("param_changed", "head.weight[0:2]"))
def unmasked_rows() -> Scene:
    model = Rows()
    return Scene(model, [SGD(model.parameters(), lr=0.05)], freeze=("head.weight[0:2]",))


@fault("write", "another kind of not-a-number", ("param_changed", TRUNK))
def another_nan() -> Scene:
    model = uneven()
    not_a_number(model.trunk.weight)
    flip = partial(write_smallest_bit, model.trunk.weight)
    return plain(model, loss=lambda _: distance(model.head(X)), after=at(4, flip))


@fault("liveness", "the optimizer is emptied in mid-phase", *each("not_in_optimizer", HEAD))
def emptied() -> Scene:
    scene = plain(uneven())
    scene.before = at(5, scene.optimizers[0].param_groups[0]["params"].clear)
    return scene


# --- correct loops

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD, momentum and decay": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": partial(AdamW, lr=0.01),
    "AdamW, fused": partial(AdamW, lr=0.01, fused=True),
    "AdamW, foreach": partial(AdamW, lr=0.01, foreach=True),
    "AdamW, a tensor as rate": partial(AdamW, lr=torch.tensor(0.01), foreach=False),
}


def with_optimizer(make: Callable[..., Any]) -> Scene:
    model = uneven()
    return Scene(model, [make(trainable(model))])


for _name, _make in OPTIMIZERS.items():
    correct("optimizer", _name)(partial(with_optimizer, _make))
correct("optimizer", "LBFGS with a closure")(partial(careless_lbfgs, frozen_first=True))


@correct("optimizer", "two optimizers")
def two_optimizers() -> Scene:
    model = TwoHeads()
    return Scene(model, [make(model.heads[key].parameters(), lr=0.05) for make, key in ((SGD, "a"), (AdamW, "b"))])


@correct("optimizer", "two optimizers in turn, as in a GAN")
def in_turn() -> Scene:
    model = TwoHeads()
    optimizers = [SGD(head.parameters(), lr=0.05) for head in model.heads.values()]
    return Scene(model, optimizers, update=lambda step: optimizers[step % 2].step())


@correct("optimizer", "steps inside the backward, trainable only")
def stepped_in_backward_correctly() -> Scene:
    model = uneven()
    return in_backward(model, trainable(model))


@correct("optimizer", "schedule-free over what is trained", needs="schedulefree")
def schedule_free_correct() -> Scene:
    import schedulefree

    model = uneven()
    optimizer = schedulefree.AdamWScheduleFree(trainable(model), lr=0.05)
    optimizer.train()

    def validate(step: int) -> None:
        if step % 4 == 0:
            optimizer.eval()
            model(X)
            optimizer.train()

    return Scene(model, [optimizer], after=validate)


@correct("optimizer", "sharpness-aware: up, and back")
def sharpness_aware() -> Scene:
    scene = plain(uneven())
    model, optimizer = scene.model, scene.optimizers[0]

    def update(_: int) -> None:
        steps = [0.05 * p.grad for p in trainable(model) if p.grad is not None]
        for sign in (1, -1):
            with torch.no_grad():
                torch._foreach_add_(trainable(model), steps, alpha=sign)
            if sign > 0:
                optimizer.zero_grad()
                distance(model(X)).backward()
        optimizer.step()

    scene.update = update
    return scene


@correct("optimizer", "attach()")
def attached() -> Scene:
    return plain(uneven(), attach=True)


@correct("optimizer", "gradients accumulated over two steps")
def accumulated() -> Scene:
    scene = plain(uneven())
    optimizer = scene.optimizers[0]
    scene.update = lambda step: optimizer.step() if step % 2 == 0 else None
    scene.clear = lambda step: optimizer.zero_grad() if step % 2 == 0 else None
    return scene


@correct("optimizer", "clipping")
def clipping() -> Scene:
    scene = plain(uneven())

    def update(_: int) -> None:
        clip_grad_norm_(scene.model.parameters(), 0.1)
        scene.optimizers[0].step()

    scene.update = update
    return scene


@correct("optimizer", "sparse gradients of an embedding")
def sparse() -> Scene:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 2, sparse=True)
            self.trunk = nn.Linear(2, 1)
            freeze_by_hand(self.trunk)

    model = Words()
    optimizer = SparseAdam(list(model.words.parameters()), lr=0.05)
    return Scene(model, [optimizer], loss=lambda _: distance(model.trunk(model.words(torch.arange(3)))))


@correct("optimizer", "GradScaler")
def with_scaler() -> Scene:
    scene = plain(uneven())
    add_scaler(scene)
    return scene


@correct("optimizer", "autocast to bfloat16")
def autocast() -> Scene:
    model = uneven()

    def loss(_: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return distance(model(X).float())

    return plain(model, loss=loss)


def scheduled(make: Callable[[Any], Any]) -> Scene:
    scene = plain(uneven())
    schedule = make(scene.optimizers[0])
    scene.after = lambda _: schedule.step()
    return scene


correct("schedule", "warm-up from 0")(partial(scheduled, lambda o: LambdaLR(o, lambda step: min(step / 5, 1))))
correct("schedule", "LambdaLR down to 0")(partial(scheduled, lambda o: LambdaLR(o, lambda step: max(1 - step / 5, 0))))
correct("schedule", "one cycle")(partial(scheduled, lambda o: OneCycleLR(o, 0.1, total_steps=11)))


def drawn(num_steps: int) -> Scene:
    """A random task of two at every step."""
    model = TwoHeads()
    draw = torch.Generator().manual_seed(num_steps)

    def loss(_: int) -> Tensor:
        return distance(model.task("ab"[int(torch.randint(2, (), generator=draw))], X))

    return plain(model, loss=loss, num_steps=num_steps)


correct("tasks", "a random task, 12 steps")(partial(drawn, 12))
correct("tasks", "a random task, 60 steps")(partial(drawn, 60))


@correct("tasks", "tasks in turn")
def round_robin() -> Scene:
    model = TwoHeads()
    return plain(model, loss=lambda step: distance(model.task("ab"[step % 2], X)))


@correct("tasks", "one task comes only after a third of the phase")
def late_task() -> Scene:
    model = TwoHeads()
    return plain(model, loss=lambda step: distance(model.task("ab"[step > 4], X)))


@correct("tasks", "a loss that learns its weight")
def learned_loss() -> Scene:
    model, criterion = uneven(), Uncertain()
    optimizer = SGD([*trainable(model), *criterion.parameters()], lr=0.05)
    return Scene(model, [optimizer], loss=lambda _: criterion(model(X)), also={"loss": criterion})


@correct("tasks", "a frozen teacher next to the model")
def teacher() -> Scene:
    model = uneven()
    model.teacher = [Tiny()]
    freeze_by_hand(model.teacher[0])
    return plain(model, loss=lambda _: (model(X) - model.teacher[0](X) - 1).square().mean())


@correct("norm", "dropout and BatchNorm held in eval")
def held_in_eval() -> Scene:
    return plain(normed())


@correct("norm", "a validation in the middle")
def careful_validation() -> Scene:
    model = normed()

    def validate() -> None:
        model.eval()
        with torch.no_grad():
            model(X)
        model.train()
        model.trunk.eval()

    return plain(model, after=at(5, validate))


@correct("norm", "a frozen head over a trunk that trains")
def frozen_head() -> Scene:
    model = Normed()
    freeze_by_hand(model.head)
    return plain(model, freeze=("head",))


@correct("norm", "a bias in front of BatchNorm")
def bias_before_norm() -> Scene:
    model = nn.Sequential()
    model.trunk = nn.Linear(2, 4)
    model.linear = nn.Linear(4, 4)
    model.norm = nn.BatchNorm1d(4)
    model.head = nn.Linear(4, 1)
    freeze_by_hand(model.trunk)
    return plain(model)


@correct("norm", "FrozenBatchNorm2d")
def frozen_norm() -> Scene:
    from torchvision.ops import FrozenBatchNorm2d

    model = nn.Sequential()
    model.conv = nn.Conv2d(1, 2, 1)
    model.trunk = FrozenBatchNorm2d(2)
    return plain(model, loss=lambda _: distance(model(X.view(3, 1, 2, 1))))


@correct("norm", "a frozen module of nothing but a buffer")
def only_a_buffer() -> Scene:
    model = uneven()
    model.scale = nn.Module()
    model.scale.register_buffer("value", torch.ones(1))
    return plain(model, freeze=("trunk", "scale"), loss=lambda _: distance(model(X) * model.scale.value))


@correct("structure", "tied weights, both names frozen")
def tied_and_frozen() -> Scene:
    model = uneven()
    model.other = nn.Linear(2, 2, bias=False)
    model.other.weight = model.trunk.weight
    return plain(model, freeze=("trunk", "other"))


@correct("structure", "tied weights that train")
def tied_and_training() -> Scene:
    model = Layers(["trunk", "first", "second"])
    freeze_by_hand(model.trunk)
    model.second.weight = model.first.weight
    return plain(model)


@correct("structure", "a low-rank part that begins at zero")
def low_rank() -> Scene:
    return plain(LowRank())


@correct("structure", "weight norm before the freeze")
def parametrized() -> Scene:
    model = Wide()
    parametrizations.weight_norm(model.trunk)
    freeze_by_hand(model.trunk)
    return plain(model)


@correct("structure", "pruned before the freeze")
def pruned() -> Scene:
    model = Wide()
    prune.l1_unstructured(model.trunk, "weight", amount=3)
    freeze_by_hand(model.trunk)
    return plain(model)


correct("structure", "rows after a gradient mask")(partial(with_rows, 0.0))


@correct("structure", "DataParallel")
def parallel_correct() -> Scene:
    return plain(nn.DataParallel(uneven()))


@correct("structure", "torch.compile")
def compiled_correct() -> Scene:
    return plain(compiled(uneven()))


@correct("structure", "gradient checkpointing")
def checkpointed() -> Scene:
    model = Layers(["trunk", "middle", "head"])
    freeze_by_hand(model.trunk)

    def loss(_: int) -> Tensor:
        return distance(checkpoint(model, X, use_reentrant=False))

    return plain(model, loss=loss)


@correct("structure", "not-a-number in a frozen weight from the start")
def nan_from_the_start() -> Scene:
    model = Wide()
    model.unused = nn.Linear(2, 2).requires_grad_(False)
    nn.init.constant_(model.unused.weight, torch.nan)
    return plain(model, freeze=("trunk", "unused"))


@correct("structure", "an average by lerp")
def averaged_by_lerp() -> Scene:
    model = uneven()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    return plain(model, after=lambda _: average.update_parameters(model), ema=average)


@correct("structure", "weights of the average swapped in for a validation, and back")
def swapped_for_validation() -> Scene:
    model = uneven()
    average = copy.deepcopy(model)

    def swap() -> None:
        with torch.no_grad():
            for one, other in zip(model.parameters(), average.parameters(), strict=True):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)

    return plain(model, after=lambda step: (swap(), model(X), swap()) if step == 5 else None)


@correct("structure", "its own state loaded again")
def loaded_again() -> Scene:
    model = uneven()
    return plain(model, after=at(5, lambda: model.load_state_dict(copy.deepcopy(model.state_dict()))))


@correct("structure", "the same bits at another address")
def moved() -> Scene:
    model = uneven()
    return plain(model, after=at(5, lambda: setattr(model.trunk.weight, "data", model.trunk.weight.data.clone())))


@correct("phases", "a thaw with the optimizer rebuilt")
def thawed() -> Scene:
    scene = plain(uneven(), phases=[Phase()])

    def thaw() -> None:
        scene.model.requires_grad_(True)
        scene.optimizers = [AdamW(scene.model.parameters(), lr=0.01)]

    scene.phases.append(Phase(thaw, ()))
    return scene


@correct("phases", "trunk and head in turn")
def turned() -> Scene:
    scene = plain(Wide(), phases=[Phase()])

    def turn(frozen: str, other: str) -> None:
        scene.model.requires_grad_(True)
        freeze_by_hand(scene.model.get_submodule(frozen))
        scene.optimizers = [SGD(scene.model.get_submodule(other).parameters(), lr=0.05)]

    scene.phases += [Phase(partial(turn, "head", "trunk"), ("head",)), Phase(partial(turn, "trunk", "head"))]
    return scene


@correct("phases", "resumed from a saved state")
def resumed() -> Scene:
    first = with_optimizer(OPTIMIZERS["AdamW"])
    first.run()
    state = copy.deepcopy((first.model.state_dict(), first.optimizers[0].state_dict()))
    scene = with_optimizer(OPTIMIZERS["AdamW"])
    scene.model.load_state_dict(state[0])
    scene.optimizers[0].load_state_dict(state[1])
    return scene


# --- correct loops: some more


@correct("optimizer", "two networks in turn, each with its flags off while the other is stepped")
def flags_in_turn() -> Scene:
    scene = in_turn()

    def before(step: int) -> None:
        for number, head in enumerate(scene.model.heads.values()):
            head.requires_grad_(number == step % 2)

    scene.before = before
    return scene


@correct("optimizer", "a penalty on the gradient")
def gradient_penalty() -> Scene:
    model = uneven()

    def loss(_: int) -> Tensor:
        inner = distance(model(X))
        gradients = torch.autograd.grad(inner, trainable(model), create_graph=True)
        return inner + sum(gradient.square().sum() for gradient in gradients)

    return plain(model, loss=loss)


def five_tasks(by_weight: bool) -> Scene:
    """Twelve draws out of five tasks, of which one does not come."""
    model = uneven()
    model.heads = nn.ModuleList(nn.Linear(2, 1) for _ in range(5))
    draws = [0, 1, 2, 3, 0, 1, 2, 3, 1, 0, 2, 3]

    def loss(step: int) -> Tensor:
        losses = {task: distance(head(model.trunk(X))) for task, head in enumerate(model.heads)}
        drawn = draws[step - 1]
        weighted = sum(float(task == drawn) * losses[task] for task in losses) if by_weight else losses[drawn]
        return distance(model(X)) + weighted

    return plain(model, loss=loss, num_steps=12)


correct("tasks", "one of five tasks is not drawn in 12 steps")(partial(five_tasks, False))
correct(
    "tasks",
    "one of five tasks is not drawn in 12 steps, with loss weights of 0 and 1",
)(partial(five_tasks, True))


@correct("structure", "to float64 and back, which loses nothing")
def double_and_back() -> Scene:
    model = uneven()
    return plain(model, after=at(4, lambda: model.double().float()))


@correct("structure", "an LSTM over a frozen trunk")
def recurrent() -> Scene:
    model = nn.Sequential()
    model.trunk, model.rnn = nn.Linear(2, 2), nn.LSTM(2, 3, num_layers=2)
    freeze_by_hand(model.trunk)
    return plain(model, loss=lambda _: distance(model.rnn(model.trunk(X))[0]))


@correct("structure", "a transformer layer over a frozen trunk")
def attention() -> Scene:
    model = nn.Sequential()
    model.trunk, model.layer = nn.Linear(2, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    freeze_by_hand(model.trunk)
    return plain(model, loss=lambda _: distance(model.layer(model.trunk(X)[None])))


@correct("structure", "a prompt in front of a frozen model")
def prompt() -> Scene:
    model = uneven()
    freeze_by_hand(model.head)
    model.prompt = nn.Parameter(torch.zeros(2))
    return plain(model, freeze=("trunk", "head"), loss=lambda _: distance(model(X + model.prompt)))


@correct("liveness", "two heads take turns in asking for a gradient")
def taking_turns() -> Scene:
    model = TwoHeads()

    def turn(step: int) -> None:
        for number, head in enumerate(model.heads.values()):
            head.requires_grad_(step % 2 == number)

    loss = lambda _: distance(model(X))  # noqa: E731
    return Scene(model, [SGD(model.heads.parameters(), lr=0.05)], num_steps=80, before=turn, loss=loss)


@correct("liveness", "a head that is trained at every tenth step, up to the end")
def rarely_trained() -> Scene:
    model = TwoHeads()
    loss = lambda step: sum(  # noqa: E731
        distance(model.task(name, X)) for name in (("a", "b") if step % 10 == 1 else ("a",))
    )
    return Scene(model, [SGD(model.heads.parameters(), lr=0.05)], num_steps=180, loss=loss)


@correct("structure", "complex weights")
def complex_weights() -> Scene:
    model = nn.Sequential()
    model.trunk, model.head = nn.Linear(2, 2, dtype=torch.complex64), nn.Linear(2, 1, dtype=torch.complex64)
    freeze_by_hand(model.trunk)
    return plain(model, loss=lambda _: distance(model(X.to(torch.complex64)).abs()))


@fault("structure", "a sparse frozen buffer is written", ("buffer_changed", "trunk.neighbours"))
def written_sparse_buffer() -> Scene:
    scene = sparse_buffer()
    return replace(scene, after=at(3, lambda: scene.model.trunk.neighbours.mul_(2)))


@correct("structure", "a sparse matrix as a frozen buffer")
def sparse_buffer() -> Scene:
    model = uneven()
    model.trunk.register_buffer("neighbours", torch.eye(3).to_sparse())
    return plain(model, loss=lambda _: distance(torch.sparse.mm(model.trunk.neighbours, model(X))))


@correct("structure", "a lazy head", ignore="Lazy modules")
def lazy_head() -> Scene:
    model = nn.Sequential()
    model.trunk, model.head = nn.Linear(2, 2), nn.LazyLinear(1)
    freeze_by_hand(model.trunk)
    return Scene(model, [SGD(model.head.parameters(), lr=0.05)])


@correct("optimizer", "Muon with AdamW")
def muon() -> Scene:
    model = uneven()
    return Scene(model, [torch.optim.Muon([model.head.weight], lr=0.01), AdamW([model.head.bias], lr=0.01)])


@correct("optimizer", "GradScaler that skips its first steps")
def skipped_at_first() -> Scene:
    scene = plain(uneven())
    add_scaler(scene, init_scale=2.0**127)
    return scene


@correct("optimizer", "gradients accumulated over eight steps")
def accumulated_for_long() -> Scene:
    scene = plain(uneven(), num_steps=16)
    optimizer = scene.optimizers[0]
    scene.update = lambda step: optimizer.step() if step % 8 == 0 else None
    scene.clear = lambda step: optimizer.zero_grad() if step % 8 == 0 else None
    return scene


@correct("structure", "a target network that follows by averaging")
def target_network() -> Scene:
    model = Layers(["trunk", "online", "predictor"])
    freeze_by_hand(model.trunk)
    model.target = copy.deepcopy(model.online).requires_grad_(False)

    def loss(_: int) -> Tensor:
        features = model.trunk(X)
        return (model.predictor(model.online(features)) - model.target(features)).square().mean()

    @torch.no_grad()
    def follow(_: int) -> None:
        for mean, now in zip(model.target.parameters(), model.online.parameters(), strict=True):
            mean.lerp_(now, 0.1)

    return plain(model, loss=loss, after=follow)


@correct("structure", "spectral norm on what is trained")
def spectral_head() -> Scene:
    model = Layers(["trunk", "head"])
    freeze_by_hand(model.trunk)
    parametrizations.spectral_norm(model.head)
    return plain(model)


@correct("structure", "a way back to the parent in a list")
def way_back() -> Scene:
    model = uneven()
    model.trunk.parent = [model]
    return plain(model)
