"""A run that was trained, opened for reading: which checkpoint, with what configuration, and its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from mtl.checkpoint.files import CheckpointError, read_state
from mtl.checkpoint.load import newest_first, read_weights, step_of
from mtl.checkpoint.run_files import DATA, RunFileError, read_data_record
from mtl.config import RunConfig
from mtl.config.mixed import MixedData
from mtl.runtime.text import hint, shorten


@dataclass(frozen=True)
class TrainedRun:
    """One checkpoint of a run.

    Attributes:
        folder: The run's directory.
        checkpoint: The checkpoint's folder, by its step.
        which: `best`, `last` or the step, as it was chosen.
        state: Its `state.json`.
        config: The configuration that it was written with.
    """

    folder: Path
    checkpoint: Path
    which: str
    state: Mapping[str, Any]
    config: RunConfig

    @property
    def step(self) -> int:
        """Optimizer steps done before it."""
        return int(self.state["step"])

    @property
    def is_at_end(self) -> bool:
        """Whether no phase that trains was left after this checkpoint."""
        left = self.config.written_phases[self.state["scheduler"]["index"] :]
        return all(phase.config.evaluate_only for phase in left)

    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by name, tied ones under each of their names; averages if the run kept them.

        Raises:
            DamagedCheckpoint: They are not those that were written.
        """
        return read_weights(self.checkpoint)[1]

    def class_names(self, task: str) -> Sequence[str]:
        """The names of a task's classes in order; empty if it has none, or the run does not say."""
        own = self.config.tasks[task]
        if own.unlabelled:
            return getattr(own, "class_names", None) or ()
        try:
            classes = read_data_record(self.folder / DATA).get("classes", {})
        except RunFileError:
            return ()
        label = own.label or task
        # Of several data sets, those of a task have the same classes.
        data = self.config.data
        sets = own.data or (list(data.sets) if isinstance(data, MixedData) else [])
        places = [label, *(f"{name}/{label}" for name in sets)]
        return next((classes[place] for place in places if classes.get(place)), ())


def find_checkpoint(folder: Path, which: str | int | None = None) -> Path:
    """The folder of a checkpoint, or the link to it.

    Args:
        folder: The run's directory.
        which: `best`, `last` or a step; the best if not given, or the last if no validation gave a score.

    Raises:
        CheckpointError: There is none; names those that there are.
    """
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        what = "has no checkpoints" if folder.is_dir() else "is not there"
        raise CheckpointError(f"{folder} {what}; expected the directory of a run, such as runs/scenes")
    # Where links were copied as folders, there may be no others.
    there = [name for name in ("best", "last") if (checkpoints / name).is_dir()]
    there += [str(step_of(each)) for each in newest_first(checkpoints)]
    if not there:
        raise CheckpointError(f"{folder} has no checkpoint yet; its first one comes with its first validation")
    if which is None:
        which = "best" if "best" in there else "last"
    link = checkpoints / (f"step-{int(which):08d}" if str(which).isdecimal() else str(which))
    if not link.is_dir():
        none = ": no validation gave a score" if which == "best" else ""
        raise CheckpointError(
            f"{folder} has no checkpoint {which}{none}; there are: {shorten(there, 5)}{hint(str(which), there)}"
        )
    return link


def open_trained_run(folder: Path, which: str | int | None = None) -> TrainedRun:
    """Opens a checkpoint of a run.

    Args:
        folder: The run's directory.
        which: `best`, `last` or a step; the best if not given, or the last if no validation gave a score.

    Raises:
        CheckpointError: There is none, it is damaged, or is of another version.
    """
    link = find_checkpoint(folder, which)
    state = read_state(link)
    try:
        config = RunConfig.model_validate(state["config"])
        # By its step where it is one of these, so that the record still holds when a link has moved on.
        own = link.parent / link.resolve().name
        checkpoint = own if own in newest_first(link.parent) else link
        found = TrainedRun(folder, checkpoint, link.name if which is None else str(which), state, config)
        assert isinstance(found.is_at_end, bool)
    except (ValidationError, KeyError, TypeError) as error:
        raise CheckpointError(f"{link} is of another version") from error
    return found
