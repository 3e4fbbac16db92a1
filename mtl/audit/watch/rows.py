"""Rows of a tensor in a pattern: `heads.cls.fc.weight[0:10]`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from mtl.audit.watch.places import is_readable
from mtl.patterns import PatternError, PatternLike, select, text_of

_ROWS = re.compile(r"(?P<body>[^!~].*)\[(?P<rows>-?\d+|-?\d*:-?\d*)\]")


def split_rows(
    patterns: Sequence[PatternLike], lengths: Mapping[str, int]
) -> tuple[list[PatternLike], dict[str, list[slice]]]:
    """Separates patterns that name rows of tensors from all others.

    `name[0:10]` means rows if `name` (or a glob with no `**`) is the full name of a tensor; of a module, it means its
    children by position, and stays among the others.

    Args:
        patterns: Patterns.
        lengths: Names of tensors with the lengths of their first axes; 0 for one without axes.

    Returns:
        The other patterns, and the named rows by tensor.

    Raises:
        PatternError: A tensor has no such rows.
    """
    others: list[PatternLike] = []
    rows: dict[str, list[slice]] = {}
    for index, pattern in enumerate(patterns):
        written = _ROWS.fullmatch(text_of(pattern))
        named = _tensors_called(written["body"], list(lengths)) if written else []
        if written is None or not named:
            others.append(pattern)
            continue
        for name in named:
            chosen = _as_slice(written["rows"])
            length = lengths[name]
            if not range(length)[chosen]:
                raise PatternError(index, f"pattern {text_of(pattern)!r} selects no rows: {name} has {length} of them")
            # Python would clip such a slice; in a contract it is a mistake.
            if any(bound is not None and not -length <= bound <= length for bound in (chosen.start, chosen.stop)):
                raise PatternError(index, f"pattern {text_of(pattern)!r} goes past the end: {name} has {length} rows")
            rows.setdefault(name, []).append(chosen)
    return others, rows


def num_rows(tensor: Tensor | None) -> int:
    """The length of a tensor's first axis; 0 if there is none."""
    return tensor.shape[0] if tensor is not None and is_readable(tensor) and tensor.ndim else 0


def rows_in_words(name: str, rows: slice) -> str:
    """The name with its rows, as in a pattern: `weight[0:10]`."""
    start, stop = ("" if bound is None else bound for bound in (rows.start, rows.stop))
    return f"{name}[{start}:{stop}]"


def _tensors_called(body: str, names: Sequence[str]) -> list[str]:
    """The tensors that a pattern names themselves, not by a module around them."""
    if "**" in body or body.startswith(("re:", "type:")):
        return []
    try:
        matched = select([body], names).names
    except PatternError:
        return []
    return [name for name in matched if name.count(".") == body.count(".")]


def _as_slice(written: str) -> slice:
    if ":" not in written:
        first = int(written)
        return slice(first, first + 1 or None)
    start, stop = (int(bound) if bound else None for bound in written.split(":"))
    return slice(start, stop)
