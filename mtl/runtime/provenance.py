"""Versions, and the commit of the code, that a run was made with."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mtl.runtime.version import __version__

_PACKAGES = ("torch", "torchvision", "timm", "torchjd", "numpy", "safetensors")


@cache
def provenance() -> dict[str, Any]:
    """Versions of what the numbers depend on, and the commit that the code was taken from, if it is a checkout.

    Asked once a process: it is written into every checkpoint, and git takes some hundredths of a second.
    """
    versions = {"mtl": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"versions": versions, "git_commit": _commit()}


def _commit() -> str | None:
    """The commit of the checkout that this package is in, with a `+` if something of it was changed since."""
    try:
        folder = Path(__file__).parents[1]
        # Installed into an environment, it may lie inside a checkout of something else.
        _git(folder, "ls-files", "--error-unmatch", str(Path(__file__).relative_to(folder)))
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
