"""A plan as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mtl.model.dead_branch import DeadBranch


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
    """The tensors that one of the user's patterns decided, as the last one that matched.

    Attributes:
        key: Where it was written: `freeze`, `train`, `freeze_always` or `NOT_TRAIN_IN_MULTI_TASK`.
        pattern: The pattern.
        parameters: Parameter tensors.
        buffers: Buffers that it names; a buffer next to frozen parameters is frozen with them without being named.
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
class PartPlan:
    """The treatment of one part of the model in a phase: a depth group of the trunk, a head, the weights of balancing.

    Attributes:
        name: Of a depth group, its number from the input on and its first module: `03 blocks.1.0`; else `heads.<task>`,
            `balance` or `teachers.<task>`.
        count: Parameter tensors.
        frozen: How many of them are frozen.
        unreached: How many would train, but no active task reaches them.
    """

    name: str
    count: int
    frozen: int
    unreached: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that stay allocated; activations come on top and depend on the batch.

    Attributes:
        weights: Parameters and buffers.
        gradients: Of the trainable parameters.
        optimizer_state: The state of the optimizer; None if that is only known once it has stepped.
        average: The moving average of the trainable parameters, if there is one.
    """

    weights: int
    gradients: int
    optimizer_state: int | None
    average: int


@dataclass(frozen=True)
class FlopsPlan:
    """Floating-point operations on one image, as torch counts them (a multiplication and an addition are two).

    Attributes:
        forward: Of the phase's forward.
        backward: Of its backward.
        forward_of_all: If nothing were frozen and all tasks were active.
        backward_of_all: The backward of the same.
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
class KeptPlan:
    """The part of the trunk that is computed once for each image.

    Attributes:
        modules: How many modules at the trunk's beginning; 0 for the whole trunk.
        bytes_per_image: What is kept of an image.
        bytes: What is kept of all images.
        why_not: Why nothing is kept; empty if something is.
        in_a_row: Whether one process then takes the steps of the heads in a row.
    """

    modules: int = 0
    bytes_per_image: int = 0
    bytes: int = 0
    why_not: str = ""
    in_a_row: bool = False


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
        lr_schedule: The learning-rate schedule, with its settings.
        balance: How the losses become one.
        optimizer_state: Whether it is kept or reset.
        restore: The metric by which it goes back to the best weights; None if it continues with the last ones.
        freeze: The user's patterns of what is frozen.
        train: Or of what is trained, everything else being frozen.
        claims: What each of them decided.
        frozen: Frozen parameters.
        trainable: The others.
        frozen_buffers: How many buffers are frozen.
        unreached: Parameters that would train, but that no active task reaches.
        held_in_eval: Modules of trunk and heads that are held in eval mode; one stands for all in it.
        groups: The optimizer's groups.
        memory: What stays allocated.
        flops: What a step computes.
        reduced_bytes: Gradients that a step brings together over all processes.
        sent_bytes: What each process sends for that in a ring, 2 (n - 1) / n times as much; 0 if it is alone.
        thawed: Trainable parameters that were frozen in the phase before.
        newly_frozen: What is frozen and trained in the phase before.
        lr_of: The peak rate of every parameter in an optimizer group, by name.
        parts: The same by part of the model, from the trunk's input on.
        kept: What of the trunk need be computed only once; None if that was not asked for.
        dead: What would train, but cannot; None if nothing is known to be so.
        mix: Where batches are drawn from several data sets, in words.
    """

    name: str
    length: str
    num_steps: int
    batch_size: int
    tasks: tuple[str, ...]
    optimizer: str | None
    lr_schedule: str
    balance: str
    optimizer_state: str
    restore: str | None
    freeze: tuple[str, ...]
    train: tuple[str, ...]
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
    parts: tuple[PartPlan, ...]
    kept: KeptPlan | None = None
    dead: DeadBranch | None = None
    mix: str | None = None

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
        depthwise: How many depthwise convolutions have their weight gradient from shifted products, in words; empty if
            torch computes all.
    """

    trunk: str
    world_size: int
    parameters: tuple[str, ...]
    phases: tuple[PhasePlan, ...]
    depthwise: str = ""

    def to_json(self, names: bool = False) -> dict[str, Any]:
        """The content of `plan.json` and of `mtl plan --json`.

        Args:
            names: Whether to list every parameter.
        """
        return {
            "trunk": self.trunk,
            "world_size": self.world_size,
            "depthwise": self.depthwise,
            "phases": [phase.to_json(names) for phase in self.phases],
        }
