"""The message when a run does not fit into memory: the plan's estimate, and settings that need less."""

from __future__ import annotations

import errno

import torch

from mtl.phases.plan import Plan
from mtl.phases.plan.records import MemoryPlan
from mtl.runtime.console import first_line
from mtl.runtime.text import in_bytes

_SIGNS = (
    *("DefaultCPUAllocator: can't allocate memory", "not enough memory", "bad_alloc", "start new thread"),
    # Of a file in shared memory, as processes that read data pass batches on.
    "Cannot allocate memory",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is used up: a device's, or the host's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # On the CPU, torch has no type of its own for it, and other words on other systems and of other libraries (oneDNN).
    return isinstance(error, RuntimeError) and (
        str(error) == "could not create a primitive" or any(sign in str(error) for sign in _SIGNS)
    )


def _cause(error: Exception) -> str:
    """An error in a line; of one that a data worker raised, the last line of its traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines and lines[0].startswith("Caught ") else first_line(error)


def in_words(error: Exception, plan: Plan | None) -> str:
    """One message: what ran out, what the plan counted on, and what to change.

    Args:
        error: What was raised.
        plan: That of the run; None if it ran out before there was one.
    """
    if plan is None:
        return (
            f"out of memory before the first step: {_cause(error)}\n"
            "  the data set and the model are then in memory; what makes them smaller: data.num_train, data.num_val,"
            " data.image_size, a smaller trunk; `mtl plan` says what the phases need"
        )
    phase = max(plan.phases, key=lambda each: _stays(each.memory))
    memory = phase.memory
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer state": memory.optimizer_state or 0,
        "averages": memory.average,
    }
    counted = ", ".join(f"{in_bytes(size)} of {what}" for what, size in parts.items())
    return (
        f"out of memory: {_cause(error)}\n"
        f"  the plan, for phase {phase.name!r}, which needs most: {counted}; activations come on top, and grow with"
        " the batch\n"
        f"  what makes it smaller: data.batch_size={max(1, phase.batch_size // 2)} with optim.accumulate=2 (the same"
        " step), precision=bf16, trunk.checkpointing=true, a longer frozen part of the trunk, cache.ram_gb, more"
        " processes"
    )


def _stays(memory: MemoryPlan) -> int:
    return memory.weights + memory.gradients + (memory.optimizer_state or 0) + memory.average
