"""States of balancing methods, as checkpoints have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_same_method(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a state is that of another method."""
    if own.keys() != state.keys():
        raise ValueError(f"expected the state of a balancing method with {sorted(own)}, got {sorted(state)}")
