"""Compares two checkpoints: which tensors kept every bit, and what could not be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mtl.audit.watch.change_size import size_of_change
from mtl.audit.watch.frozen_tensor import packed
from mtl.audit.watch.places import is_sparse
from mtl.audit.watch.rows import num_rows, rows_in_words, split_rows
from mtl.checkpoint.tensor_file import LeftOut, read_contents
from mtl.patterns import PatternError, PatternLike, select
from mtl.runtime.fingerprint import fingerprint, fingerprint_of_file
from mtl.runtime.text import count

Kind = Literal["value", "shape", "dtype", "missing", "new"]
# A checkpoint's content under one name.
Content = Tensor | LeftOut


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs between two checkpoints.

    Attributes:
        name: Its name.
        kind: `value`, `shape`, `dtype`; `missing` from the second, or `new` in it.
        max_abs: The largest absolute difference of two elements; NaN if one of them is NaN; None if not computed.
        share: The share of elements whose bits differ, 0 to 1; None if not computed.
    """

    name: str
    kind: Kind
    max_abs: float | None = None
    share: float | None = None

    def __str__(self) -> str:
        words = {
            "value": "changed",
            "shape": "has another shape",
            "dtype": "has another type or layout",
            "missing": "is missing from the second",
            "new": "is only in the second",
        }
        size = "" if self.max_abs is None else f" by up to {self.max_abs:.3g}, in {self.share:.1%} of its elements"
        return f"{self.name}: {words[self.kind]}{size}"


@dataclass(frozen=True)
class NotCompared:
    """A selected entry of the checkpoints that could not be compared.

    Attributes:
        name: Its name.
        reason: What it is, or why it was not read.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: not compared: {self.reason}"


@dataclass(frozen=True)
class CheckpointComparison:
    """The result of a comparison.

    Attributes:
        num_identical: Tensors that are equal bit for bit.
        differences: The others, in the order of the first checkpoint.
        left_out: Entries that were not compared.
        notes: Which tensors were read as the weights of each checkpoint, one sentence each.
        num_plain: Numbers, text and the like next to the tensors, which are not compared.
    """

    num_identical: int
    differences: tuple[TensorDifference, ...]
    left_out: tuple[NotCompared, ...] = ()
    notes: tuple[str, ...] = ()
    num_plain: int = 0

    @property
    def ok(self) -> bool:
        return not self.differences and not self.left_out

    @property
    def is_broken(self) -> bool:
        """Whether something is not the same."""
        return bool(self.differences)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "identical": self.num_identical,
            "changed": [asdict(each) for each in self.differences],
            "left_out": [asdict(each) for each in self.left_out],
            "notes": list(self.notes),
            "plain_values": self.num_plain,
        }

    def __str__(self) -> str:
        lines = [*self.notes, *(f"  {each}" for each in (*self.differences, *self.left_out))]
        verdict = [f"{len(self.differences)} not as frozen"] if self.differences else []
        verdict += [f"{len(self.left_out)} not compared"] if self.left_out else []
        same = f"{count(self.num_identical, 'tensor')} {'is' if self.num_identical == 1 else 'are'} the same to the bit"
        plain = f"; {count(self.num_plain, 'plain value')} next to them not compared" if self.num_plain else ""
        return "\n".join([*lines, f"audit: {', '.join(verdict) or 'clean'}; {same}{plain}"])


_EVERYTHING = "**"


def compare_checkpoints(first: Path, second: Path, freeze: Sequence[str] = (_EVERYTHING,)) -> CheckpointComparison:
    """Compares two checkpoints of any form, as `compare`.

    Patterns select among the weights; if one selects none of them, all select among the entire checkpoints, as `**`
    always does: `trunk` is the trunk, whatever optimizer state has such a name.

    Raises:
        UnreadableError: A checkpoint cannot be read.
        PatternError: As `compare`.
    """
    one, other = read_contents(first), read_contents(second)
    notes = tuple(f"{path}: {each}" for path, each in ((first, one), (second, other)) if str(each))
    if _EVERYTHING not in freeze:
        try:
            return replace(compare(one.weights, other.weights, freeze), notes=notes)
        except PatternError:
            # Patterns that select nothing at all get the message of the comparison below.
            pass
    num_plain = max(one.num_plain, other.num_plain)
    return replace(compare(one.everything, other.everything, freeze), notes=notes, num_plain=num_plain)


def compare(
    first: Mapping[str, Content], second: Mapping[str, Content], freeze: Sequence[PatternLike] = (_EVERYTHING,)
) -> CheckpointComparison:
    """Compares the tensors that patterns select, bit for bit.

    NaN equals NaN of the same bits, and -0.0 does not equal 0.0: a freeze promises to keep bits.

    Args:
        first: Tensors by name, before, and entries that were not read as tensors.
        second: The same, after.
        freeze: Patterns of tensors that must be equal; without a module tree, they cannot name positions, depth groups
            and classes.

    Raises:
        PatternError: A pattern cannot be read, or selects nothing.
    """
    names = list(dict.fromkeys([*first, *second]))
    lengths = {name: min(_num_rows(parts.get(name)) for parts in (first, second)) for name in names}
    full_patterns, rows = split_rows(freeze, lengths)
    chosen = dict.fromkeys(select(full_patterns, names).names)
    pairs = [(name, first.get(name), second.get(name)) for name in chosen]
    for name, slices in rows.items():
        one, other = first[name], second[name]
        assert isinstance(one, Tensor) and isinstance(other, Tensor), "only tensors have rows"
        if name not in chosen:
            pairs += [(rows_in_words(name, each), one[each], other[each]) for each in slices]
    if not pairs:
        raise PatternError(len(freeze) - 1, "the patterns select nothing in the end: there is nothing to compare")
    found = [difference for pair in pairs if (difference := _difference(*pair))]
    differences = tuple(each for each in found if isinstance(each, TensorDifference))
    left_out = tuple(each for each in found if isinstance(each, NotCompared))
    return CheckpointComparison(len(pairs) - len(found), differences, left_out)


def _difference(name: str, before: Content | None, after: Content | None) -> TensorDifference | NotCompared | None:
    for one, other in ((before, after), (after, before)):
        if isinstance(one, LeftOut):
            return None if _is_same_file(one, other) else NotCompared(name, one.reason)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return TensorDifference(name, "new" if before is None else "missing")
    if before.shape != after.shape:
        return TensorDifference(name, "shape")
    if before.dtype != after.dtype or before.layout != after.layout:
        return TensorDifference(name, "dtype")
    if is_sparse(before):
        return None if fingerprint(packed(before)) == fingerprint(packed(after)) else TensorDifference(name, "value")
    if fingerprint(before) == fingerprint(after):
        return None
    try:
        size = size_of_change(before, after)
    except NotImplementedError:
        # Of some dtypes of a few bits, torch can only read the bytes.
        return TensorDifference(name, "value")
    return TensorDifference(name, "value", size.max_abs, size.share)


def _num_rows(part: Content | None) -> int:
    return num_rows(part) if isinstance(part, Tensor) and not is_sparse(part) else 0


def _is_same_file(one: LeftOut, other: Content | None) -> bool:
    """Whether both are files, with the same bytes."""
    if not isinstance(other, LeftOut) or one.file is None or other.file is None:
        return False
    return fingerprint_of_file(one.file) == fingerprint_of_file(other.file)
