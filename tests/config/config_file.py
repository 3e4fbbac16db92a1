"""A configuration of given lines, and the mistakes in it.

Every test runs in a directory of its own (conftest), so that places read `run.yaml:3`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl.config import ConfigError, RunConfig, load_config

RUN = Path("run.yaml")


def load(lines: list[str], *overrides: str) -> RunConfig:
    RUN.write_text("\n".join(lines) + "\n")
    return load_config(RUN, overrides)


def mistakes(lines: list[str], *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(lines, *overrides)
    return caught.value.mistakes
