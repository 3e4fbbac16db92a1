"""Data that is read from files batch by batch: what it gives, in which order, and what cannot be read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mtl.config.transform import TransformsConfig
from mtl.data import DataError, Loading, SplitWorkers, View, batches_of, training_batches, validation_batches
from mtl.data.files.file_split import FileSplit
from mtl.data.files.fileset import IMAGE, FileSet
from mtl.data.files.into_memory import read_into_memory, sound_items
from mtl.data.files.items import ItemReader, image_form
from mtl.data.files.reading import read_image, read_mask
from mtl.data.files.samples import SampleReader
from mtl.data.transforms import build_transforms
from mtl.tasks import Classification, Segmentation

NUM = 14
TASKS = {"kind": Classification(3), "parts": Segmentation(4)}
LABEL_OF = {"kind": "kind", "parts": "mask"}
KINDS = {"kind": "class", "mask": "mask"}
FLIPS = TransformsConfig.model_validate({"train": ["random_resized_crop", "flip"]}).train


class Files(FileSet):
    """Pictures of many sizes with masks; one in five has no class."""

    labels = ("kind", "mask")

    def __init__(self, folder: Path) -> None:
        self.folder, self.read_files = folder, list[str]()

    def __len__(self) -> int:
        return NUM

    def read(self, index: int, names: Collection[str]) -> dict[str, Any]:
        item: dict[str, Any] = {} if index % 5 == 0 else {"kind": index % 3}
        files = self.files(index)
        item |= {IMAGE: read_image(files[IMAGE])} if IMAGE in names else {}
        item |= {"mask": read_mask(files["mask"])} if "mask" in names else {}
        self.read_files += [name for name in (IMAGE, "mask") if name in names]
        return {name: value for name, value in item.items() if name in names}

    def files(self, index: int) -> Mapping[str, Path]:
        return {IMAGE: self.folder / f"{index}.png", "mask": self.folder / f"{index}-mask.png"}

    def column(self, label: str) -> Tensor | None:
        kinds = [float("nan") if index % 5 == 0 else index % 3 for index in range(NUM)]
        return torch.tensor(kinds, dtype=torch.float64) if label == "kind" else None


@pytest.fixture
def files(tmp_path: Path) -> Files:
    rng = np.random.default_rng(0)
    for index in range(NUM):
        size = (20 + index, 30 - index)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
        Image.fromarray(rng.integers(0, 4, size, dtype=np.uint8)).save(tmp_path / f"{index}-mask.png")
    return Files(tmp_path)


def reader_of(files: Files, transforms: Any = ()) -> SampleReader:
    size = (16, 24)
    pipeline = build_transforms(transforms, size, "key")
    reader = ItemReader(files, "files, train", KINDS, image_form(files, size), pipeline)
    return SampleReader(reader, TASKS, LABEL_OF, skips=True)


def split_of(files: Files, transforms: Any = (), skips: bool = False) -> FileSplit:
    reader = reader_of(files, transforms)
    items = sound_items(reader, NUM, 0, quiet=True) if skips else torch.arange(NUM)
    return FileSplit(reader, items, NUM - len(items))


def contents(batches: Any) -> list[list[Tensor]]:
    return [[batch.indices, batch.images, *batch.labels.values()] for batch in batches]


def equal(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
    )


def test_what_is_read_batch_by_batch_is_what_is_read_into_memory(files: Files) -> None:
    memory = read_into_memory(reader_of(files), NUM, 0, skips=False, quiet=True)
    split = split_of(files)
    assert (split.size, split.channels, len(split)) == (memory.size, memory.channels, len(memory)) == ((16, 24), 3, NUM)
    assert equal(contents(validation_batches(split, 4)), contents(validation_batches(memory, 4)))
    assert equal(contents(training_batches(split, 4, 0, 1)), contents(training_batches(memory, 4, 0, 1)))
    assert torch.equal(split.labels_to_fit("kind"), memory.labels_to_fit("kind").long())
    assert torch.equal(split.labels_to_fit("parts"), memory.labels_to_fit("parts"))


def test_random_transforms_follow_from_run_view_and_image_alone(files: Files) -> None:
    split, view = split_of(files, FLIPS), View(3, 7)
    parts = [torch.tensor([0, 5, 2]), torch.tensor([9, 1])]
    one = contents(batches_of(split, parts, view, Loading(True)))
    with_workers = contents(batches_of(split, parts, view, Loading(True, workers=SplitWorkers(2))))
    assert equal(one, with_workers)
    (alone,) = contents(batches_of(split, [torch.tensor([2])], view, Loading(True)))
    assert torch.equal(alone[1][0], one[0][1][2]) and torch.equal(alone[3][0], one[0][3][2])
    assert not equal(one, contents(batches_of(split, parts, View(4, 7), Loading(True))))
    assert not equal(one, contents(batches_of(split, parts, View(3, 8), Loading(True))))
    # Labels that are read without their image are those that go with it.
    without = list(batches_of(split, parts, view, Loading(False)))
    assert [torch.equal(batch.labels["parts"], own[3]) for batch, own in zip(without, one, strict=True)] == [True, True]


def test_an_epoch_that_needs_no_image_reads_none(files: Files) -> None:
    split = split_of(files)
    files.read_files.clear()
    for batch in training_batches(split, 4, 0, 0, loading=Loading(False)):
        assert set(batch.labels) == set(TASKS)
    assert set(files.read_files) == {"mask"}


def test_a_sample_that_cannot_be_read_ends_the_run_or_is_left_out(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    (files.folder / "3.png").write_bytes((files.folder / "3.png").read_bytes()[:100])
    for loading in (Loading(True), Loading(True, workers=SplitWorkers(2))):
        with pytest.raises(DataError, match=r"^files, train: \S*3\.png: image file is truncated$"):
            contents(validation_batches(split_of(files), 4, loading))
    split = split_of(files, skips=True)
    assert (len(split), split.num_skipped) == (NUM - 1, 1)
    kinds = torch.cat([batch.labels["kind"] for batch in validation_batches(split, 4)])
    assert kinds.tolist() == [-1 if index % 5 == 0 else index % 3 for index in range(NUM) if index != 3]
    (warned,) = [record.getMessage() for record in caplog.records]
    assert "1 of 14 samples are left out" in warned and "3.png" in warned


def test_all_samples_that_cannot_be_read_into_memory_are_named_at_once(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    (files.folder / "3.png").unlink()
    Image.fromarray(np.full((20, 30), 9, np.uint8)).save(files.folder / "0-mask.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(files.folder / "7-mask.png")
    with pytest.raises(DataError) as raised:
        read_into_memory(reader_of(files), NUM, 0, skips=False, quiet=True)
    lines = str(raised.value).splitlines()
    assert [name in line for name, line in zip(("0.png", "3.png", "7.png"), lines, strict=True)] == [True] * 3
    assert "expected classes 0 to 3" in lines[0] and "No such file" in lines[1]
    assert "mask has 5 x 5 pixels, and the image 27 x 23 pixels" in lines[2]
    memory = read_into_memory(reader_of(files), NUM, 0, skips=True, quiet=True)
    assert (len(memory), memory.num_skipped) == (NUM - 3, 3)
    assert "3 of 14 samples are left out" in caplog.text


def test_edited_images_are_another_data_set(files: Files) -> None:
    def digest(num: int, name: str = IMAGE) -> str | None:
        return files.identity(range(num), name)

    before, masks, kinds = digest(NUM), digest(NUM, "mask"), digest(NUM, "kind")
    assert digest(NUM) == before and len({before, masks, kinds, digest(NUM - 1)}) == 4
    image = Image.open(files.folder / "13.png")
    image.resize((40, 40)).save(files.folder / "13.png")
    assert digest(NUM) != before and digest(NUM, "mask") == masks and digest(NUM, "kind") == kinds
    (files.folder / "13.png").unlink()
    (files.folder / "2.png").unlink()
    with pytest.raises(DataError) as raised:
        digest(NUM)
    assert [line.endswith(": No such file or directory") for line in str(raised.value).splitlines()] == [True, True]


def test_images_of_several_kinds_get_one_form(files: Files) -> None:
    Image.fromarray(np.full((20, 30), 7, np.uint8)).save(files.folder / "0.png")
    Image.fromarray(np.full((21, 29, 4), 9, np.uint8)).save(files.folder / "1.png")
    Image.fromarray(np.full((22, 28), 257 * 11, np.uint16)).save(files.folder / "2.png")
    batch = next(iter(validation_batches(split_of(files), 3)))
    assert batch.images.dtype == torch.float32 and batch.images.shape == (3, 16, 24, 3)
    assert [batch.images[place].round().unique().tolist() for place in range(3)] == [[7], [9], [11]]


class Picky(Classification):
    """A task whose labels are refused by `check_labels` alone."""

    def check_labels(self, label: Tensor) -> None:
        if bool((label == 2).any()):
            raise ValueError("expected no class 2")


def test_labels_of_a_column_pass_every_check_of_their_task(files: Files) -> None:
    pipeline = build_transforms([], (16, 24), "key")
    items = ItemReader(files, "files, train", KINDS, image_form(files, (16, 24)), pipeline)
    split = FileSplit(SampleReader(items, {"kind": Picky(3)}, LABEL_OF, skips=False), torch.arange(NUM), 0)
    with pytest.raises(DataError, match=r"^files, train: kind: expected no class 2$"):
        split.labels_to_fit("kind")
    few = FileSplit(SampleReader(items, {"kind": Classification(2)}, LABEL_OF, skips=False), torch.arange(NUM), 0)
    with pytest.raises(DataError) as raised:
        few.labels_to_fit("kind")
    lines = str(raised.value).splitlines()
    why = "kind: cannot be trained on (samples with a class out of range)"
    assert all(line.endswith(f"/{item}.png: {why}") for item, line in zip((2, 8, 11), lines, strict=True))
