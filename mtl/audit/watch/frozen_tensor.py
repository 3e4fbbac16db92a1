"""A frozen tensor, and its bytes when its phase began."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mtl.audit.watch.places import TensorPlace, is_sparse
from mtl.runtime.fingerprint import fingerprint
from mtl.runtime.tensors import byte_view, full_tensor, is_sharded, local


class FrozenTensor:
    """A frozen tensor, or rows of one, with a copy of its bytes from the phase's begin.

    Attributes:
        place: The module and key under which it is registered.
        tensor: The tensor, with all its rows.
        original: A copy of the frozen rows, on the host.
        digest: The fingerprint of `original`.
        full_digest: The fingerprint of the full tensor, if it is sharded and that was requested; else `digest`.
        proven_at: The last step after which its bytes were the original ones.
        known_at: The same, including checks that the report does not count.
        had_gradient: Whether it has had a gradient at any check.
        address: The address of its original bytes.
        version: Its version counter when its bytes were last the original ones.
        num_stays: Of a plain attribute, the checks at which it was the same tensor.
        is_result: Whether a plain attribute turned out to be a result of the forward, which is not checked.
    """

    def __init__(self, place: TensorPlace, tensor: Tensor, full_digest: bool = False) -> None:
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
        self.digest = self.full_digest = fingerprint(self.original)
        if full_digest and is_sharded(tensor):
            full = full_tensor(tensor.detach())
            self.full_digest = fingerprint(full if place.rows is None else full[place.rows])
        self.proven_at = 0
        self.known_at = 0
        self.had_gradient = False
        self.num_stays = 0
        self.is_result = False
        self._set_tensor(tensor)
        self.record_version()

    def _set_tensor(self, tensor: Tensor) -> None:
        # Computed once, since every step uses them. Tensors of inference mode have no version counter.
        self.tensor = tensor
        self._has_address = not is_sparse(tensor) and local(tensor) is tensor and not is_wrapper(tensor)
        self._has_version = not tensor.is_inference()

    def rebind(self, tensor: Tensor) -> None:
        """Continues with another tensor of the same bytes that has replaced it."""
        self._set_tensor(tensor)
        self.record_version()

    @property
    def is_plain(self) -> bool:
        """Whether it is a registered, fully frozen tensor with one address and a version counter."""
        return self.place.is_full and not self.place.key_path and self._has_address and self._has_version

    def part(self) -> Tensor:
        """Its frozen rows, or all; of a sharded tensor (FSDP), this rank's shard."""
        here = local(self.tensor)
        if is_sparse(here) or is_wrapper(here):
            return packed(here)
        return here if self.place.rows is None else here[self.place.rows]

    def is_viewable(self) -> bool:
        """Whether its bytes can be viewed without a copy."""
        part = self.part()
        return (
            not is_sparse(self.tensor)
            and not is_wrapper(local(self.tensor))
            and part.is_contiguous()
            and not part.is_conj()
            and not part.is_neg()
            and part.numel() > 0
        )

    def record_version(self) -> None:
        """Records the present address and version counter as those of the original bytes."""
        self.address, self.version = self._address_now(), self._version_now()

    def may_be_written(self) -> bool:
        """Whether its address or version counter changed: a reason to compare its bytes, not a verdict."""
        return self.was_moved() or self.was_written()

    def was_moved(self) -> bool:
        """Whether its address differs from the recorded one."""
        return self._address_now() != self.address

    def was_written(self) -> bool:
        """Whether its version counter differs from the recorded one."""
        return self._version_now() != self.version

    def _address_now(self) -> int:
        """Its address; 0 for a tensor that consists of several."""
        if self._has_address:
            return self.tensor.data_ptr()
        here = local(self.tensor)
        return 0 if is_sparse(here) or is_wrapper(here) else here.data_ptr()

    def _version_now(self) -> int:
        """Its version counter; of a wrapper, the sum over the tensors inside."""
        if not self._has_version:
            return 0
        here = local(self.tensor)
        return sum(part._version for part in inner_tensors(here)) if is_wrapper(here) else self.tensor._version

    def is_original(self, content: Tensor, step: int) -> bool:
        """Compares bytes that were read after a step with the original ones."""
        if fingerprint(content) != self.digest:
            return False
        self.proven_at = max(self.proven_at, step)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Its record without its bytes, as plain data."""
        return {
            "proven_at": self.proven_at,
            "known_at": max(self.known_at, self.proven_at),
            "had_gradient": self.had_gradient,
            "num_stays": self.num_stays,
            "is_result": self.is_result,
            "was_moved": self.was_moved(),
            "was_written": self.was_written(),
        }

    def load_state_dict(self, state: Mapping[str, Any], digest: str) -> None:
        """Loads the record of another process, where its original bytes had a fingerprint."""
        self.digest = digest
        self.proven_at, self.known_at = state["proven_at"], state["known_at"]
        self.had_gradient |= state["had_gradient"]
        self.num_stays, self.is_result = state.get("num_stays", 0), state.get("is_result", False)
        # No tensor has these values: a write that was not checked yet is checked next time.
        if state["was_moved"]:
            self.address = -1
        if state["was_written"]:
            self.version = -1

    def restore(self) -> None:
        """Restores its original bits; of a fully frozen tensor, also removes the gradient and the flag."""
        if self.place.is_full:
            if self.tensor.is_leaf and self.tensor.requires_grad:
                self.tensor.requires_grad_(False)
            self.tensor.grad = None
        part = self.part()
        if part.shape != self.original.shape or part.dtype != self.original.dtype:
            # Another shape or dtype can only have been assigned to `.data`.
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
        self.record_version()


def packed(tensor: Tensor) -> Tensor:
    """The bytes of a tensor that consists of several: a sparse one, or a wrapper subclass."""
    if is_wrapper(tensor):
        parts = [packed(part) if is_sparse(part) else part.detach() for part in inner_tensors(tensor)]
    elif tensor.layout == torch.sparse_coo:
        coalesced = tensor.detach().coalesce()
        parts = [coalesced.indices(), coalesced.values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return torch.cat([byte_view(part.contiguous()) for part in parts])


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor wraps others and has no bytes of its own, as subclasses with `__tensor_flatten__` do."""
    return type(tensor) is not Tensor and hasattr(tensor, "__tensor_flatten__")


def inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with bytes inside a wrapper."""
    wrapper: Any = tensor
    for key in wrapper.__tensor_flatten__()[0]:
        inner = getattr(wrapper, key)
        yield from inner_tensors(inner) if is_wrapper(inner) else (inner,)


def _is_expanded(tensor: Tensor) -> bool:
    """Whether several elements share one address, as after `expand()`: it cannot be written to."""
    return any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def record_frozen(places: Iterable[TensorPlace], full_digests: bool) -> list[FrozenTensor]:
    """The tensors that are at some places now; `full_digests` is that of `FrozenTensor`."""
    found = [(place, place.current()) for place in places]
    return [FrozenTensor(place, tensor, full_digests) for place, tensor in found if tensor is not None]
