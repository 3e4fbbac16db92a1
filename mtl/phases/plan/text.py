"""The plan of a run as text: in short before training, in full, and tensor by tensor."""

from __future__ import annotations

from mtl.model.dead_branch import DeadBranch
from mtl.phases.plan.records import Claim, GroupPlan, KeptPlan, PhasePlan, Plan, Side
from mtl.runtime.layout import table, wrap_text
from mtl.runtime.text import condense, count, in_bytes, shorten

# Phases that are shown in short.
_MOST_PHASES = 30
_MOST_GROUPS = 12
# Letters of a length in the short table.
_WIDEST = 60


def short_plan(plan: Plan, width: int | None = None) -> str:
    """One row a phase: what it freezes and trains, at which rate and for how long.

    Args:
        plan: The plan.
        width: Of the terminal; None in a file, where lines stay whole.
    """
    rows = [
        [
            phase.name,
            _patterns(phase),
            f"{phase.frozen.parameters:,}",
            f"{phase.trainable.parameters:,}",
            _rates(phase),
            phase.length if len(phase.length) <= _WIDEST else f"{phase.length[:_WIDEST]}...",
        ]
        for phase in plan.phases[:_MOST_PHASES]
    ]
    if len(plan.phases) > _MOST_PHASES:
        rows.append([f"and {len(plan.phases) - _MOST_PHASES} more", *[""] * 5])
    header = ["phase", "freeze", "frozen parameters", "trained parameters", "peak lr", "length"]
    return table(header, rows, numbers=(2, 3, 4), width=width)


def full_plan(plan: Plan, width: int | None = None) -> str:
    """A paragraph a phase, wrapped to a width."""
    about = [wrap_text(f"depthwise convolutions: {plan.depthwise}", width, 4)] if plan.depthwise else []
    return "\n\n".join([*(_paragraph(plan, phase, width) for phase in plan.phases), *about])


def parameter_map(plan: Plan, width: int | None = None) -> str:
    """Every parameter in every phase: its peak rate, `frozen`, `unreached`, or `-` if no optimizer steps it."""
    columns = []
    for phase in plan.phases:
        cells = dict.fromkeys(phase.frozen.names, "frozen")
        cells |= {name: f"{lr:.3g}" for name, lr in phase.lr_of.items()}
        columns.append(cells | dict.fromkeys(phase.unreached, "unreached"))
    rows = [[name, *(cells.get(name, "-") for cells in columns)] for name in plan.parameters]
    header = ["parameter", *(phase.name for phase in plan.phases)]
    return table(header, rows, numbers=range(1, len(header)), width=width)


def _patterns(phase: PhasePlan) -> str:
    if phase.optimizer is None:
        return "everything"
    train = [claim.pattern for claim in phase.claims if claim.key == "train"]
    freeze = [claim.pattern for claim in phase.claims if claim.key != "train"]
    everything_but = [f"all but {', '.join(train)}"] if train else []
    return shorten([*everything_but, *freeze], 4) or "-"


def _rates(phase: PhasePlan) -> str:
    rates = sorted({group.lr for group in phase.groups})
    return ", ".join(f"{lr:.3g}" for lr in rates) if len(rates) <= 3 else f"{rates[0]:.3g} to {rates[-1]:.3g}"


def _paragraph(plan: Plan, phase: PhasePlan, width: int | None) -> str:
    with_buffers = f", with {count(phase.frozen_buffers, 'buffer')}" if phase.frozen_buffers else ""
    lines = [("frozen", _side(phase.frozen, with_buffers)), ("trained", _side(phase.trainable))]
    lines += [(claim.key, _claim(claim)) for claim in phase.claims]
    if phase.unreached:
        names = shorten(condense(phase.unreached, plan.parameters), 8)
        lines += [("unreached", f"{count(len(phase.unreached), 'tensor')} that no active task reaches: {names}")]
    if phase.dead is not None:
        lines += [("dead", _dead(plan, phase.dead))]
    if phase.restore is not None:
        lines += [("begins with", f"the best weights so far by {phase.restore}")]
    if phase.kept is not None:
        lines += [("computed once", _kept(phase.kept))]
    lines += [("in eval mode", shorten(list(phase.held_in_eval), 8) or "-"), ("tasks", ", ".join(phase.tasks))]
    if phase.mix is not None:
        lines += [("images", phase.mix)]
    lines += _training(phase, plan.world_size) if phase.optimizer is not None else []
    if phase is not plan.phases[0]:
        lines += [("thawed", _side(phase.thawed)), ("newly frozen", _side(phase.newly_frozen))]
    head = wrap_text(f"{phase.name}: {phase.length}, batches of {phase.batch_size}", width, indent=4)
    widest = max(len(title) for title, _ in lines)
    wrapped = [(title, wrap_text(text, width, indent=widest + 4)) for title, text in lines]
    return "\n".join([head, *(f"  {title:<{widest}}  {text}".rstrip() for title, text in wrapped)])


