"""Whether all configurations of a comparison can be trained, before the first one is."""

from __future__ import annotations

from collections.abc import Iterable

from mtl.config import ConfigError
from mtl.data import DataError
from mtl.phases.setup import build_meta_setup
from mtl.results.comparison.design import DesignError, Job
from mtl.runtime.uncompiled import without_compiler


def check_models(jobs: Iterable[Job]) -> None:
    """Builds model and phases of each configuration, without weights and images.

    Raises:
        DesignError: One cannot be built; names the run and the mistake.
    """
    known = set[tuple[str, tuple[str, ...], str | None]]()
    for job in jobs:
        if (key := (job.method, job.setting, job.task)) not in known:
            known.add(key)
            try:
                with without_compiler():
                    build_meta_setup(job.config)
            except (ConfigError, DataError) as error:
                raise DesignError(f"{job.name}: {error}") from error
