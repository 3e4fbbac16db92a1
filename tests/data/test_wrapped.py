"""Splits around another one have its order, examples and everything else that they do not change."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mtl.data import Loading, MemorySplit, TaughtSplit, Teaching
from mtl.data.orders import Order, Shuffled
from mtl.data.renumbered import RenumberedSplit


class Halved(MemorySplit):
    """Trains on the first half of its images in one phase, and shows the last ones."""

    def order(self, tasks: Collection[str]) -> Order:  # noqa: ARG002
        return Shuffled(len(self) // 2)

    def examples(self, num: int) -> Tensor:
        return torch.arange(len(self) - num, len(self))

    def begin_phase(self, tasks: Collection[str]) -> None:
        BEGUN.append(set(tasks))


BEGUN: list[set[str]] = []


def halved() -> Halved:
    images = torch.zeros(8, 4, 6, 3, dtype=torch.uint8)
    labels = {"kind": torch.arange(8), "other": torch.arange(8)}
    return Halved(images, labels, num_skipped=3)


def renumbered() -> RenumberedSplit:
    return RenumberedSplit(halved(), {"kind": [7, 6, 5, 4, 3, 2, 1, 0]})


def test_a_split_around_another_one_has_what_it_does_not_change() -> None:
    teaching = Teaching(lambda images: images.flatten(1).float(), 72, "abc")
    taught = TaughtSplit(halved(), {"like": teaching}, 4, Loading(device=torch.device("cpu")))
    for split in (renumbered(), taught):
        BEGUN.clear()
        split.begin_phase(["kind"])
        assert [{"kind"}] == BEGUN
        assert split.order(["kind"]) == Shuffled(4)
        assert split.examples(2).tolist() == [6, 7]
        assert (len(split), split.size, split.channels, split.num_skipped) == (8, (4, 6), 3, 3)
        assert split.is_in_memory and split.identity() == halved().identity()
        assert split.label_identity("other") == halved().label_identity("other")


def test_only_the_classes_of_the_given_tasks_are_numbered_otherwise() -> None:
    split = renumbered()
    batch = split.batch(torch.tensor([1, 2]))
    assert {name: label.tolist() for name, label in batch.labels.items()} == {"kind": [6, 5], "other": [1, 2]}
    assert split.labels_to_fit("kind").tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert split.label_identity("kind") is None
    assert not split.may_lack and split.label_bytes() == halved().label_bytes() == 16
