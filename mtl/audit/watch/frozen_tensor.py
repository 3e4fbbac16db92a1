"""A frozen tensor, and how it was when its phase began."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mtl.audit.watch.places import Place, is_sparse
from mtl.runtime.fingerprint import fingerprint
from mtl.runtime.tensors import byte_view, full_tensor, is_sharded, local


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
        address: Where its first bytes lie, as far as is known.
        version: How often it had been written to then, as far as torch counts.
        num_stays: Of a plain attribute, for how many looks the same tensor has been there.
        is_result: Whether a plain attribute turned out to be what a forward leaves there, of which nothing is asked.
    """

    def __init__(self, place: Place, tensor: Tensor, is_whole: bool = False) -> None:
        """Raises:
        ValueError: Its bytes cannot be read.
        """
        self.place = place
        self.tensor = tensor
        try:
            self.original = self.part().detach().to("cpu", copy=True)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
            kind = type(tensor).__name__
            raise ValueError(
                f"{place.name} is frozen, but the bytes of a {kind} cannot be read ({error}); take it back with"
                f" !{place.name}"
            ) from error
        self.digest = self.whole_digest = fingerprint(self.original)
        if is_whole and is_sharded(tensor):
            together = full_tensor(tensor.detach())
            self.whole_digest = fingerprint(together if place.rows is None else together[place.rows])
        self.proven_at = 0
        self.known_at = 0
        self.had_gradient = False
        self.num_stays = 0
        self.is_result = False
        self._look_at(tensor)
        self.note_signs()

    def _look_at(self, tensor: Tensor) -> None:
        # Asked once: these are looked at in every step. Tensors of inference mode are not counted.
        self.tensor = tensor
        self._has_address = not is_sparse(tensor) and local(tensor) is tensor and not is_wrapper(tensor)
        self._is_counted = not tensor.is_inference()

    def follow(self, tensor: Tensor) -> None:
        """Watches another tensor with the same bytes that was put in its place."""
        self._look_at(tensor)
        self.note_signs()

    @property
    def is_plain(self) -> bool:
        """Whether it is a registered tensor, frozen whole, whose address and version say all."""
        return self.place.is_held_whole and not self.place.way and self._has_address and self._is_counted

    def part(self) -> Tensor:
        """What is frozen of it; of a tensor that is spread over processes (FSDP), what is here."""
        here = local(self.tensor)
        if is_sparse(here) or is_wrapper(here):
            return packed(here)
        return here if self.place.rows is None else here[self.place.rows]

    def is_viewable(self) -> bool:
        """Whether its bytes can be read without bringing them in order first."""
        part = self.part()
        return (
            not is_sparse(self.tensor)
            and not is_wrapper(local(self.tensor))
            and part.is_contiguous()
            and not part.is_conj()
            and not part.is_neg()
            and part.numel() > 0
        )

    def note_signs(self) -> None:
        """Takes the present address and version for those of the first bytes."""
        self.address, self.version = self._address_now(), self._version_now()

    def shows_a_sign(self) -> bool:
        """Whether it may have been written to: a reason to look at its bytes, not a verdict."""
        return self.was_moved() or self.was_written()

    def was_moved(self) -> bool:
        """Whether it lies elsewhere in memory than when the signs were noted."""
        return self._address_now() != self.address

    def was_written(self) -> bool:
        """Whether torch has counted a write since the signs were noted."""
        return self._version_now() != self.version

    def _address_now(self) -> int:
        """Where it lies; a tensor that consists of several lies in several places."""
        if self._has_address:
            return self.tensor.data_ptr()
        here = local(self.tensor)
        return 0 if is_sparse(here) or is_wrapper(here) else here.data_ptr()

    def _version_now(self) -> int:
        """How often it has been written to, as far as torch counts."""
        if not self._is_counted:
            return 0
        here = local(self.tensor)
        return sum(part._version for part in inner_tensors(here)) if is_wrapper(here) else self.tensor._version

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
            "num_stays": self.num_stays,
            "is_result": self.is_result,
            "was_moved": self.was_moved(),
            "was_written": self.was_written(),
        }

    def take_over(self, state: Mapping[str, Any], digest: str) -> None:
        """Goes on from what was known of it in another process, where its bytes were first those of a fingerprint."""
        self.digest = digest
        self.proven_at, self.known_at = state["proven_at"], state["known_at"]
        self.had_gradient |= state["had_gradient"]
        self.num_stays, self.is_result = state.get("num_stays", 0), state.get("is_result", False)
        # No tensor has these: a sign that was not followed up yet is seen at the next look.
        if state["was_moved"]:
            self.address = -1
        if state["was_written"]:
            self.version = -1

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
        elif (
            not is_sparse(self.tensor)
            and not is_wrapper(local(self.tensor))
            and not _is_expanded(part)
            and fingerprint(part) != self.digest
        ):
            with torch.inference_mode(part.is_inference()), torch.no_grad():
                part.copy_(self.original)
        self.note_signs()


def packed(tensor: Tensor) -> Tensor:
    """The bytes of a tensor that consists of several: a sparse one, or one of a subclass that wraps others."""
    if is_wrapper(tensor):
        parts = [packed(part) if is_sparse(part) else part.detach() for part in inner_tensors(tensor)]
    elif tensor.layout == torch.sparse_coo:
        whole = tensor.detach().coalesce()
        parts = [whole.indices(), whole.values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return torch.cat([byte_view(part.contiguous()) for part in parts])


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor has no bytes of its own, but wraps others, as subclasses with `__tensor_flatten__` do."""
    return type(tensor) is not Tensor and hasattr(tensor, "__tensor_flatten__")


def inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with bytes that a wrapper is made of."""
    wrapper: Any = tensor
    for key in wrapper.__tensor_flatten__()[0]:
        inner = getattr(wrapper, key)
        yield from inner_tensors(inner) if is_wrapper(inner) else (inner,)


def _is_expanded(tensor: Tensor) -> bool:
    """Whether several elements lie in one place, as `expand()` makes them: it cannot be written to."""
    return any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
