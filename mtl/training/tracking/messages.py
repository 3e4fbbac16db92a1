"""What a run logs in words: freezes, balancing, epochs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from mtl.model.dead_branch import DeadBranch
from mtl.optim.balance.describe import settings_in_use
from mtl.phases.active_tasks import active_tasks
from mtl.phases.metrics import SCORE
from mtl.phases.plan.dead import dead_branches
from mtl.phases.resolve import Phase
from mtl.runtime.console import logger
from mtl.runtime.text import condense, count, shorten
from mtl.training.setup import RunSetup
from mtl.training.tracking.steps import StepLog


def log_classic_freeze(setup: RunSetup) -> None:
    """Logs what the classic list of substrings freezes, in the words of the code that it comes from."""
    substrings = setup.config.MODEL.NOT_TRAIN_IN_MULTI_TASK
    if not substrings:
        return
    logger.info(f"use freeze for {substrings}")
    for name in setup.phases[0].freeze.plan.names.frozen:
        if any(substring in name for substring in substrings):
            logger.info(f"freezing {name}")


def warn_of_dead_branches(setup: RunSetup) -> None:
    """Warns of parameters that would train in a phase but cannot, since frozen zeros stop their gradients.

    Args:
        setup: The run, with its initial weights and no freeze enforced yet.
    """
    phases_of: dict[DeadBranch, list[str]] = {}
    for name, branch in dead_branches(setup).items():
        phases_of.setdefault(branch, []).append(name)
    for branch, phases in phases_of.items():
        dead = condense(branch.parameters, [name for name, _ in setup.root.named_parameters()])
        are = "is" if len(branch.zeros) == 1 else "are"
        logger.warning(
            f"{shorten(phases, 3)}: {count(len(branch.parameters), 'trainable tensor')} ({shorten(dead, 4)}) cannot"
            f" train: gradients there stay zero, since {count(len(branch.zeros), 'frozen tensor')} in their way {are}"
            f" zero in every element ({shorten(list(branch.zeros), 4)}); {_remedy(setup, branch)}"
        )


def _remedy(setup: RunSetup, branch: DeadBranch) -> str:
    ways = [f"leave {'it' if len(branch.zeros) == 1 else 'them'} out of the freeze"]
    if any(name.startswith("trunk.") for name in branch.zeros):
        if "zero_init_last" in inspect.signature(type(setup.model.trunk)).parameters:
            ways.append("set trunk.options.zero_init_last=false")
        if setup.config.trunk.weights == "none":
            ways.append("begin with trained weights (trunk.weights)")
    return " or ".join(ways)


def log_idle_tasks(setup: RunSetup, phase: Phase) -> None:
    """Logs which of a phase's tasks have no loss in it, since all their parameters are frozen."""
    idle = [task for task in active_tasks(setup.config, phase.config) if task not in phase.tasks]
    if idle:
        logger.info(f"{phase.name}: no losses of {', '.join(idle)}: everything that they would train is frozen")


def log_balance(setup: RunSetup, phase: Phase) -> None:
    """Logs a balancing method's options, and where it cannot do in a phase what its name says."""
    if phase.config.evaluate_only:
        return
    config = phase.config.balance or setup.config.balance
    if settings := settings_in_use(config):
        logger.info(f"{phase.name}: balance {config.method}: {settings}")
    if phase.balance.by_gradients is not None and not phase.balances_gradients:
        what = f"only {phase.sharing[0]} reaches" if phase.sharing else "no task reaches"
        logger.info(
            f"{phase.name}: gradients are not balanced: {what} trainable parameters of the trunk; losses are summed"
        )
    if phase.optim.accumulate > 1 and not phase.balance.adds_up and phase.balance.by_gradients is None:
        logger.warning(
            f"{phase.name}: the balancing method combines each of a step's {phase.optim.accumulate} batches by itself,"
            " which is not the step of one large batch; for that step, use mean, uw or fixed weights"
        )


def log_epoch(setup: RunSetup, row: Mapping[str, Any], log: StepLog | None) -> None:
    """Logs a validation as one line of fields, two spaces between them: the main metric of each task.

    Args:
        setup: The run.
        row: The validation's row of numbers.
        log: The steps before it, if there were any.
    """
    goals = [f"{name} {task.goal.metric}" for name, task in setup.labelled.items()]
    values = [row[f"val/{goal.replace(' ', '/')}"] for goal in goals]
    logger.info(
        f"{row['phase']}  epoch {row['epoch']}  step {row['step']}"
        + (f"  loss {log.mean_loss:.3f}" if log is not None else "")
        + f"  {SCORE} {row[SCORE]:.3f}  "
        + "  ".join(f"{goal} {value:.3f}" for goal, value in zip(goals, values, strict=True))
        + (f"  {log.images_per_s:.0f} img/s" if log is not None else "")
    )


def log_unreached(setup: RunSetup, phase: Phase) -> None:
    """Logs which parameters would train in a phase but get no gradient, and how they are treated."""
    every_name = [name for name, _ in setup.root.named_parameters(remove_duplicate=False)]
    names = shorten(condense(phase.freeze.unreached, every_name), 6)
    is_frozen = setup.config.unreached == "freeze"
    treated = "frozen for this phase" if is_frozen else "NOT frozen; it will not train"
    level = logging.INFO if is_frozen else logging.WARNING
    logger.log(
        level, f"{phase.name}: no active task reaches {len(phase.freeze.unreached)} parameters ({names}): {treated}"
    )
