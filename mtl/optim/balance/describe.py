"""What a balancing method is run with, in words: the options that it has, given or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl.config.optim import BalanceConfig
from mtl.config.own import is_own
from mtl.optim.balance.build import NAMES_OF_TASKS, is_by_gradients, scalarizers
from mtl.optim.balance.presets import with_preset
from mtl.optim.balance.torchjd_state import options_of


def options_in_use(config: BalanceConfig) -> dict[str, Any]:
    """The options of a method of a configuration that can be built, with those that it takes by default or by a preset.

    None of a method of the user's own, which are in its code. Of a method around another one, those of both.
    """
    method = config.method.lower()
    if is_own(config.method) or method == "fixed":
        return dict(config.options)
    if is_by_gradients(method):
        from mtl.optim.balance.gradient_methods import method_options

        defaults = method_options(method)
    else:
        defaults = {n: value for n, value in options_of(scalarizers()[method]).items() if n not in NAMES_OF_TASKS}
    used = {**defaults, **with_preset(method, config.preset, config.options)}
    if method == "crmogm":
        inner = BalanceConfig(method=used["method"], options=used["options"] or {})
        used["options"] = options_in_use(inner) or None
    return {name: value for name, value in used.items() if value is not None}


def settings_in_use(config: BalanceConfig) -> str:
    """The same and where the method looks, in one line: `alpha 1.5, lr 0.025, warmup_steps 50, on features`."""
    used = options_in_use(config) | {"weights": config.weights, "preset": config.preset}
    if config.on != "parameters":
        used["on"] = config.on if isinstance(config.on, str) else config.on.layer
        used["per_sample"] = config.per_sample or None
    return _listed({name: value for name, value in used.items() if value is not None})


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_listed(value)})"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
