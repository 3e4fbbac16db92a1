"""The record that a run keeps of its data, so that a resumed run detects edited images and labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from mtl.checkpoint.run_files import DATA, RunFileError, read_data_record
from mtl.runtime.plugin import search_in, searched_folders
from mtl.training.setup import RunSetup


def data_record(setup: RunSetup) -> dict[str, Any]:
    """Name, sizes and classes of the data set, digests of images and labels, folders of modules; as JSON.

    And what decides the form of the model besides the configuration, so that it can be built without the data.
    """
    splits = {"train": setup.train, "val": setup.val}
    return {
        "name": setup.config.data.name,
        "modules": searched_folders(),
        "images": {which: len(split) for which, split in splits.items()},
        "channels": setup.source.channels,
        "classes": {label: list(names) for label, names in setup.source.classes.items()},
        "tasks": {
            name: {
                "classes": list(task.class_names),
                "num_outputs": task.num_outputs,
                # JSON's numbers are float64: nothing of a float32 is lost.
                "constant": _numbers(setup.constants[name]) if name in setup.constants else None,
            }
            for name, task in setup.tasks.items()
        },
        "digests": {
            which: {
                "images": split.identity(),
                **{f"labels of {task}": split.label_identity(task) for task in setup.labelled},
            }
            for which, split in splits.items()
        },
    }


def _numbers(constant: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in constant.tolist()]


def search_as_the_run_did(run_dir: Path) -> None:
    """Has modules of the user's own found where the run has found them; nothing if the run does not say."""
    try:
        folders = read_data_record(run_dir / DATA).get("modules", [])
    except RunFileError:
        return
    for folder in folders:
        search_in(Path(folder))


def what_was_edited(run_dir: Path, now: dict[str, Any]) -> list[str]:
    """Differences between the data now and when a run began; empty if there are none, or the run has no record.

    Args:
        run_dir: The run's directory.
        now: The data of today.
    """
    try:
        before = read_data_record(run_dir / DATA)["digests"]
    except RunFileError:
        return []
    pairs = (
        (f"{name}, {which}", digest, before.get(which, {}).get(name))
        for which, digests in now["digests"].items()
        for name, digest in digests.items()
    )
    return [what for what, digest, old in pairs if digest is not None and old is not None and digest != old]
