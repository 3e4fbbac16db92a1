"""Values of Parquet, Arrow and JSON as the text that a table's cell would hold."""

from __future__ import annotations

import math
from typing import Any


def cell_of(value: Any, empty_list: str = "") -> str:
    """The text of a value: nothing for none and NaN, 1 and 0 for true and false, `;` between the entries of a list.

    Args:
        value: Text, a number, a list of them, or a list of lists of numbers.
        empty_list: The text of a list without entries.

    Raises:
        TypeError: It is none of these; the message names its type.
    """
    if isinstance(value, list):
        return ";".join(map(_entry, value)) if value else empty_list
    return _scalar(value)


def _entry(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_scalar, value))
    text = _scalar(value)
    if ";" in text:
        raise TypeError(f"a list with the entry {text!r}, which has a semicolon")
    return text


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool | int):
        return str(int(value))
    if isinstance(value, float):
        return repr(value)
    raise TypeError(type(value).__name__)
