"""Reads bytes between steps without waiting for a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.audit.watch.frozen_tensor import FrozenTensor
from mtl.runtime.fingerprint import fingerprint
from mtl.runtime.tensors import byte_view

# Parameters are read in rotation, this many bytes a step on average: some hundredths of a millisecond on a CPU.
BYTES_A_STEP = 256 * 1024
# The least cost of one read in bytes, for up to FEW tensors, and for more: then one is read every fourth step.
FEW, LEAST_CHARGE, LEAST_CHARGE_OF_MANY = 32, BYTES_A_STEP, 4 * BYTES_A_STEP
# Buffers up to this size are read in every step, up to AT_ONCE of them in one read; of more, one such read every fourth
# step, in rotation.
SMALL = 64 * 1024
AT_ONCE = 32


class Reading:
    """A non-blocking copy of a tensor to the host; complete at once if the tensor is on the CPU."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.detach().to("cpu", non_blocking=True)
        self._arrival: torch.Event | None = None
        if tensor.device.type != "cpu":
            self._arrival = torch.Event(tensor.device)
            self._arrival.record()

    def get(self, wait: bool) -> Tensor | None:
        """The content; None if it has not arrived yet and `wait` is off."""
        if self._arrival is not None and not self._arrival.query():
            if not wait:
                return None
            self._arrival.synchronize()
        return self._host


class RotatingReader:
    """Reads the small buffers of a contract in every step, and the parameters in rotation, a few bytes a step."""

    def __init__(self, frozen: Sequence[FrozenTensor]) -> None:
        small = {each for each in frozen if _is_small(each)}
        rotating = [each for each in frozen if each not in small and each.place.kind != "attr"]
        least = LEAST_CHARGE if len(rotating) <= FEW else LEAST_CHARGE_OF_MANY
        self._rotating = [(each, max(_num_bytes(each), least)) for each in rotating]
        self._most_credit = max((size for _, size in self._rotating), default=0) + BYTES_A_STEP
        self._in_chunks = [
            [_BufferBundle(chunk) for chunk in chunks]
            for chunks in _by_device([each for each in frozen if each in small])
        ]
        self._bundles = [bundle for chunks in self._in_chunks for bundle in chunks]
        self._next, self._credit = 0, 0
        self._pending_bundles: dict[int, _BufferBundle] = {}
        self._pending: dict[tuple[int, FrozenTensor], Reading] = {}

    def advance(self, step: int) -> None:
        """Requests the reads that are due after this step."""
        for chunks in self._in_chunks:
            if len(chunks) == 1 or step % 4 == 1:
                bundle = chunks[step // 4 % len(chunks)]
                bundle.request(step)
                self._pending_bundles[id(bundle)] = bundle
        # A tensor of more bytes than a step's credit is read once enough steps have added to the credit.
        self._credit = min(self._credit + BYTES_A_STEP, self._most_credit)
        for _ in self._rotating:
            frozen, size = self._rotating[self._next]
            if size > self._credit:
                break
            self._credit -= size
            self._next = (self._next + 1) % len(self._rotating)
            self.request(frozen, step)

    def request(self, frozen: FrozenTensor, step: int) -> None:
        """Requests a read of one tensor."""
        if (step, frozen) not in self._pending:
            self._pending[step, frozen] = Reading(frozen.part())

    def arrived(self, wait: bool = False) -> Iterator[tuple[FrozenTensor, Tensor, int]]:
        """Tensors whose bytes have arrived, each with the step after which they were requested."""
        bundles, self._pending_bundles = self._pending_bundles, {}
        for key, bundle in bundles.items():
            for step in bundle.differences(wait):
                for frozen in bundle.members:
                    self.request(frozen, step)
            if bundle.is_pending:
                self._pending_bundles[key] = bundle
        pending, self._pending = self._pending, {}
        for (step, frozen), reading in pending.items():
            content = reading.get(wait)
            if content is None:
                self._pending[step, frozen] = reading
            else:
                yield frozen, content, step

    def update_members(self) -> None:
        """Updates `proven_at` of all buffers from their bundles."""
        for bundle in self._bundles:
            bundle.update_members()

    def state_dict(self) -> dict[str, Any]:
        """The position in the rotation, as plain data; no read may be pending."""
        return {
            "next": self._rotating[self._next][0].place.name if self._rotating else None,
            "credit": self._credit,
            "bundles": [{"members": bundle.names, "first": bundle.first} for bundle in self._bundles],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the position of another process; tensors are bundled by their present devices."""
        names = [frozen.place.name for frozen, _ in self._rotating]
        self._next = names.index(state["next"]) if state["next"] in names else 0
        self._credit = min(state["credit"], self._most_credit)
        firsts = {tuple(each["members"]): each["first"] for each in state["bundles"]}
        for bundle in self._bundles:
            bundle.first = firsts.get(tuple(bundle.names), bundle.first)


class _BufferBundle:
    """Small buffers of one device, read as one.

    Attributes:
        members: The buffers.
        first: The fingerprint of their original bytes.
        proven_at: The last step after which they had these bytes.
    """

    def __init__(self, members: Sequence[FrozenTensor]) -> None:
        self.members = members
        self._views = [byte_view(each.part()) for each in members]
        self.first = fingerprint(torch.cat([byte_view(each.original.contiguous()) for each in members]))
        self.proven_at = 0
        self._pending: list[tuple[Reading, int]] = []

    @property
    def names(self) -> list[str]:
        return [frozen.place.name for frozen in self.members]

    @property
    def is_pending(self) -> bool:
        """Whether a read has not arrived yet."""
        return bool(self._pending)

    def request(self, step: int) -> None:
        self._pending.append((Reading(torch.cat(self._views)), step))

    def differences(self, wait: bool) -> Iterator[int]:
        """The steps after which a buffer differed from its original bytes."""
        pending, self._pending = self._pending, []
        for reading, step in pending:
            content = reading.get(wait)
            if content is None:
                self._pending.append((reading, step))
            elif fingerprint(content) != self.first:
                yield step
            else:
                self.proven_at = max(self.proven_at, step)

    def update_members(self) -> None:
        """Updates `proven_at` of the members; too expensive for every step."""
        for frozen in self.members:
            frozen.proven_at = max(frozen.proven_at, self.proven_at)


def _by_device(frozen: Sequence[FrozenTensor]) -> list[list[list[FrozenTensor]]]:
    """Chunks of at most `AT_ONCE` tensors of one device, by device."""
    groups: dict[torch.device, list[FrozenTensor]] = {}
    for each in frozen:
        groups.setdefault(each.part().device, []).append(each)
    return [[group[at : at + AT_ONCE] for at in range(0, len(group), AT_ONCE)] for group in groups.values()]


def _is_small(frozen: FrozenTensor) -> bool:
    """Whether it is read in every step."""
    return frozen.place.kind != "param" and _num_bytes(frozen) <= SMALL and frozen.is_viewable()


def _num_bytes(frozen: FrozenTensor) -> int:
    return frozen.original.numel() * frozen.original.element_size()
