"""Whether the processes of a run (ranks) hold the same tensors.

Compared are the bytes of what is frozen and of the parameters that train, by every name; one digest of each side is
exchanged, and only if these differ one of every tensor. Of a tensor that is spread over processes (FSDP2), only what is
replicated can be compared: of a sharded one it is its name, type, shape and placement. Plain tensor attributes are
left out: a module may keep there what it made of its last batch. What one rank has found, all others record, too.
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
from mtl.audit.watch.places import Place, is_readable, is_sparse
from mtl.runtime.fingerprint import fingerprint, root
from mtl.runtime.tensors import local
from mtl.runtime.text import shorten

# The digest of a tensor that a rank does not have.
_NONE = ""


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same on all ranks.

    Attributes:
        name: Its name.
        is_frozen: Whether it is frozen.
        detail: Which ranks stand apart, and by what.
    """

    name: str
    is_frozen: bool
    detail: str

    @property
    def cause(self) -> str:
        """What most likely did it."""
        return causes.FROZEN_APART if self.is_frozen else causes.TRAINED_APART


def compare_ranks(
    contract: Contract, found: Sequence[Violation], group: dist.ProcessGroup | None, buffers: bool
) -> tuple[list[Difference], list[Violation]]:
    """Compares the tensors of a contract on all ranks; every rank calls it, and each gets the same answer.

    Args:
        contract: What is frozen, and what is not.
        found: What this rank has found in the phase so far.
        group: The ranks; all of them by default.
        buffers: Whether to compare buffers that are not frozen, too.

    Returns:
        The tensors that differ, and what was found on any rank.
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
    apart = [
        difference
        for side in (0, 1)
        for difference in differences([content[side] for content in everyone], is_frozen=side == 0)
    ]
    return apart, [
        replace(each, detail=f"{each.detail}, on rank {rank}")
        for rank, (_, _, theirs) in enumerate(everyone)
        for each in theirs
    ]


def found_anywhere(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether the flag is set on any rank, such as that an `AuditError` was raised; every rank calls it."""
    if num_ranks(group) == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group)
    return bool(flags.item())


def num_ranks(group: dist.ProcessGroup | None) -> int:
    """How many processes there are; one if there is no group of them."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def differences(digests: Sequence[Mapping[str, str]], is_frozen: bool) -> Iterator[Difference]:
    """The tensors that differ, and who stands apart: from the greater part of the ranks, or else from rank 0.

    Args:
        digests: Of every rank, its tensors' digests by name, each behind what the tensor is (see `_digest`).
        is_frozen: Whether these tensors are frozen.
    """
    for name in dict.fromkeys(name for each in digests for name in each):
        held = [each.get(name, _NONE) for each in digests]
        if len(set(held)) > 1:
            yield Difference(name, is_frozen, _who_stands_apart(held))


def _who_stands_apart(held: Sequence[str]) -> str:
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


def _digests(places: Sequence[Place]) -> dict[str, str]:
    """Each tensor's digest by every name."""
    known: dict[tuple[int, str], str] = {}
    found = {}
    for place in places:
        if (tensor := place.look()) is not None:
            key = (id(tensor), str(place.rows))
            if key not in known:
                known[key] = _digest(tensor, place.rows)
            found[place.name] = known[key]
    return found


def _digest(tensor: Tensor, rows: slice | None) -> str:
    """What a tensor is, and the fingerprint of its bytes; no fingerprint if no other rank is to have the same."""
    if not is_readable(tensor):
        return f"{type(tensor).__name__}|"
    what = f"{tensor.dtype} {tuple(tensor.shape)}"
    spread: Any = tensor
    placements = getattr(spread, "placements", None)
    if placements is not None:
        what += f" {placements} on {tuple(spread.device_mesh.shape)}"
        if not all(placement.is_replicate() for placement in placements):
            return f"{what}|"
    here = local(tensor)
    if is_sparse(here):
        return f"{what}|{fingerprint(packed(here))}"
    return f"{what}|{fingerprint(here if rows is None else here[rows])}"
