"""States of balancing methods, as checkpoints have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl.checkpoint.nested import split
from mtl.config import SettingError


def check_same_method(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a state is that of another method."""
    if own.keys() != state.keys():
        raise ValueError(f"expected the state of a balancing method with {sorted(own)}, got {sorted(state)}")


def check_state(method: str, state: Mapping[str, Any]) -> None:
    """Raises `SettingError` if a checkpoint cannot hold the state of a method of the user's own.

    Args:
        method: As the configuration names it.
        state: The attributes that are its state, by name.
    """
    for name, value in state.items():
        try:
            split({name: value})
        except TypeError as error:
            why = str(error).removeprefix("optimizer state ")
            kept = "numbers, text, None and tensors, lists and dicts of them, or get_state() of a random generator"
            message = f"{method}: a checkpoint cannot hold its attribute {name!r} ({why}); keep {kept}"
            raise SettingError("balance.method", message) from error
