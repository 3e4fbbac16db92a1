"""The numbers that published code bases print, computed as each of them does, under names such as `rmse@eigen`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mtl.config import SettingError
from mtl.tasks.base import Task
from mtl.tasks.metrics import Metrics
from mtl.tasks.protocols import astmt, eigen, invpt, mtan

# Of each protocol by the task types that it measures, what makes its metrics for such a task.
_PROTOCOLS: Mapping[str, Mapping[type[Task], Callable[[Any], Metrics]]] = {
    "mtan": mtan.METRICS,
    "astmt": astmt.METRICS,
    "invpt": invpt.METRICS,
    "eigen": eigen.METRICS,
}


def add_protocol(tasks: Mapping[str, Task], protocol: str | None) -> None:
    """Adds a protocol's metrics to the tasks that it measures.

    Raises:
        SettingError: It measures none of them.
    """
    if protocol is None:
        return
    made = [
        (task, make) for task in tasks.values() for kind, make in _PROTOCOLS[protocol].items() if type(task) is kind
    ]
    if not made:
        kinds = ", ".join(kind.__name__.lower() for kind in _PROTOCOLS[protocol])
        raise SettingError("evaluate.protocol", f"{protocol} measures tasks of the types {kinds}, and there is none")
    for task, make in made:
        added: Sequence[Callable[[], Metrics]] = [*task.added, partial(make, task)]
        task.added = added
