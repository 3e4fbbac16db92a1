"""Whether all ranks of a run have the same tensors.

It compares the bytes of frozen tensors and of trainable parameters, by every name: ranks exchange one digest for each
of the two groups, and one for every tensor only if these differ. Of a sharded tensor (FSDP2), it compares name, dtype,
shape and placement, and the bytes only if it is replicated. Plain tensor attributes are excluded, since a module may
keep a result of its last batch there. Every rank records the violations of all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtl.audit.report import Violation
from mtl.audit.watch import causes
from mtl.audit.watch.contract import Contract
from mtl.audit.watch.frozen_tensor import packed
from mtl.audit.watch.places import TensorPlace, is_readable, is_sparse
from mtl.runtime.fingerprint import fingerprint, root
from mtl.runtime.tensors import local
from mtl.runtime.text import shorten

# The digest of a tensor that a rank does not have.
_NONE = ""


@dataclass(frozen=True)
class RankDifference:
    """A tensor that is not the same on all ranks.

    Attributes:
        name: Its name.
        is_frozen: Whether it is frozen.
        detail: Which ranks differ, and in what.
    """

    name: str
    is_frozen: bool
    detail: str

    @property
    def cause(self) -> str:
        """The most likely cause, with the fix."""
        return causes.FROZEN_DIFFERS if self.is_frozen else causes.TRAINED_DIFFERS


def compare_ranks(
    contract: Contract, found: Sequence[Violation], group: dist.ProcessGroup | None, buffers: bool
) -> tuple[list[RankDifference], list[Violation]]:
    """Compares the tensors of a contract on all ranks; every rank calls it and gets the same result.

    Args:
        contract: The phase's contract.
        found: This rank's violations in the phase so far.
        group: The ranks; all of them by default.
        buffers: Whether to compare buffers that are not frozen, too.

    Returns:
        The tensors that differ, and the violations of all ranks.
    """
    if num_ranks(group) == 1:
        return [], []
    frozen = _digests([place for place in contract.frozen if place.kind != "attr"])
    kinds = ("param", "buffer") if buffers else ("param",)
    free = _digests([place for place in contract.free if place.kind in kinds])
    names = {f"{each.kind} {each.name}": "" for each in found}
    mine = torch.frombuffer(bytearray.fromhex(root(frozen) + root(free) + root(names)), dtype=torch.uint8)
    roots = [torch.empty_like(mine) for _ in range(num_ranks(group))]
    dist.all_gather(roots, mine, group)
    if all(torch.equal(each, roots[0]) for each in roots):
        return [], []
    everyone: list[Any] = [None] * len(roots)
    dist.all_gather_object(everyone, (frozen, free, list(found)), group)
    differing = [
        difference
        for side in (0, 1)
        for difference in differences([content[side] for content in everyone], is_frozen=side == 0)
    ]
    return differing, [
        replace(each, detail=f"{each.detail}, on rank {rank}")
        for rank, (_, _, theirs) in enumerate(everyone)
        for each in theirs
    ]


def found_anywhere(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether a flag is set on any rank, such as after an `AuditError`; every rank calls it."""
    if num_ranks(group) == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group)
    return bool(flags.item())


def num_ranks(group: dist.ProcessGroup | None) -> int:
    """The number of ranks; 1 if torch.distributed is not initialized."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def differences(digests: Sequence[Mapping[str, str]], is_frozen: bool) -> Iterator[RankDifference]:
    """The tensors that differ, and the ranks that differ from the majority, or else from rank 0.

    Args:
        digests: Of every rank, its tensors' digests by name, in the form of `_digest`.
        is_frozen: Whether these tensors are frozen.
    """
    for name in dict.fromkeys(name for each in digests for name in each):
        held = [each.get(name, _NONE) for each in digests]
        if len(set(held)) > 1:
            yield RankDifference(name, is_frozen, _which_ranks_differ(held))


def _which_ranks_differ(held: Sequence[str]) -> str:
    most, times = Counter(held).most_common(1)[0]
    is_majority = 2 * times > len(held)
    right = most if is_majority else held[0]
    reasons: dict[str, list[str]] = {}
    for rank, digest in enumerate(held):
        if digest != right:
            reasons.setdefault(_reason(digest, right), []).append(str(rank))
    whom = "the other ranks" if is_majority else "rank 0"
    return "; ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {shorten(ranks, 8)} of {len(held)}"
        f" {'has' if len(ranks) == 1 else 'have'} {reason} {whom}"
        for reason, ranks in reasons.items()
    )


def _reason(digest: str, right: str) -> str:
    if digest == _NONE:
        return "no such tensor, unlike"
    if right == _NONE:
        return "a tensor here, unlike"
    (what, _), (right_what, _) = digest.split("|"), right.split("|")
    return "other bytes than" if what == right_what else f"{what} in place of the {right_what} of"


def _digests(places: Sequence[TensorPlace]) -> dict[str, str]:
    """Each tensor's digest by every name."""
    known: dict[tuple[int, str], str] = {}
    found = {}
    for place in places:
        if (tensor := place.current()) is not None:
            key = (id(tensor), str(place.rows))
            if key not in known:
                known[key] = _digest(tensor, place.rows)
            found[place.name] = known[key]
    return found


def _digest(tensor: Tensor, rows: slice | None) -> str:
    """`dtype shape placement|fingerprint` of a tensor; without the fingerprint if ranks have different shards."""
    if not is_readable(tensor):
        return f"{type(tensor).__name__}|"
    what = f"{tensor.dtype} {tuple(tensor.shape)}"
    sharded: Any = tensor
    placements = getattr(sharded, "placements", None)
    if placements is not None:
        what += f" {placements} on {tuple(sharded.device_mesh.shape)}"
        if not all(placement.is_replicate() for placement in placements):
            return f"{what}|"
    here = local(tensor)
    if is_sparse(here):
        return f"{what}|{fingerprint(packed(here))}"
    return f"{what}|{fingerprint(here if rows is None else here[rows])}"
