"""A split with the embeddings of teachers: kept, or computed with each batch, of the images as it shows them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtl.config import GeneratedData
from mtl.config.data import AugmentConfig
from mtl.data import Loading, MemorySplit, TaughtSplit, Teaching, View, draw_view, training_batches, validation_batches
from mtl.data.dataset import Rows
from mtl.distributed.world import ALONE, World

CPU = torch.device("cpu")


class Counted:
    """A linear teacher that notes how many images it has seen."""

    def __init__(self) -> None:
        self.num = 0
        self.weights = torch.randn(48, 5, generator=torch.Generator().manual_seed(2))

    def __call__(self, images: Tensor) -> Tensor:
        self.num += len(images)
        return images.flatten(1).float() @ self.weights


class CountedSplit(MemorySplit):
    """Notes how many images are read."""

    def rows(self, indices: Tensor, with_images: bool, view: View | None = None) -> Rows:
        READ.append(len(indices) if with_images else 0)
        return super().rows(indices, with_images, view)


READ: list[int] = []


@pytest.fixture
def teacher() -> Counted:
    return Counted()


def split_of(num: int = 23) -> CountedSplit:
    READ.clear()
    images = torch.randint(0, 256, (num, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return CountedSplit(images, {"kind": torch.arange(num)})


def taught(teacher: Callable[[Tensor], Tensor], split: MemorySplit | None = None) -> TaughtSplit:
    return TaughtSplit(split or split_of(), {"like": Teaching(teacher, 5, "abc")}, 4, Loading(device=CPU))


def test_kept_embeddings_are_computed_once_and_batches_read_no_image(teacher: Counted) -> None:
    split = taught(teacher)
    split.keep(ALONE, quiet=True)
    assert teacher.num == 23 and sum(READ) == 23
    for epoch in range(3):
        for batch in training_batches(split, 5, 0, epoch):
            assert batch.labels["kind"].tolist() == batch.indices.tolist()
            expected = split._split.images[batch.indices].flatten(1).float() @ teacher.weights  # type: ignore[attr-defined]
            torch.testing.assert_close(batch.labels["like"], expected)
    assert teacher.num == 23 and sum(READ) == 23
    assert split.labels_to_fit("like").shape == (23, 5) and split.labels_to_fit("kind").shape == (23,)


def test_embeddings_of_the_same_images_are_the_same_kept_or_computed_with_the_batch(teacher: Counted) -> None:
    kept, computed = taught(teacher), taught(teacher)
    kept.keep(ALONE, quiet=True)
    for batch in validation_batches(kept, 4):
        assert torch.equal(batch.labels["like"], computed.batch(batch.indices).labels["like"])
    for batch in training_batches(kept, 5, 0, 0):
        torch.testing.assert_close(
            batch.labels["like"], computed.batch(batch.indices).labels["like"], rtol=1e-6, atol=0
        )


def test_a_teacher_sees_the_very_images_that_the_trunk_sees(teacher: Counted) -> None:
    split = taught(teacher)
    config = GeneratedData(augment=AugmentConfig(brightness=0.5, contrast=0.3))
    found = []
    for epoch in range(2):
        view = draw_view(config, 0, epoch, len(split))
        for loading in (Loading(), Loading(with_images=True, device=CPU), Loading(device=CPU)):
            READ.clear()
            batches = list(training_batches(split, 5, 0, 0, view, loading=loading))
            assert sum(READ) == 20, "read once, in the thread"
            for batch in batches:
                torch.testing.assert_close(batch.labels["like"], teacher(batch.images), rtol=0, atol=0)
        found.append(batches[0].labels["like"])
    assert not torch.equal(*found)


def test_the_images_of_a_batch_are_changed_once(teacher: Counted) -> None:
    split = taught(teacher)
    view = draw_view(GeneratedData(augment=AugmentConfig(brightness=0.5)), 0, 0, len(split))
    batch = split.batch(torch.arange(4), view)
    assert batch.images is batch.images and batch.split is split
    assert torch.equal(teacher(batch.images), batch.labels["like"])


def test_embeddings_that_no_active_task_learns_are_not_computed(teacher: Counted) -> None:
    split = taught(teacher)
    split.begin_phase(["kind"])
    READ.clear()
    assert split.batch(torch.arange(4)).labels.keys() == {"kind"}
    assert teacher.num == 0 and sum(READ) == 0
    split.begin_phase(["kind", "like"])
    assert split.batch(torch.arange(4)).labels.keys() == {"kind", "like"}


def test_a_constant_is_fitted_on_images_at_even_distances_where_none_are_kept(teacher: Counted) -> None:
    split = taught(teacher, split_of(1000))
    found = split.labels_to_fit("like")
    chosen = torch.arange(0, 1000, 3)
    assert teacher.num == len(chosen) == len(found)
    torch.testing.assert_close(found, split._split.images[chosen].flatten(1).float() @ teacher.weights)  # type: ignore[attr-defined]


def test_each_process_computes_its_part_and_together_they_have_the_bits_of_one(
    teacher: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = taught(teacher)
    whole.keep(ALONE, quiet=True)
    parts: list[Tensor] = []
    monkeypatch.setattr(World, "sum_in_place", lambda _, tensor: parts.append(tensor))
    for rank in range(3):
        before = teacher.num
        taught(teacher).keep(World(rank, 3, rank), quiet=True)
        assert teacher.num - before in (4 + 4, 4 + 3)
    assert torch.equal(torch.stack(parts).sum(dim=0), whole.labels_to_fit("like"))


def test_more_processes_than_batches_are_no_mistake(teacher: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "sum_in_place", lambda _, tensor: tensor)
    taught(teacher).keep(World(7, 9, 7), quiet=True)
    assert teacher.num == 0


def test_the_identity_of_embeddings_is_that_of_the_images_and_of_the_teacher(teacher: Counted) -> None:
    one = taught(teacher)
    other = TaughtSplit(split_of(), {"like": Teaching(teacher, 5, "abd")}, 4, Loading(device=CPU))
    assert one.identity() == other.identity() == split_of().identity()
    assert one.label_identity("kind") == other.label_identity("kind")
    assert one.label_identity("like") not in (None, other.label_identity("like"))
    assert taught(teacher, split_of(22)).label_identity("like") != one.label_identity("like")
