"""Shared by all tests: no network, no wandb unless a test asks for it, data caches of their own, one thread count."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# How long an example takes says nothing of the code, and a lot of what else the machine does.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data cache for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache_dir: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTL_CACHE_DIR", str(cache_dir))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    # What is printed is not wrapped to the width of whoever runs the tests.
    monkeypatch.delenv("COLUMNS", raising=False)
    # wandb's own process may be long in coming where others want the processor, too.
    monkeypatch.setenv("WANDB_X_SERVICE_WAIT", "300")
    torch.manual_seed(0)
    # The command line takes the logger over for its process; every test has it as it was.
    logger = logging.getLogger("mtl")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
