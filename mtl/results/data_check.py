"""Checks a data set item by item: reads every file, names every mistake, and gives statistics of the labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from mtl.config import DistillConfig, FileData, RunConfig, SettingError, mistake_of
from mtl.config.mixed import MixedData
from mtl.data import MemorySplit, MixedSource, StoredSplit
from mtl.data.files.file_source import FileSource, open_file_sets
from mtl.data.files.fileset import IMAGE, FileSet
from mtl.data.files.problems import problems
from mtl.phases.data_source import open_source
from mtl.phases.setup import build_meta_tasks
from mtl.results.pictures import draw_samples
from mtl.runtime.text import count
from mtl.tasks import label_kinds, labels_of
from mtl.tasks.base import LabelKind

# Classes that are listed by their share, the most frequent first.
_MOST_CLASSES = 12
_NUM_PICTURES = 6


class DataCheck:
    """Reads a whole data set, and keeps what is worth a line.

    Attributes:
        mistakes: A line for each, with file and row.
    """

    def __init__(self, config: RunConfig) -> None:
        """Opens the data set.

        Raises:
            ConfigError, DataError: It cannot be opened.
        """
        self._config = config
        self._source = open_source(config)
        self._sets = dict[str, DataCheck]()
        self.mistakes: list[str] = []
        if isinstance(self._source, MixedSource):
            self._sets = {name: DataCheck(_of_set(config, self._source, name)) for name in self._source.sets}
            return
        tasks = build_meta_tasks(config, self._source)
        self._label_of = labels_of(config)
        self._kinds = label_kinds(config)
        self._tasks = {name: tasks[name] for name in self._label_of}
        taught = [name for name, own in config.tasks.items() if isinstance(own, DistillConfig)]
        self._widths = {name: tasks[name].num_outputs for name in taught}

    def lines(self) -> Iterator[str]:
        """Reads it split by split; a paragraph for each."""
        for name, own in self._sets.items():
            yield from (line if line.startswith("  ") else f"{name}: {line}" for line in own.lines())
            self.mistakes += [f"{name}: {mistake}" for mistake in own.mistakes]
        if self._sets:
            return
        if not isinstance(self._source, FileSource):
            yield from self._of_generated()
            return
        data = self._config.data
        for split, items in {**self._source.sets, **self._test_set()}.items():
            census = {name: _Census(kind) for name, kind in self._kinds.items()} | {IMAGE: _Census(None)}
            count_it: Callable[[str, Tensor], None] = partial(_count, census)
            for line in problems(items, self._kinds, self._allowed(), count_it):
                self.mistakes.append(f"{data.name}, {split}: {line}")
            yield from self._paragraph(split, len(items), census)

    def _of_generated(self) -> Iterator[str]:
        """Generated data is exact; it is made, and measured alike."""
        try:
            splits = self._source.load(self._tasks, self._label_of, quiet=False)
        except SettingError as error:
            raise mistake_of(self._config, error) from error
        for name, split in zip(("train", "val"), splits, strict=True):
            assert isinstance(split, MemorySplit | StoredSplit)
            census = {label: _Census(kind) for label, kind in self._kinds.items()} | {IMAGE: _Census(None)}
            for image in chain.from_iterable(split.image_parts()):
                census[IMAGE].add(image.permute(2, 0, 1))
            for task, label in self._label_of.items():
                for value in chain.from_iterable(split.label_parts(task)):
                    census[label].add(value)
            yield from self._paragraph(name, len(split), census)

    def _test_set(self) -> dict[str, FileSet]:
        """The test split, if the configuration names one: no run opens it."""
        data = self._config.data
        if not isinstance(data, FileData) or getattr(data, "test", None) is None:
            return {}
        return open_file_sets(data, self._kinds, ["test"])

    def draw(self, file: Path) -> None:
        """Writes a PNG with some training samples and their labels; of several data sets, one for each.

        Raises:
            DataError: One of them cannot be read.
            OSError: The file cannot be written.
        """
        for name, each in self._sets.items():
            each.draw(file.with_stem(f"{file.stem}-{name}"))
        if self._sets:
            return
        draw_samples(self._source.preview(self._tasks, self._label_of, _NUM_PICTURES), self._tasks, file)

    def _allowed(self) -> dict[str, set[int]]:
        """The class numbers that every task of a label takes."""
        allowed: dict[str, set[int]] = {}
        for name, label in self._label_of.items():
            task = self._tasks[name]
            ignored = getattr(task, "ignore_index", None)
            if self._kinds[label] in ("class", "mask") and ignored is not None:
                number = getattr(task, "num_classes", task.num_outputs)
                taken = {*range(number), ignored}
                allowed[label] = allowed.get(label, taken) & taken
        return allowed

    def _paragraph(self, split: str, num: int, census: Mapping[str, _Census]) -> Iterator[str]:
        yield f"{self._config.data.name}, {split}: {count(num, 'image')}, {census[IMAGE].of_images()}"
        for label in self._kinds:
            names = self._source.classes.get(label, ())
            yield f"  {label}: {census[label].of_labels(num, names)}"
        for task, width in self._widths.items():
            yield f"  {task}: {count(width, 'number')} an image, given by its teacher"


def _of_set(config: RunConfig, source: MixedSource, name: str) -> RunConfig:
    """A configuration with one of several data sets, and the tasks that learn from it."""
    assert isinstance(config.data, MixedData)
    tasks = {task: config.tasks[task].model_copy(update={"data": None}) for task in source.tasks_of[name]}
    return config.with_changes(data=config.data.each[name], tasks=tasks)


def _count(census: Mapping[str, _Census], name: str, value: Tensor) -> None:
    census[name].add(value)


class _Census:
    """Counts of one label, or of the images, of a split."""

    def __init__(self, kind: LabelKind | None) -> None:
        self._kind = kind
        self._num = 0
        self._classes: Counter[int] = Counter()
        self._sizes: Counter[tuple[int, ...]] = Counter()
        self._low, self._high, self._sum, self._count = float("inf"), float("-inf"), 0.0, 0
        self._mean = torch.zeros(3, dtype=torch.float64)

    def add(self, value: Tensor) -> None:
        """Counts an image or a label."""
        self._num += 1
        if self._kind is None:
            self._sizes[tuple(value.shape)] += 1
        if self._kind in ("class", "mask"):
            numbers, counts = torch.unique(value, return_counts=True)
            self._classes.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
            return
        if self._kind == "normals":
            there = value.flatten(1)[:, (value != 0).any(dim=0).flatten()].double()
            self._mean += there.sum(dim=1)
            self._count += there.shape[1]
            return
        known = value.double().flatten()
        known = known[known.isfinite() & ((known > 0) if self._kind == "depth" else True)]
        if known.numel():
            self._low, self._high = min(self._low, known.min().item()), max(self._high, known.max().item())
            self._sum += known.sum().item()
            self._count += known.numel()

    def of_images(self) -> str:
        """Sizes, channels and values in words."""
        sizes = sorted(self._sizes)
        heights, widths = ([shape[axis] for shape in sizes] for axis in (1, 2))
        channels = sorted({shape[0] for shape in sizes})
        size = f"{_range(heights)} x {_range(widths)} pixels" if sizes else "none readable"
        return f"{size}, channels {', '.join(map(str, channels))}, {self._values()}"

    def of_labels(self, num_images: int, names: Sequence[str]) -> str:
        """Coverage, and shares of classes or values, in words."""
        covered = f"{self._num} of {num_images} labelled"
        if self._kind in ("class", "mask"):
            total = sum(self._classes.values())
            listed = [
                f"{names[number] if 0 <= number < len(names) else number} {100 * each / total:.3g} %"
                for number, each in self._classes.most_common(_MOST_CLASSES)
            ]
            more = len(self._classes) - len(listed)
            return f"{covered}; {', '.join(listed)}{f', and {more} more' if more else ''}"
        if self._kind == "normals":
            mean = (self._mean / max(1, self._count)).tolist()
            return f"{covered}; mean ({', '.join(f'{axis:.3f}' for axis in mean)})"
        return f"{covered}; {self._values()}"

    def _values(self) -> str:
        if not self._count:
            return "no values"
        return f"{self._low:.4g} to {self._high:.4g}, mean {self._sum / self._count:.4g}"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"
