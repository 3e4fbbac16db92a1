"""Reading bytes between steps without waiting for a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.audit.watch.frozen_tensor import Watched
from mtl.runtime.fingerprint import fingerprint
from mtl.runtime.tensors import byte_view

# Parameters are read in turn, this many bytes a step on average: some hundredths of a millisecond on a CPU.
BYTES_A_STEP = 256 * 1024
# A reading costs as much as so many bytes, however small the tensor; of many tensors, one is read at every fourth step.
FEW, LEAST_CHARGE, LEAST_CHARGE_OF_MANY = 32, BYTES_A_STEP, 4 * BYTES_A_STEP
# Buffers up to this size are read at every step, so many together; of more, as many at every fourth step, in turn.
SMALL = 64 * 1024
AT_ONCE = 32


class Reading:
    """A tensor's content on its way to the host; there at once if the tensor is on the CPU."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.detach().to("cpu", non_blocking=True)
        self._arrival: torch.Event | None = None
        if tensor.device.type != "cpu":
            self._arrival = torch.Event(tensor.device)
            self._arrival.record()

    def get(self, wait: bool) -> Tensor | None:
        """The content; None if it is not there yet and is not to be waited for."""
        if self._arrival is not None and not self._arrival.query():
            if not wait:
                return None
            self._arrival.synchronize()
        return self._host


class Rotation:
    """Reads the small buffers of a contract at every step, and parameters in turn, a few bytes a step."""

    def __init__(self, watched: Sequence[Watched]) -> None:
        small = {each for each in watched if _is_small(each)}
        in_turn = [each for each in watched if each not in small and each.place.kind != "attr"]
        least = LEAST_CHARGE if len(in_turn) <= FEW else LEAST_CHARGE_OF_MANY
        self._in_turn = [(each, max(_num_bytes(each), least)) for each in in_turn]
        self._most_credit = max((size for _, size in self._in_turn), default=0) + BYTES_A_STEP
        self._in_chunks = [
            [_Bundle(chunk) for chunk in chunks] for chunks in _by_device([each for each in watched if each in small])
        ]
        self._bundles = [bundle for chunks in self._in_chunks for bundle in chunks]
        self._next, self._credit = 0, 0
        self._waiting: dict[int, _Bundle] = {}
        self._asked: dict[tuple[int, Watched], Reading] = {}

    def turn(self, step: int) -> None:
        """Asks for what is to be read after this step."""
        for chunks in self._in_chunks:
            if len(chunks) == 1 or step % 4 == 1:
                bundle = chunks[step // 4 % len(chunks)]
                bundle.ask(step)
                self._waiting[id(bundle)] = bundle
        # A tensor of more bytes than a step may read waits until enough steps have saved for it.
        self._credit = min(self._credit + BYTES_A_STEP, self._most_credit)
        for _ in self._in_turn:
            watched, size = self._in_turn[self._next]
            if size > self._credit:
                break
            self._credit -= size
            self._next = (self._next + 1) % len(self._in_turn)
            self.ask(watched, step)

    def ask(self, watched: Watched, step: int) -> None:
        """Asks for one tensor's bytes."""
        if (step, watched) not in self._asked:
            self._asked[step, watched] = Reading(watched.part())

    def arrived(self, wait: bool = False) -> Iterator[tuple[Watched, Tensor, int]]:
        """Tensors whose bytes have come, each with the step after which they were asked for."""
        waiting, self._waiting = self._waiting, {}
        for key, bundle in waiting.items():
            for step in bundle.differences(wait):
                for watched in bundle.members:
                    self.ask(watched, step)
            if bundle.is_waiting:
                self._waiting[key] = bundle
        asked, self._asked = self._asked, {}
        for (step, watched), reading in asked.items():
            content = reading.get(wait)
            if content is None:
                self._asked[step, watched] = reading
            else:
                yield watched, content, step

    def pass_on(self) -> None:
        """Has every tensor know after which step it was last found to be right."""
        for bundle in self._bundles:
            bundle.pass_on()

    def state(self) -> dict[str, Any]:
        """Whose turn it is, as plain data; what was asked for has to have arrived."""
        return {
            "next": self._in_turn[self._next][0].place.name if self._in_turn else None,
            "credit": self._credit,
            "bundles": [{"members": bundle.names, "first": bundle.first} for bundle in self._bundles],
        }

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Goes on where another process left off; tensors that lie elsewhere by now are bundled as they lie now."""
        names = [watched.place.name for watched, _ in self._in_turn]
        self._next = names.index(state["next"]) if state["next"] in names else 0
        self._credit = min(state["credit"], self._most_credit)
        firsts = {tuple(each["members"]): each["first"] for each in state["bundles"]}
        for bundle in self._bundles:
            bundle.first = firsts.get(tuple(bundle.names), bundle.first)


class _Bundle:
    """Small tensors of one device, read as one.

    Attributes:
        members: The tensors.
        first: The fingerprint of their first bytes.
        proven_at: The last step after which they were found to be these.
    """

    def __init__(self, members: Sequence[Watched]) -> None:
        self.members = members
        self._views = [byte_view(each.part()) for each in members]
        self.first = fingerprint(torch.cat([byte_view(each.original.contiguous()) for each in members]))
        self.proven_at = 0
        self._asked: list[tuple[Reading, int]] = []

    @property
    def names(self) -> list[str]:
        return [watched.place.name for watched in self.members]

    @property
    def is_waiting(self) -> bool:
        """Whether something was asked for that has not come yet."""
        return bool(self._asked)

    def ask(self, step: int) -> None:
        self._asked.append((Reading(torch.cat(self._views)), step))

    def differences(self, wait: bool) -> Iterator[int]:
        """The steps after which something was not as at first."""
        asked, self._asked = self._asked, []
        for reading, step in asked:
            content = reading.get(wait)
            if content is None:
                self._asked.append((reading, step))
            elif fingerprint(content) != self.first:
                yield step
            else:
                self.proven_at = max(self.proven_at, step)

    def pass_on(self) -> None:
        """Tells the members after which step they were last found to be right; too much for every step."""
        for watched in self.members:
            watched.proven_at = max(watched.proven_at, self.proven_at)


def _by_device(watched: Sequence[Watched]) -> list[list[list[Watched]]]:
    """Chunks of at most `AT_ONCE` tensors, those of each device together."""
    groups: dict[torch.device, list[Watched]] = {}
    for each in watched:
        groups.setdefault(each.part().device, []).append(each)
    return [[group[at : at + AT_ONCE] for at in range(0, len(group), AT_ONCE)] for group in groups.values()]


def _is_small(watched: Watched) -> bool:
    """Whether it is read at every step."""
    return watched.place.kind != "param" and _num_bytes(watched) <= SMALL and watched.is_viewable()


def _num_bytes(watched: Watched) -> int:
    return watched.original.numel() * watched.original.element_size()
