"""The plan of a run: what every phase freezes, trains and costs, found out without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mtl.blueprint import Blueprint
from mtl.freeze import FreezePlan
from mtl.names import condense
from mtl.patterns import text_of
from mtl.phases import Phase
from mtl.phases.length import length_in_words
from mtl.plan.rehearsal import Cost, rehearse


@dataclass(frozen=True)
class Side:
    """The parameters on one side of the line, each tensor once.

    Attributes:
        count: Tensors.
        parameters: Numbers in them.
        bytes: Their size.
        modules: The modules and tensors that cover exactly them.
        names: Their names.
    """

    count: int
    parameters: int
    bytes: int
    modules: tuple[str, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """What one of the user's patterns decided, as the last one that matched.

    Attributes:
        key: Where it was written: `freeze`, `train`, `freeze_always` or `NOT_TRAIN_IN_MULTI_TASK`.
        pattern: The pattern.
        parameters: Parameter tensors.
        buffers: Buffers that it names; a buffer beside frozen parameters is frozen with them without being named.
    """

    key: str
    pattern: str
    parameters: int
    buffers: int


@dataclass(frozen=True)
class GroupPlan:
    """A parameter group of the optimizer: peak rate, decay, tensors, and numbers in them."""

    lr: float
    weight_decay: float
    count: int
    parameters: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that stay allocated; activations come on top and depend on the batch.

    Attributes:
        weights: Parameters and buffers.
        gradients: Of what trains.
        optimizer_state: What the optimizer keeps of what trains; None if that is only known once it has stepped.
    """

    weights: int
    gradients: int
    optimizer_state: int | None


@dataclass(frozen=True)
class FlopsPlan:
    """Floating-point operations on one image, as torch counts them (a multiplication and an addition are two).

    Attributes:
        forward: Of the phase's forward.
        backward: Of its backward.
        forward_of_all: If nothing were frozen and all tasks were active.
        backward_of_all: Likewise.
    """

    forward: int
    backward: int
    forward_of_all: int
    backward_of_all: int

    @property
    def saved(self) -> float:
        """The share that the phase saves, between 0 and 1."""
        total = self.forward_of_all + self.backward_of_all
        return 1 - (self.forward + self.backward) / total if total else 0.0


@dataclass(frozen=True)
class PhasePlan:
    """One phase.

    Attributes:
        name: The phase.
        length: Its length in words.
        num_steps: Its length in optimizer steps, at most.
        batch_size: Images in one batch.
        tasks: The tasks whose losses are active.
        optimizer: What steps the parameters; None in a phase that only evaluates.
        freeze: The user's patterns.
        claims: What each of them decided.
        frozen: Frozen parameters.
        trainable: The others.
        frozen_buffers: How many buffers are frozen.
        unreached: Parameters that would train, but that no active task reaches.
        held_in_eval: Modules of trunk and heads that are held in eval mode; one stands for all in it.
        groups: The optimizer's groups.
        memory: What stays allocated.
        flops: What a step computes.
        reduced_bytes: Gradients that one all-reduce of a step brings together.
        sent_bytes: What each process sends for that in a ring, 2 (n - 1) / n times as much; 0 if it is alone.
        thawed: What trains and was frozen in the phase before.
        newly_frozen: What is frozen and trained in the phase before.
        lr_of: The peak rate of every parameter in an optimizer group, by name.
    """

    name: str
    length: str
    num_steps: int
    batch_size: int
    tasks: tuple[str, ...]
    optimizer: str | None
    freeze: tuple[str, ...]
    claims: tuple[Claim, ...]
    frozen: Side
    trainable: Side
    frozen_buffers: int
    unreached: tuple[str, ...]
    held_in_eval: tuple[str, ...]
    groups: tuple[GroupPlan, ...]
    memory: MemoryPlan
    flops: FlopsPlan
    reduced_bytes: int
    sent_bytes: int
    thawed: Side
    newly_frozen: Side
    lr_of: dict[str, float]

    def to_json(self, names: bool) -> dict[str, Any]:
        plain = asdict(self)
        lr_of = plain.pop("lr_of")
        plain["optimizer_groups"] = plain.pop("groups")
        plain["flops"]["saved"] = self.flops.saved
        if names:
            plain["lr_of"] = lr_of
        else:
            for side in ("frozen", "trainable", "thawed", "newly_frozen"):
                del plain[side]["names"]
        return plain


@dataclass(frozen=True)
class Plan:
    """All phases of a run.

    Attributes:
        trunk: The trunk's name.
        world_size: Processes among which gradients are reduced.
        parameters: The names of all parameters, each tensor once, in the order of the model.
        phases: The phases in order.
    """

    trunk: str
    world_size: int
    parameters: tuple[str, ...]
    phases: tuple[PhasePlan, ...]

    def to_json(self, names: bool = False) -> dict[str, Any]:
        """The content of `plan.json` and of `mtl plan --json`.

        Args:
            names: Whether to list every parameter.
        """
        return {
            "trunk": self.trunk,
            "world_size": self.world_size,
            "phases": [phase.to_json(names) for phase in self.phases],
        }


