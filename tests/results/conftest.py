"""Shared by the tests of reports: a small real run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mtl.results.report.write import write_report
from mtl.training.run import train
from runs import tiny_parts


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The directory of a run that has ended, with its report and its picture."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        setup = tiny_parts(folder, "audit.gradients_every_steps=2", "checkpoint.keep_every_epochs=1")
        run_dir = train(setup, quiet=True).run_dir
        write_report(setup, run_dir, folder / "picture.png")
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """The directory of a copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "runs/tiny", symlinks=True))
