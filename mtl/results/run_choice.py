"""A run's directory, read: its configuration, and the checkpoint whose weights are meant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtl.checkpoint.files import CheckpointError
from mtl.checkpoint.run_files import AUDIT, CONFIG, RunFileError, read_audit
from mtl.checkpoint.trained_run import find_checkpoint
from mtl.config import RunConfig, load_config
from mtl.runtime.text import hint
from mtl.training.data_record import search_as_the_run_did


def read_run(run_dir: Path, overrides: Sequence[str] = (), data_of: Path | None = None) -> RunConfig:
    """The configuration of a run, with the modules of the user's own found as they were.

    Args:
        run_dir: The run's directory.
        overrides: Other values of settings, as on the command line.
        data_of: A configuration whose data set takes the place of the run's.

    Raises:
        RunFileError: It is no run's directory.
        ConfigError: The configuration does not work here.
    """
    if not (run_dir / CONFIG).is_file():
        is_there = run_dir.parent.is_dir()
        runs = sorted(each.parent.name for each in run_dir.parent.glob(f"*/{CONFIG}")) if is_there else []
        raise RunFileError(f"{run_dir} is no run: it has no {CONFIG}{hint(run_dir.name, runs)}")
    search_as_the_run_did(run_dir)
    return load_config(run_dir / CONFIG, overrides, data_of)


def checkpoint_of(run_dir: Path, which: str | int | None) -> Path:
    """The folder of a checkpoint.

    Args:
        run_dir: The run's directory.
        which: `best`, `last`, the number of a step, or None for the best one, or the last one of a run without a score.

    Raises:
        CheckpointError: There is no such checkpoint; or the run is not finished, and `which` is None.
    """
    folder = find_checkpoint(run_dir, which)
    if which is None and (reason := _why_unfinished(run_dir)):
        raise CheckpointError(
            f"{run_dir} is not finished: {reason}; resume it with resume=auto, or take what there is with"
            f" --which {folder.name}, in Python which={folder.name!r}"
        )
    return folder


def _why_unfinished(run_dir: Path) -> str:
    """Why a run is not finished; empty if it is."""
    if not (run_dir / AUDIT).is_file():
        return f"it has no {AUDIT}, which is written at its end"
    phases = read_audit(run_dir / AUDIT)["phases"]
    done = [phase["name"] for phase in phases if phase["completed"]]
    planned = [written.config.name for written in load_config(run_dir / CONFIG).written_phases]
    left = [name for name in planned if name not in done]
    return f"phase {left[0]!r} did not end" if left else ""