def make_plan(blueprint: Blueprint, world_size: int = 1) -> Plan:
    """Finds out what every phase freezes, trains and costs.

    The blueprint's model is used for a rehearsal of every phase: it is to be one without weights.

    Args:
        blueprint: A run's model and phases.
        world_size: Processes among which gradients are reduced.
    """
    planner = _Planner(blueprint, world_size)
    return Plan(blueprint.config.trunk.name, world_size, tuple(planner.parameters), tuple(planner.phases()))


# What has been rehearsed in this process: phases that freeze and train the same parts of the same model cost the same.
_COSTS: dict[tuple[object, ...], Cost] = {}


class _Planner:
    def __init__(self, blueprint: Blueprint, world_size: int) -> None:
        self.blueprint = blueprint
        self.world_size = world_size
        root = blueprint.root
        self.parameters = dict(root.named_parameters())
        self.every_name = [name for name, _ in root.named_parameters(remove_duplicate=False)]
        self.every_module = [name for name, _ in root.named_modules(remove_duplicate=False) if name]
        self.weights = sum(tensor.nbytes for tensor in [*root.parameters(), *root.buffers()])
        self.cost_of_all = self.cost(None)

    def phases(self) -> list[PhasePlan]:
        plans: list[PhasePlan] = []
        before: Phase | None = None
        for phase in self.blueprint.phases:
            plans.append(self.phase(phase, before))
            before = phase
        return plans

    def phase(self, phase: Phase, before: Phase | None) -> PhasePlan:
        was_frozen = set((before or phase).freeze.plan.names.frozen)
        cost, of_all = self.cost(phase), self.cost_of_all
        trains = self.side(phase.freeze.plan.names.trainable)
        sent = 2 * (self.world_size - 1) * trains.bytes // self.world_size
        return PhasePlan(
            name=phase.name,
            length=length_in_words(phase.config, phase.num_steps),
            num_steps=phase.num_steps,
            batch_size=phase.batch_size,
            tasks=phase.tasks,
            optimizer=None if phase.config.evaluate_only else phase.optim.optimizer.name,
            freeze=tuple(map(text_of, phase.freeze.users_patterns)),
            claims=self.claims(phase),
            frozen=self.side(phase.freeze.plan.names.frozen),
            trainable=trains,
            frozen_buffers=len(phase.freeze.plan.names.frozen_buffers),
            unreached=phase.freeze.unreached,
            held_in_eval=self.held_in_eval(phase.freeze.plan),
            groups=tuple(
                GroupPlan(g["lr"], g["weight_decay"], len(g["params"]), sum(p.numel() for p in g["params"]))
                for g in phase.groups
            ),
            memory=MemoryPlan(self.weights, trains.bytes, cost.optimizer_state),
            flops=FlopsPlan(cost.forward_flops, cost.backward_flops, of_all.forward_flops, of_all.backward_flops),
            reduced_bytes=trains.bytes,
            sent_bytes=sent,
            thawed=self.side([name for name in phase.freeze.plan.names.trainable if name in was_frozen]),
            newly_frozen=self.side([name for name in phase.freeze.plan.names.frozen if name not in was_frozen]),
            lr_of=self.lr_of(phase),
        )

    def side(self, names: Sequence[str]) -> Side:
        own = [name for name in names if name in self.parameters]
        return Side(
            len(own),
            sum(self.parameters[name].numel() for name in own),
            sum(self.parameters[name].nbytes for name in own),
            tuple(condense(names, self.every_name)),
            tuple(own),
        )

    def claims(self, phase: Phase) -> tuple[Claim, ...]:
        names = phase.freeze.plan.names
        parameters = {*names.frozen, *names.trainable}
        decided = list(names.decided_by.items())
        return tuple(
            Claim(
                pattern.key,
                pattern.text,
                sum(by in pattern.places and name in parameters for name, by in decided),
                sum(by in pattern.places and name not in parameters for name, by in decided),
            )
            for pattern in phase.freeze.written
        )

    def held_in_eval(self, plan: FreezePlan) -> tuple[str, ...]:
        held = [name for name in plan.held_in_eval if name.startswith(("trunk", "heads"))]
        return tuple(condense(held, self.every_module))

    def lr_of(self, phase: Phase) -> dict[str, float]:
        rate = {id(parameter): group["lr"] for group in phase.groups for parameter in group["params"]}
        return {name: rate[id(p)] for name, p in self.parameters.items() if id(p) in rate}

    def cost(self, phase: Phase | None) -> Cost:
        """What a phase costs; None stands for one in which nothing is frozen."""
        config = self.blueprint.config
        model = config.model_dump_json(include={"trunk", "tasks", "memory_format"})
        key: tuple[object, ...] = (model, config.data.image_size)
        if phase is not None:
            optimizer = phase.optim.optimizer.model_dump_json()
            stepped = sum(p.numel() for group in phase.groups for p in group["params"])
            key = (*key, phase.freeze.plan.names.frozen, phase.tasks, optimizer, stepped)
        if key not in _COSTS:
            _COSTS[key] = rehearse(self.blueprint, phase)
        return _COSTS[key]
