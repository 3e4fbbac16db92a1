"""Two checkpoints side by side: which tensors kept every bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from mtl.audit.difference import size_of_change
from mtl.audit.fingerprint import fingerprint
from mtl.audit.rows import num_rows, rows_in_words, split_rows
from mtl.patterns import PatternLike, select

Kind = Literal["value", "shape", "dtype", "missing", "new"]


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in both.

    Attributes:
        name: Its name.
        kind: `value`, `shape`, `dtype`; `missing` from the second, or `new` in it.
        max_abs: The largest difference of two elements; NaN if one of them is not a number; None if none was taken.
        share: The share of elements whose bits differ; None if none was taken.
    """

    name: str
    kind: Kind
    max_abs: float | None = None
    share: float | None = None

    def __str__(self) -> str:
        if self.kind == "value":
            return f"{self.name}: changed by up to {self.max_abs:.3g}, in {self.share:.1%} of its elements"
        words = {"shape": "has another shape", "dtype": "has another type", "missing": "is missing from the second"}
        return f"{self.name}: {words.get(self.kind, 'is only in the second')}"


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        num_identical: Tensors that are the same to the bit.
        differences: The others, in the order of the first checkpoint.
    """

    num_identical: int
    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "identical": self.num_identical, "changed": [asdict(d) for d in self.differences]}


def compare(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], freeze: Sequence[PatternLike] = ("**",)
) -> Comparison:
    """Compares the tensors that patterns select, bit for bit.

    NaN equals NaN of the same bits, and -0.0 does not equal 0.0: it is bits that a freeze promises to keep.

    Args:
        first: Tensors by name, before.
        second: Tensors by name, after.
        freeze: Patterns of what has to be the same; there is no module tree, so that positions, depth groups and
            classes cannot be named.

    Raises:
        PatternError: A pattern cannot be read, or selects nothing.
    """
    names = list(dict.fromkeys([*first, *second]))
    lengths = {name: min(num_rows(tensors.get(name)) for tensors in (first, second)) for name in names}
    whole, rows = split_rows(freeze, lengths)
    chosen = dict.fromkeys(select(whole, names).names)
    pairs = [(name, first.get(name), second.get(name)) for name in chosen]
    for name, parts in rows.items():
        if name not in chosen:
            pairs += [(rows_in_words(name, part), first[name][part], second[name][part]) for part in parts]
    found = [difference for pair in pairs if (difference := _difference(*pair))]
    return Comparison(len(pairs) - len(found), tuple(found))


def _difference(name: str, before: Tensor | None, after: Tensor | None) -> Difference | None:
    if before is None or after is None:
        return Difference(name, "new" if before is None else "missing")
    if before.shape != after.shape:
        return Difference(name, "shape")
    if before.dtype != after.dtype:
        return Difference(name, "dtype")
    if fingerprint(before) == fingerprint(after):
        return None
    size = size_of_change(before, after)
    return Difference(name, "value", size.max_abs, size.share)
