"""Multi-task learning with a shared trunk, task heads, and freezes that are declared, enforced and proven.

The names below are imported when they are first used: `import mtl` itself loads neither torch nor anything else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mtl.runtime.version import __version__

if TYPE_CHECKING:
    from mtl.audit import GradientAudit, attach
    from mtl.cli.train import train_config as train
    from mtl.freeze import enforce, plan_freeze
    from mtl.optim.balance.task_weights import TaskWeights
    from mtl.phases.scheduler import TaskScheduler
    from mtl.results.trained import load

__all__ = [
    "GradientAudit",
    "TaskScheduler",
    "TaskWeights",
    "__version__",
    "attach",
    "enforce",
    "load",
    "plan_freeze",
    "train",
]

_PLACES = {
    "GradientAudit": ("mtl.audit", "GradientAudit"),
    "TaskScheduler": ("mtl.phases.scheduler", "TaskScheduler"),
    "TaskWeights": ("mtl.optim.balance.task_weights", "TaskWeights"),
    "attach": ("mtl.audit", "attach"),
    "enforce": ("mtl.freeze", "enforce"),
    "load": ("mtl.results.trained", "load"),
    "plan_freeze": ("mtl.freeze", "plan_freeze"),
    "train": ("mtl.cli.train", "train_config"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        from mtl.runtime.text import hint

        raise AttributeError(f"module 'mtl' has no attribute {name!r}{hint(name, __all__)}")
    module, inside = _PLACES[name]
    found = globals()[name] = getattr(import_module(module), inside)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
