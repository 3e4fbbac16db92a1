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


def check_state(method: str, new: Mapping[str, Any], used: Mapping[str, Any]) -> None:
    """Raises `SettingError` if a checkpoint cannot hold the state of a method of the user's own, or give it back.

    Args:
        method: As the configuration names it.
        new: The attributes that are its state, by name, of a new one.
        used: The same after a call.
    """
    if later := sorted(used.keys() ^ new.keys()):
        raise SettingError(
            "balance.method",
            f"{method}: its attribute {later[0]!r} is first set, or deleted, in a call; set it in __init__: a resumed"
            " run restores the attributes that a new object has",
        )
    for name, value in used.items():
        try:
            split({name: value})
        except TypeError as error:
            why = str(error).removeprefix("optimizer state ")
            kept = "numbers, text, None and tensors, lists and dicts of them, or get_state() of a random generator"
            message = f"{method}: a checkpoint cannot hold its attribute {name!r} ({why}); keep {kept}"
            raise SettingError("balance.method", message) from error
