"""A frozen tensor, and how it was when its phase began."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtl.audit.fingerprint import fingerprint
from mtl.audit.places import Place, is_sparse
from mtl.storage import bytes_of, is_spread, local, whole


class Watched:
    """A frozen tensor, or rows of one, as it was when the phase began.

    Attributes:
        place: Where it hangs.
        tensor: The whole tensor itself.
        original: A copy of what is frozen of it, on the host.
        digest: The fingerprint of that.
        whole_digest: The same of all processes' parts together, if it is spread over them and that was asked for.
        proven_at: The last step after which its bytes were found to be the first ones.
        known_at: The same, counting looks that the report is not to depend on.
        had_gradient: Whether it has had a gradient at any look.
    """

    def __init__(self, place: Place, tensor: Tensor, is_whole: bool = False) -> None:
        self.place = place
        self.tensor = tensor
        self.original = self.part().detach().to("cpu", copy=True)
        self.digest = self.whole_digest = fingerprint(self.original)
        if is_whole and is_spread(tensor):
            together = whole(tensor.detach())
            self.whole_digest = fingerprint(together if place.rows is None else together[place.rows])
        self.proven_at = 0
        self.known_at = 0
        self.had_gradient = False
        # Asked once: these are looked at in every step. Tensors of inference mode are not counted.
        self._has_address = not is_sparse(tensor) and local(tensor) is tensor
        self._is_counted = not tensor.is_inference()
        self.note_signs()

    def part(self) -> Tensor:
        """What is frozen of it; of a tensor that is spread over processes (FSDP), what is here."""
        here = local(self.tensor)
        if is_sparse(here):
            return packed(here)
        return here if self.place.rows is None else here[self.place.rows]

    def is_viewable(self) -> bool:
        """Whether its bytes can be read without bringing them in order first."""
        part = self.part()
        return (
            not is_sparse(self.tensor)
            and part.is_contiguous()
            and not part.is_conj()
            and not part.is_neg()
            and part.numel() > 0
        )

    def note_signs(self) -> None:
        """Takes the present address and version for those of the first bytes."""
        self._address, self._version = self._address_now(), self._version_now()

    def shows_a_sign(self) -> bool:
        """Whether it may have been written to: a reason to look at its bytes, not a verdict."""
        tensor = self.tensor
        if self._has_address and self._is_counted:
            return tensor.data_ptr() != self._address or tensor._version != self._version
        return self.was_moved() or self.was_written()

    def was_moved(self) -> bool:
        """Whether it lies elsewhere in memory than when the signs were noted."""
        return self._address_now() != self._address

    def was_written(self) -> bool:
        """Whether torch has counted a write since the signs were noted."""
        return self._version_now() != self._version

    def _address_now(self) -> int:
        """Where it lies; a sparse tensor lies in several places."""
        if self._has_address:
            return self.tensor.data_ptr()
        return 0 if is_sparse(self.tensor) else local(self.tensor).data_ptr()

    def _version_now(self) -> int:
        """How often it has been written to, as far as torch counts."""
        return self.tensor._version if self._is_counted else 0

    def is_original(self, content: Tensor, step: int) -> bool:
        """Compares bytes that were read after a step with the first ones."""
        if fingerprint(content) != self.digest:
            return False
        self.proven_at = max(self.proven_at, step)
        return True

    def state(self) -> dict[str, Any]:
        """What is known of it but its bytes, as plain data."""
        return {
            "proven_at": self.proven_at,
            "known_at": max(self.known_at, self.proven_at),
            "had_gradient": self.had_gradient,
            "was_moved": self.was_moved(),
            "was_written": self.was_written(),
        }

    def take_over(self, state: Mapping[str, Any], digest: str) -> None:
        """Goes on from what was known of it in another process, where its bytes were first those of a fingerprint."""
        self.digest = digest
        self.proven_at, self.known_at = state["proven_at"], state["known_at"]
        self.had_gradient |= state["had_gradient"]
        # No tensor has these: a sign that was not followed up yet is seen at the next look.
        if state["was_moved"]:
            self._address = -1
        if state["was_written"]:
            self._version = -1

    def put_back(self) -> None:
        """Gives it the bits it began with; what is frozen whole also gets no gradient."""
        if self.place.is_held_whole:
            if self.tensor.is_leaf and self.tensor.requires_grad:
                self.tensor.requires_grad_(False)
            self.tensor.grad = None
        part = self.part()
        if part.shape != self.original.shape or part.dtype != self.original.dtype:
            # Another shape or type came by `.data`, and goes by it.
            if self.place.rows is None and part is self.tensor:
                self.tensor.data = self.original.to(self.tensor.device, copy=True)
        elif not is_sparse(self.tensor) and not _is_expanded(part) and fingerprint(part) != self.digest:
            with torch.inference_mode(part.is_inference()), torch.no_grad():
                part.copy_(self.original)
        self.note_signs()


def packed(tensor: Tensor) -> Tensor:
    """The bytes of a sparse tensor: where its elements are, and what they are."""
    if tensor.layout == torch.sparse_coo:
        whole = tensor.detach().coalesce()
        parts = [whole.indices(), whole.values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return torch.cat([bytes_of(part.contiguous()) for part in parts])


def _is_expanded(tensor: Tensor) -> bool:
    """Whether several elements lie in one place, as `expand()` makes them: it cannot be written to."""
    return any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
