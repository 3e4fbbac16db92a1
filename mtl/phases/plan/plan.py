"""The plan of a run: what every phase freezes, trains and costs, found out without training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from mtl.config import RunConfig
from mtl.data import Mixed
from mtl.freeze import FreezePlan
from mtl.model.depthwise import depthwise_layers
from mtl.model.shapes import quick_shapes
from mtl.model.teachers import TEACHERS
from mtl.optim.balance.describe import settings_in_use
from mtl.phases.plan.dead import dead_branches
from mtl.phases.plan.forecast import forecast
from mtl.phases.plan.parts import model_parts, part_plans
from mtl.phases.plan.records import Claim, FlopsPlan, GroupPlan, MemoryPlan, PhasePlan, Plan, Side
from mtl.phases.plan.rehearsal import Cost, rehearse
from mtl.phases.resolve import Phase
from mtl.phases.setup import ModelSetup, build_model_setup
from mtl.runtime.text import condense

# Larger models are not made with their weights for the sake of a plan.
_MOST_BYTES = 10**9


def make_plan(model_setup: ModelSetup, world_size: int = 1, with_forecast: bool = False) -> Plan:
    """Finds out what every phase freezes, trains and costs.

    Its model is used for a rehearsal of every phase: it is to be one without weights.

    Args:
        model_setup: A run's model and phases.
        world_size: Processes among which gradients are reduced.
        with_forecast: Whether to find out as well what each phase could keep of the trunk, and what cannot train.
    """
    with quick_shapes():
        planner = _Planner(model_setup, world_size)
        phases = planner.phases()
        if with_forecast:
            kept = [forecast(model_setup, index, world_size) for index in range(len(phases))]
            phases = [replace(phase, kept=own) for phase, own in zip(phases, kept, strict=True)]
    # Initial values are known without reading any file if there are no trained weights to begin with.
    if with_forecast and model_setup.config.trunk.weights == "none" and planner.weights <= _MOST_BYTES:
        dead = dead_branches(build_model_setup(model_setup.config, source=model_setup.source))
        phases = [replace(phase, dead=dead.get(phase.name)) for phase in phases]
    return Plan(
        model_setup.config.trunk.name,
        world_size,
        tuple(planner.parameters),
        tuple(phases),
        _depthwise(model_setup.config, depthwise_layers(model_setup.root)),
    )


def _depthwise(config: RunConfig, layers: Collection[str]) -> str:
    if layers and config.depthwise == "auto":
        return f"each of {len(layers)} is timed before training, where it is trained on a CPU in fp32"
    num = len({*layers} & {*config.depthwise})
    return f"weight gradients as shifted products in {num} of {len(layers)}, on a CPU in fp32" if num else ""


# What has been rehearsed in this process: phases that freeze and train the same parts of the same model cost the same.
_COSTS: dict[tuple[object, ...], Cost] = {}


class _Planner:
    def __init__(self, model_setup: ModelSetup, world_size: int) -> None:
        self.model_setup = model_setup
        self.world_size = world_size
        root = model_setup.root
        self.parameters = dict(root.named_parameters())
        self.every_name = [name for name, _ in root.named_parameters(remove_duplicate=False)]
        self.every_module = [name for name, _ in root.named_modules(remove_duplicate=False) if name]
        self.weights = sum(tensor.nbytes for tensor in [*root.parameters(), *root.buffers()])
        self.model_parts = model_parts(root, self.parameters)
        self.cost_of_all = self.cost(None)

    def phases(self) -> list[PhasePlan]:
        plans: list[PhasePlan] = []
        before: Phase | None = None
        for phase in self.model_setup.phases:
            plans.append(self.phase(phase, before))
            # An evaluation freezes everything, but nothing is thawed by it.
            before = before if phase.config.evaluate_only else phase
        return plans

    def phase(self, phase: Phase, before: Phase | None) -> PhasePlan:
        was_frozen = set((before or phase).freeze.plan.names.frozen)
        cost, of_all = self.cost(phase), self.cost_of_all
        trains = self.side(phase.freeze.plan.names.trainable)
        # What no task reaches has no gradient, frozen or not.
        reached = self.side([name for name in phase.freeze.plan.names.trainable if name not in phase.freeze.unreached])
        # A method that steps its own weights looks at the losses once more.
        num_forwards = 2 if phase.balance.param_groups and not phase.config.evaluate_only else 1
        # A method that looks at gradients of parameters has those of the trunk once more for each task and batch.
        of_trunk = self.side([name for name in reached.names if name.startswith("trunk.")])
        method = phase.balance.by_gradients if phase.balances_gradients and phase.balance.on == "parameters" else None
        by_task = 0 if method is None else len(phase.tasks) * of_trunk.bytes * method.num_batches
        remembered = by_task if method is not None and method.remembers_rows else 0
        balance = phase.config.balance or self.model_setup.config.balance
        average = 0 if self.model_setup.config.optim.ema_decay is None else trains.bytes
        reduced = reached.bytes + by_task
        return PhasePlan(
            name=phase.name,
            length=phase.length.describe(phase.num_steps),
            num_steps=phase.num_steps,
            batch_size=phase.batch_size,
            mix=phase.order.describe() if isinstance(phase.order, Mixed) else None,
            tasks=phase.tasks,
            optimizer=None if phase.config.evaluate_only else phase.optim.optimizer.name,
            lr_schedule=_settings(phase.optim.lr_schedule.model_dump(exclude_none=True), "name"),
            balance=balance.method + (f" ({settings})" if (settings := settings_in_use(balance)) else ""),
            optimizer_state=phase.config.optimizer_state,
            restore=None if phase.restore is None else phase.restore[0],
            freeze=tuple(pattern.text for pattern in phase.freeze.written if pattern.key != "train"),
            train=tuple(pattern.text for pattern in phase.freeze.written if pattern.key == "train"),
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
            memory=MemoryPlan(self.weights, reduced + remembered, cost.optimizer_state, average),
            flops=FlopsPlan(
                num_forwards * cost.forward_flops, cost.backward_flops, of_all.forward_flops, of_all.backward_flops
            ),
            reduced_bytes=reduced,
            sent_bytes=2 * (self.world_size - 1) * reduced // self.world_size,
            thawed=self.side([name for name in phase.freeze.plan.names.trainable if name in was_frozen]),
            newly_frozen=self.side([name for name in phase.freeze.plan.names.frozen if name not in was_frozen]),
            lr_of=self.lr_of(phase),
            parts=part_plans(self.model_parts, phase.freeze.plan.names.frozen, phase.freeze.unreached),
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
        held = [name for name in plan.held_in_eval if name.startswith(("trunk", "heads", TEACHERS))]
        return tuple(condense(held, self.every_module))

    def lr_of(self, phase: Phase) -> dict[str, float]:
        rate = {id(parameter): group["lr"] for group in phase.groups for parameter in group["params"]}
        return {name: rate[id(p)] for name, p in self.parameters.items() if id(p) in rate}

    def cost(self, phase: Phase | None) -> Cost:
        """The cost of a phase; None stands for one in which nothing is frozen."""
        config = self.model_setup.config
        model = config.model_dump_json(include={"trunk", "tasks", "memory_format"})
        key: tuple[object, ...] = (model, config.data.size, config.data.has_views)
        if phase is not None:
            optimizer = phase.optim.optimizer.model_dump_json()
            stepped = sum(p.numel() for group in phase.groups for p in group["params"])
            key = (*key, phase.freeze.plan.names.frozen, phase.tasks, phase.backward_by_task, optimizer, stepped)
        if key not in _COSTS:
            _COSTS[key] = rehearse(self.model_setup, phase)
        return _COSTS[key]


def _settings(values: dict[str, Any], name: str) -> str:
    """A name, and what is set with it."""
    others = [f"{key} {value}" for key, value in values.items() if key != name and value]
    return f"{values[name]}" + (f" ({', '.join(others)})" if others else "")