def _dead(plan: Plan, dead: DeadBranch) -> str:
    names = shorten(condense(dead.parameters, plan.parameters), 4)
    numbers = f"{count(len(dead.parameters), 'tensor')}, whose gradient stays zero ({names}): in their way"
    return f"{numbers} {count(len(dead.zeros), 'frozen tensor')} of zeros ({shorten(list(dead.zeros), 4)})"


def _kept(kept: KeptPlan) -> str:
    if kept.why_not:
        return f"nothing: {kept.why_not}"
    what = f"the first {count(kept.modules, 'module')} of the trunk" if kept.modules else "the trunk"
    size = f"{in_bytes(kept.bytes_per_image)} an image, {in_bytes(kept.bytes)} in all"
    return f"{what}; kept: {size}, if that pays" + ("; the heads then step in a row" if kept.in_a_row else "")


def _training(phase: PhasePlan, world_size: int) -> list[tuple[str, str]]:
    """Parameter groups and schedule, and the cost of a step."""
    memory = phase.memory
    state = "unknown until it steps" if memory.optimizer_state is None else in_bytes(memory.optimizer_state)
    kept = f"weights {in_bytes(memory.weights)}, gradients {in_bytes(memory.gradients)}, optimizer state {state}"
    average = f", moving average {in_bytes(memory.average)}" if memory.average else ""
    lines = [(str(phase.optimizer), _group(group)) for group in phase.groups[:_MOST_GROUPS]]
    if len(phase.groups) > _MOST_GROUPS:
        lines += [("", f"and {len(phase.groups) - _MOST_GROUPS} more groups")]
    schedule = phase.lr_schedule + ("; optimizer state from scratch" if phase.optimizer_state == "reset" else "")
    lines += [
        ("schedule", schedule),
        ("balance", phase.balance),
        ("memory", kept + average),
        ("an image", _operations(phase)),
    ]
    reduced = f"{in_bytes(phase.reduced_bytes)} of gradients a step"
    if world_size > 1:
        reduced += f"; among {world_size} processes each sends {in_bytes(phase.sent_bytes)} in a ring"
    return [*lines, ("all-reduce", reduced)]


def _group(group: GroupPlan) -> str:
    numbers = f"{count(group.count, 'tensor')}, {count(group.parameters, 'parameter')}"
    return f"lr {group.lr:.3g}, decay {group.weight_decay:g}: {numbers}"


def _operations(phase: PhasePlan) -> str:
    flops = phase.flops
    unit, name = (1e9, "GFLOP") if flops.forward_of_all >= 1e10 else (1e6, "MFLOP")
    text = f"forward {flops.forward / unit:,.0f} + backward {flops.backward / unit:,.0f} {name}"
    if (flops.forward, flops.backward) == (flops.forward_of_all, flops.backward_of_all):
        return text
    of_all = f"{flops.forward_of_all / unit:,.0f} + {flops.backward_of_all / unit:,.0f}"
    return f"{text}; {flops.saved:.0%} less than with nothing frozen and all tasks active, {of_all}"


def _side(side: Side, more: str = "") -> str:
    if not side.count:
        return "nothing"
    modules = shorten(list(side.modules), 8)
    numbers = f"{count(side.count, 'tensor')}, {count(side.parameters, 'parameter')}, {in_bytes(side.bytes)}"
    return f"{numbers}{more}: {modules}"


def _claim(claim: Claim) -> str:
    if claim.key == "train":
        return f"{claim.pattern}  (the other {count(claim.parameters, 'tensor')} are frozen)"
    decided = [(claim.parameters, "tensor"), (claim.buffers if not claim.parameters else 0, "buffer")]
    numbers = ", ".join(count(number, what) for number, what in decided if number)
    return f"{claim.pattern}  decides {numbers or 'nothing: later patterns decide all that it matches'}"
