"""Which images make each batch of an epoch: a pure function of seed and epoch, for one data set or several mixed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from mtl.config.mixed import MixConfig


class Order(ABC):
    """The order of the training images.

    Attributes:
        num_images: How many images there are.
    """

    num_images: int

    @abstractmethod
    def num_batches(self, batch_size: int) -> int:
        """Batches in one epoch: full ones only, but at least one."""

    @abstractmethod
    def batches(self, batch_size: int, seed: int, epoch: int) -> Sequence[Tensor]:
        """The images of each batch of an epoch.

        Args:
            batch_size: Images in one batch.
            seed: That of the run.
            epoch: Which epoch of the run, from 0.

        Returns:
            Their indices, each "b", int64.
        """


@dataclass(frozen=True)
class Shuffled(Order):
    """Every image at most once in an epoch. A last batch that is not full is left out, another one in each epoch."""

    num_images: int

    def num_batches(self, batch_size: int) -> int:
        return max(1, self.num_images // batch_size)

    def batches(self, batch_size: int, seed: int, epoch: int) -> Sequence[Tensor]:
        order = _shuffle(self.num_images, seed * 1_000_003 + epoch)
        return torch.split(order[: self.num_batches(batch_size) * batch_size], batch_size)


@dataclass(frozen=True)
class Mixed(Order):
    """Images of several data sets, each at its share.

    Of each set, images are drawn without replacement, pass by pass, and a pass continues over epochs: as long as they
    draw as many of a set, none of its images is drawn more than once more often than another.

    Attributes:
        sizes: The images of each set in use, by name.
        starts: The index of each set's first image among those of all sets.
        mix: How they are mixed.
        most_tasks: The most tasks that learn from one set.
    """

    sizes: Mapping[str, int]
    starts: Mapping[str, int]
    mix: MixConfig
    most_tasks: int

    @property
    def num_images(self) -> int:  # type: ignore[override]
        return sum(self.sizes.values())

    def num_batches(self, batch_size: int) -> int:
        # Batches after which a set is through once, exactly.
        needed = [Fraction(self.sizes[name]) / (share * batch_size) for name, share in self._shares.items()]
        match self.mix.epoch:
            case "longest":
                num = max(needed)
            case "shortest":
                num = min(needed)
            case "sum":
                num = Fraction(self.num_images, batch_size)
            case "steps":
                assert self.mix.steps is not None
                num = Fraction(self.mix.steps)
        return max(1, int(num))

    def batches(self, batch_size: int, seed: int, epoch: int) -> Sequence[Tensor]:
        counts = self._counts(batch_size)
        base = (seed * 1_000_003 + epoch) * 2 + 1
        if self.mix.is_single and self.mix.by != "round_robin":
            counts = counts[_shuffle(len(counts), base)]
        drawn = [
            self._drawn(name, int(total), seed, epoch) for name, total in zip(self.sizes, counts.sum(0), strict=True)
        ]
        ends = counts.cumsum(0)
        generator = torch.Generator().manual_seed(base + 1)
        found = list[Tensor]()
        for begin, end in zip((ends - counts).tolist(), ends.tolist(), strict=True):
            parts = [own[i:j] for own, i, j in zip(drawn, begin, end, strict=True)]
            # Ranks share a batch by its parts in a row, and each should see all sets.
            found.append(torch.cat(parts)[torch.randperm(batch_size, generator=generator)])
        return found

    def describe(self) -> str:
        """The share of each set in words."""
        shares = ", ".join(f"{name} {float(share):.3g}" for name, share in self._shares.items())
        return f"{shares} of them{'; a batch is of one set' if self.mix.is_single else ''}"

    @property
    def _shares(self) -> dict[str, Fraction]:
        return self.mix.shares(self.sizes)

    def _counts(self, batch_size: int) -> Tensor:
        """The images of each set in each batch, "n s": what was drawn so far is off a set's share by less than two."""
        unit, per_batch = (batch_size, 1) if self.mix.is_single else (1, batch_size)
        return unit * _apportioned(tuple(self._shares.values()), self.num_batches(batch_size), per_batch)

    def _drawn(self, name: str, num: int, seed: int, epoch: int) -> Tensor:
        """The images of a set that an epoch draws, in order; every epoch draws as many."""
        if not num:
            return torch.empty(0, dtype=torch.int64)
        size, first = self.sizes[name], epoch * num
        passes = range(first // size, (first + num - 1) // size + 1)
        place = list(self.starts).index(name)
        orders = [_shuffle(size, ((seed * 1_000_003 + each) * 1_009 + place) * 2) for each in passes]
        begin = first - passes[0] * size
        return torch.cat(orders)[begin : begin + num] + self.starts[name]


@lru_cache(maxsize=8)
def _apportioned(shares: tuple[Fraction, ...], num: int, per_batch: int) -> Tensor:
    """Whole numbers by exact shares, `per_batch` in each of `num` rows, "num s"; the same in every epoch."""
    owed, found = [Fraction(0)] * len(shares), list[list[int]]()
    for _ in range(num):
        owed = [due + share * per_batch for due, share in zip(owed, shares, strict=True)]
        taken = _rounded(owed, per_batch)
        owed = [due - number for due, number in zip(owed, taken, strict=True)]
        found.append(taken)
    return torch.tensor(found)


def mixed_order(
    sizes: Mapping[str, int], labelled: Mapping[str, Collection[str]], tasks: Collection[str], mix: MixConfig
) -> Mixed:
    """The order of the sets that some tasks learn from.

    Args:
        sizes: The images of every set, by name, in their order.
        labelled: Of each set, those of these tasks whose labels it has.
        tasks: The tasks; one whose labels no set has learns from every image.
        mix: How they are mixed.
    """
    everywhere = set(tasks).difference(*labelled.values())
    used = [name for name in sizes if labelled[name] or everywhere]
    starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    most_tasks = max((len(labelled[name]) for name in used), default=0) + len(everywhere)
    return Mixed({name: sizes[name] for name in used}, {name: starts[name] for name in used}, mix, most_tasks)


def _rounded(numbers: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers from 0 on that add up to `total`, near the given ones: of what is left over, the largest first."""
    taken = [max(0, int(number // 1)) for number in numbers]
    places = range(len(numbers))
    while sum(taken) < total:
        taken[max(places, key=lambda at: (numbers[at] - taken[at], -at))] += 1
    while sum(taken) > total:
        taken[min((at for at in places if taken[at]), key=lambda at: (numbers[at] - taken[at], at))] -= 1
    return taken


def _shuffle(num: int, seed: int) -> Tensor:
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed % 2**63))
