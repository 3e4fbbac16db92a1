"""Settings that were written down and that no phase reads, each with the settings that override it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from mtl.config import RunConfig
from mtl.config.cache import CacheConfig
from mtl.config.optim import OptimConfig
from mtl.config.own import is_own
from mtl.config.phase import patterns_of
from mtl.config.precedence import Precedence, is_default, is_written, precedence_of
from mtl.config.tracking import ONLY_WANDB
from mtl.config.yaml_source import KeyPath
from mtl.patterns import PatternError, select, text_of
from mtl.phases.reads import OF_OPTIM, balance_path
from mtl.phases.resolve import Phase
from mtl.runtime.text import hint, shorten

# The run's settings that a phase may set itself, and under which key.
_OF_PHASES: dict[KeyPath, str] = {
    **{("optim", key): key for key in OF_OPTIM},
    ("balance",): "balance",
    ("data", "batch_size"): "batch_size",
    ("cache", "mode"): "cache",
}
_KEPT_WHERE = {"ram_gb": "in memory", "disk_gb": "on disk", "dir": "on disk"}
_SCALE = "; optim.lr_scale multiplies every rate"


@dataclass(frozen=True)
class _Unread:
    """A setting that would change nothing.

    Attributes:
        path: Its key path.
        why: Why, in words.
        before: The key paths of what goes before it, as far as that is settings.
        hint: What may have been meant.
    """

    path: KeyPath
    why: str
    before: tuple[KeyPath, ...] = ()
    hint: str = ""


def unread_settings(
    config: RunConfig, phases: Sequence[Phase], depthwise: Collection[str]
) -> tuple[list[str], list[str]]:
    """Finds what was written and is read by no phase.

    What the command line asks for has to have an effect. A file may write out defaults, and what the command line, or
    a file that is based on it, goes before.

    Args:
        config: The run.
        phases: All its phases.
        depthwise: The names of the model's depthwise convolutions.

    Returns:
        Mistakes: what the command line asks for in vain, and names of layers that are not there. And what is to be
        warned of: what a file asks for in vain.
    """
    mistakes = _unknown_layers(config, depthwise)
    warnings: list[str] = []
    reads = set[KeyPath]().union(*(phase.reads.keys for phase in phases))
    for each in chain(_candidates(config, phases), _of_depthwise(config, depthwise)):
        if each.path in reads or not is_written(config.source, each.path):
            continue
        # For one reason, that of the first phase.
        reads.add(each.path)
        rank = precedence_of(config.source, each.path)
        lines = config.mistake(each.path, each.why + _outvoted_by(config, each.before) + each.hint).mistakes
        if rank == Precedence.COMMAND_LINE:
            mistakes += lines
        elif not is_default(config, each.path) and all(precedence_of(config.source, by) <= rank for by in each.before):
            warnings += lines
    return mistakes, [*warnings, *_lr_of_balance_only(config, phases)]


def _of_depthwise(config: RunConfig, layers: Collection[str]) -> Iterator[_Unread]:
    if config.depthwise != "torch" and not layers:
        yield _Unread(("depthwise",), "the model has no depthwise convolution")
    elif isinstance(config.depthwise, list) and not {*config.depthwise} & {*layers}:
        near = hint(config.depthwise[0], layers)
        yield _Unread(("depthwise",), "the model has none of these layers, as if they were another trunk's", hint=near)


def _unknown_layers(config: RunConfig, layers: Collection[str]) -> list[str]:
    """Mistakes: the names in `depthwise` that are no layers, next to some that are."""
    names = config.depthwise if isinstance(config.depthwise, list) else []
    return [
        line
        for number, name in enumerate(names)
        if name not in layers and {*names} & {*layers}
        for line in config.mistake(
            ("depthwise", number), f"expected a depthwise convolution of this model, got {name!r}{hint(name, layers)}"
        ).mistakes
    ]


def _outvoted_by(config: RunConfig, before: Sequence[KeyPath]) -> str:
    shown = shorten([f"{config.key_of(path)} ({config.source.where(path)})" for path in before], 3)
    return f": {shown} {'goes' if len(before) == 1 else 'go'} before it" if before else ""


def _candidates(config: RunConfig, phases: Sequence[Phase]) -> Iterator[_Unread]:
    """All that a phase may or may not read, with the reason if none does."""
    written = list({phase.written.path: phase.written for phase in phases}.values())
    for path, key in _OF_PHASES.items():
        before = tuple((*each.path, key) for each in written if getattr(each.config, key) is not None)
        yield _Unread(path, "no phase reads it", before, _SCALE if key == "lr" else "")
    for key in OptimConfig.model_fields:
        if key not in OF_OPTIM:
            yield _Unread(("optim", key), "no phase reads it, since none trains")
    frozen = tuple((*each.path, each.config.patterns_key) for each in written)
    for path in (("trunk", "checkpointing"), ("audit", "gradients_every_steps")):
        yield _Unread(path, "no phase trains anything of the trunk", frozen)
    own = tuple((*each.path, "tasks") for each in written if each.config.tasks is not None)
    # What another run has trained may stay as it is.
    taken = {text_of(pattern) for each in config.init_from for pattern in patterns_of(each.names)}
    for task in (task for task in config.tasks if f"heads.{task}" not in taken):
        yield _Unread(("tasks", task), "no phase trains it, and it is validated as it begins", own)
    off = tuple(dict.fromkeys(("cache", "mode") if e.config.cache is None else (*e.path, "cache") for e in written))
    for key in CacheConfig.model_fields:
        if key == "views" and not config.data.has_views:
            yield _Unread(("cache", key), "there are views only with data.augment or data.transform.train")
        elif key != "mode":
            yield _Unread(("cache", key), f"no phase keeps anything {_KEPT_WHERE.get(key, '')}".rstrip(), off)
    if config.resume is None:
        yield _Unread(("resume_override",), "resume is not given")
    yield from _of_tracking(config)
    for phase in {phase.written.path: phase for phase in phases}.values():
        yield from _of_phase(config, phase)
    first = phases[0].written.path
    if all(phase.written.path != first for phase in phases[1:]):
        if phases[0].config.optimizer_state == "reset":
            yield _Unread((*first, "optimizer_state"), "before the first phase, optimizers have no state")
        if phases[0].config.restore.which == "best":
            yield _Unread((*first, "restore"), "before the first phase, no weights are the best")


def _of_tracking(config: RunConfig) -> Iterator[_Unread]:
    """The settings that only wandb reads, where the run is not shown there."""
    tracking = config.tracking
    if not tracking.is_off and (tracking.backend == "wandb" or is_own(tracking.backend)):
        return
    off, backend = tracking.mode == "disabled", ("tracking", "backend")
    before = ("tracking", "mode") if off else backend
    why = "the run is shown nowhere" if tracking.is_off else f"{tracking.backend} does not read it"
    keys = [*ONLY_WANDB, *(["predictions_every_epochs"] if tracking.is_off else [])]
    for key in keys if off else [*keys, "mode"]:
        yield _Unread(("tracking", key), why, (before,))


def _of_phase(config: RunConfig, phase: Phase) -> Iterator[_Unread]:
    """Numbers that a phase has for some of its parameters, tasks, epochs or steps."""
    path, balance = phase.written.path, balance_path(phase.written)
    freeze = (*path, phase.config.patterns_key)
    for key, table in (("lr", phase.optim.lr), ("weight_decay", phase.optim.weight_decay)):
        where = config.path_of(phase.written, key)
        patterns = list(table) if isinstance(table, dict) and not phase.config.evaluate_only else []
        for place, pattern in enumerate(patterns):
            before: tuple[KeyPath, ...] = (freeze,)
            if pattern.split(".")[0] == "balance":
                before = ((*balance, "method"),)
            elif _matches_some(pattern, phase.freeze.plan.names.trainable):
                before = tuple((*where, later) for later in patterns[place + 1 :])
            yield _Unread((*where, pattern), "no parameter that trains has this number", before)
    for task in (phase.config.balance or config.balance).weights or {}:
        yield _Unread((*balance, "weights", task), "no phase with these weights trains this task")
    yield _Unread((*path, "layer_decay"), "the phase trains nothing of the trunk", (freeze,))
    for never in phase.reads.never:
        yield _Unread(never, f"the phase ends before that, after {phase.num_steps} steps")


def _matches_some(pattern: str, names: Sequence[str]) -> bool:
    """Whether a pattern of names matches one of some; what asks for a module tree is taken to match none."""
    try:
        return bool(select([pattern], names).names)
    except PatternError:
        return False


def _lr_of_balance_only(config: RunConfig, phases: Sequence[Phase]) -> list[str]:
    """A rate that looks like the run's, and is that of balancing methods' weights alone."""
    borrowing = [phase.name for phase in phases if phase.reads.borrows_lr]
    is_read = any(phase.config.lr is None and not phase.config.evaluate_only for phase in phases)
    if not borrowing or is_read or not is_written(config.source, ("optim", "lr")):
        return []
    message = f"only the balancing method's weights have this rate, in {shorten(borrowing, 3)}{_SCALE}"
    return config.mistake(("optim", "lr"), message).mistakes
