"""The history of a run: the command that began it, and the settings that were changed when it was resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mtl.checkpoint.files import CheckpointError
from mtl.config import RunConfig
from mtl.config.changes import ConfigDifference, config_differences
from mtl.model.init_from import Taken
from mtl.phases.resolve import Phase


@dataclass(frozen=True)
class Change:
    """A setting that has had another value since a step.

    Attributes:
        step: Steps done before.
        key: The key, as it is written on the command line.
        old: The value before; None if there was none.
        new: The value since then; None if there is none.
    """

    step: int
    key: str
    old: Any
    new: Any


@dataclass(frozen=True)
class History:
    """The settings that a run had before: `config.yaml` has only those that hold now.

    Every checkpoint has the history up to it, so that changes go with the steps that were made with them.

    Attributes:
        command: The command that began the run, for a shell; None if it is not known.
        origin: The checkpoint of another run that it began from, if it did.
        taken: The weights that `init_from` gave when it began.
        changes: In the order in which they were made; those of the run that it began from as well.
    """

    command: str | None = None
    origin: str | None = None
    changes: tuple[Change, ...] = ()
    taken: tuple[Taken, ...] = ()

    def after(self, step: int, differences: Sequence[ConfigDifference]) -> History:
        """The history with what is changed after a step."""
        new = (Change(step, each.key, each.before, each.now) for each in differences)
        return replace(self, changes=(*self.changes, *new))

    def to_json(self) -> dict[str, Any]:
        """The content of `history.json`, and of a checkpoint's `history`."""
        changes = [asdict(change) for change in self.changes]
        taken = [each.to_json() for each in self.taken]
        return {"command": self.command, "from": self.origin, "changes": changes, "init_from": taken}

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> History:
        """From `to_json`; of a checkpoint that is older than histories nothing is known.

        Raises:
            KeyError, TypeError: It is none.
        """
        if content is None:
            return cls()
        changes = tuple(Change(**change) for change in content["changes"])
        # Older histories have none.
        taken = tuple(Taken(**item) for item in content.get("init_from", ()))
        return cls(content["command"], content["from"], changes, taken)


UNKNOWN = History()


@dataclass(frozen=True)
class ResumePosition:
    """The position of a run when it is resumed.

    Attributes:
        phases: All phases.
        index: The phase that is active, or begins next; None if the run is over.
        is_inside: Whether that phase has begun.
    """

    phases: Sequence[Phase]
    index: int | None
    is_inside: bool


def why_in_vain(difference: ConfigDifference, position: ResumePosition) -> str | None:
    """Why a difference would change nothing from where a run resumes; None if it would change something."""
    if position.index is None:
        return "the run is over"
    if difference.phase is not None:
        return _why_not_in_phase(difference, position, position.index)
    reads = set().union(*(phase.reads.keys for phase in position.phases[position.index :]))
    section, _, key = difference.inner.partition(".")
    path = (section,) if section == "balance" else (section, key.split(".")[0])
    if section in ("optim", "balance", "cache", "audit") and path != ("audit", "policy") and path not in reads:
        return "no phase that is left reads it"
    return None


def _why_not_in_phase(difference: ConfigDifference, position: ResumePosition, index: int) -> str | None:
    rounds = [place for place, phase in enumerate(position.phases) if phase.config.name == difference.phase]
    if rounds and rounds[-1] < index:
        return f"phase {difference.phase} is over"
    at_begin = difference.inner.split(".")[0] in ("restore", "optimizer_state")
    if at_begin and rounds and rounds[-1] == index and position.is_inside:
        return f"phase {difference.phase} has begun"
    return None


def history_from(
    state: Mapping[str, Any], config: RunConfig, phases: Sequence[Phase], folder: Path, in_place: bool
) -> History:
    """The history of a run up to a checkpoint, with what changes there.

    Args:
        state: The checkpoint's plain data.
        config: The configuration with which it is resumed.
        phases: The phases that it resolves to.
        folder: The checkpoint.
        in_place: Whether it is the run's own.

    Raises:
        CheckpointError: Something is to be changed that has no effect any more: the record would say that it had.
    """
    index = state["scheduler"]["index"]
    # The end of a phase is recorded with its last step: the next one has not begun then.
    position = ResumePosition(phases, index if index < len(phases) else None, is_inside=state["change"] is None)
    found = differences_from(as_of_today(state["config"]), config)
    in_vain = [(each, why) for each in found if each.kind == "weighty" and (why := why_in_vain(each, position))]
    # A run of another name cannot resume one that is over, whatever it changes; another message says that.
    if in_vain and (in_place or position.index is not None):
        listed = "; ".join(f"{each}, but {why}" for each, why in in_vain[:5])
        raise CheckpointError(f"{listed}: that would change nothing after {folder.name}; leave it as it was")
    before = History.from_json(state.get("history"))
    if not in_place:
        before = replace(before, command=config.command, origin=str(folder))
    return before.after(state["step"], found)


def as_of_today(written: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration, with today's defaults where it had none.

    Raises:
        ValidationError: It is of another version.
    """
    # Some values are of types that JSON has not, such as tuples.
    return RunConfig.model_validate(json.loads(json.dumps(written))).model_dump(mode="json", exclude_none=True)


def differences_from(before: Mapping[str, Any], config: RunConfig) -> list[ConfigDifference]:
    """How a configuration differs from one as plain data."""
    return config_differences(before, config.model_dump(mode="json", exclude_none=True))
