"""The run directory: free to be made, and made for one run alone."""

from __future__ import annotations

import os
from pathlib import Path

from mtl.config import RunConfig


def check_run_dir(config: RunConfig) -> None:
    """Raises `ConfigError` if the run directory is taken or cannot be made."""
    run_dir = config.run_dir
    if run_dir.exists() and not run_dir.is_dir():
        raise config.mistake(("name",), f"{run_dir} is a file; expected a directory, or nothing yet")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        number = 2
        while config.run_dir.with_name(f"{config.name}-{number}").exists():
            number += 1
        raise config.mistake(
            ("name",), f"{run_dir} already holds a run; give this one another name, such as name={config.name}-{number}"
        )
    parent = next(folder for folder in [run_dir, *run_dir.absolute().parents] if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise config.mistake(
            ("runs_dir",), f"{run_dir} cannot be made: {parent} is not a directory that you may write to"
        )


def make_run_dir(config: RunConfig) -> Path:
    """Makes the run directory and claims it: of two runs that start at once, one gets it.

    Raises:
        ConfigError: It cannot be made, or another run has it.
    """
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "config.yaml").touch(exist_ok=False)
    except FileExistsError as error:
        raise config.mistake(("name",), f"{config.run_dir} was taken by another run just now") from error
    except OSError as error:
        raise config.mistake(("runs_dir",), f"{config.run_dir} cannot be made: {error.strerror}") from error
    return config.run_dir
