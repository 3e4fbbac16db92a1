"""Samples with the labels of tasks: one form for each task, and its value for none where a label is missing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl.data.cache import DataError
from mtl.data.files.items import ItemReader, Sample, first_labels, words
from mtl.data.files.mistakes import Mistakes
from mtl.runtime.fingerprint import fingerprint, fingerprint_of_json
from mtl.tasks import Task
from mtl.tasks.base import SPATIAL


@dataclass(frozen=True)
class _Form:
    """The form of a task's labels.

    Attributes:
        shape: Of one label.
        dtype: In which it is stored: uint8 where that holds the value for none, else int32, int64 or float32.
        none: The label of a sample that has none; None if the task type has no such value.
    """

    shape: torch.Size
    dtype: torch.dtype
    none: Tensor | None


class SampleReader:
    """Reads the samples of a split, with labels in the form in which tasks take them.

    Attributes:
        place: The data set and the split, as messages name them.
        form: That of the images.
        tasks: The tasks by name.
        label_of: The name of each task's label.
    """

    def __init__(self, reader: ItemReader, tasks: Mapping[str, Task], label_of: Mapping[str, str], skips: bool) -> None:
        """Reads the first label of each task, whose form all others have.

        Args:
            reader: Reads the data set's items.
            tasks: The tasks by name.
            label_of: The name of each task's label.
            skips: Whether items that cannot be read are passed over.

        Raises:
            DataError: No item has a task's label, or one cannot be read.
        """
        self._reader = reader
        self.place, self.form = reader.place, reader.form
        self.tasks = tasks
        self.label_of = {name: label_of[name] for name in tasks}
        first = first_labels(reader, self.label_of, skips)
        self._forms = {name: _form_of(task, first[name]) for name, task in tasks.items()}

    def read(
        self, index: int, with_image: bool, seed: int | None = None, tasks: Collection[str] | None = None
    ) -> Sample:
        """One sample, its labels by task.

        Args:
            index: Which item.
            with_image: As for `ItemReader.read`.
            seed: As for `ItemReader.read`.
            tasks: The tasks whose labels are read; all if not given.

        Raises:
            DataError: It cannot be read; a label has another form than the first one, or its task cannot be trained on
                it.
        """
        own = self.label_of if tasks is None else tasks
        names = sorted({self.label_of[name] for name in own})
        sample = self._reader.read(index, names, with_image, seed)
        labels = {name: self._of_task(name, sample.labels.get(self.label_of[name]), index) for name in own}
        return Sample(sample.image, labels)

    def column(self, name: str, items: Tensor) -> Tensor | None:
        """A task's label of several items at once, first axis n; None if that takes reading of files.

        Args:
            name: The task.
            items: "n", int64.

        Raises:
            DataError: The task cannot be trained on them; the message names every item, or the first ones of many.
        """
        label, task, form = self.label_of[name], self.tasks[name], self._forms[name]
        column = None if self._reader.kinds[label] in SPATIAL else self._reader.items.column(label)
        if column is None:
            return None
        column = column[items]
        lacks = column.isnan() if column.ndim == 1 else column.isnan().all(dim=1)
        labels = column.to(form.dtype)
        if bool(lacks.any()):
            labels[lacks] = self._none(name, int(items[lacks][0]))
        taken, mistakes = labels.float() if form.dtype.is_floating_point else labels.long(), Mistakes()
        for item in items[task.bad_samples(taken)].tolist():
            mistakes.add(f"{self._reader.where(item)}: {label}: cannot be trained on ({task.why_bad})")
        mistakes.check()
        try:
            task.check_labels(taken)
        except ValueError as error:
            raise DataError(f"{self.place}: {label}: {error}") from error
        return labels

    def identity(self, items: Tensor, name: str) -> str | None:
        """A digest of images, or of a label of theirs, as they are read here; None if the data set cannot tell.

        Args:
            items: "n", int64.
            name: `image`, or the data set's name of a label.

        Raises:
            DataError: Files are not there.
        """
        own = self._reader.items.identity(items.tolist(), name)
        return None if own is None else fingerprint_of_json([own, fingerprint(items), self._reader.describe()])

    def empty(self, name: str, num: int) -> Tensor:
        """Room for the labels of a task, first axis n."""
        form = self._forms[name]
        return torch.zeros((num, *form.shape), dtype=form.dtype)

    def _none(self, name: str, index: int) -> Tensor:
        """The label of a task for an item that has none; raises `DataError` if the task type has no such value."""
        none = self._forms[name].none
        if none is None:
            where, kind = f"{self._reader.where(index)}: {self.label_of[name]}", type(self.tasks[name]).__name__
            raise DataError(f"{where}: is missing, and {kind} needs a label for every image")
        return none

    def _of_task(self, name: str, label: Tensor | None, index: int) -> Tensor:
        if label is None:
            return self._none(name, index)
        form, task, own = self._forms[name], self.tasks[name], f"{self._reader.where(index)}: {self.label_of[name]}"
        if label.shape != form.shape or label.is_floating_point() != form.dtype.is_floating_point:
            expected = words(torch.empty(form.shape, dtype=form.dtype))
            raise DataError(f"{own}: expected {expected} as the first one has, got {words(label)}")
        stored = label.to(form.dtype)
        taken = (stored.float() if form.dtype.is_floating_point else label.long())[None]
        try:
            task.check_labels(taken)
        except ValueError as error:
            raise DataError(f"{own}: {error}") from error
        if bool(task.bad_samples(taken).any()):
            raise DataError(f"{own}: cannot be trained on ({task.why_bad})")
        return stored


def _form_of(task: Task, first: Tensor) -> _Form:
    is_float = first.is_floating_point()
    taken = first.float() if is_float else first.long()
    try:
        none = task.unlabelled(taken)
    except NotImplementedError:
        none = None
    if is_float:
        return _Form(first.shape, torch.float32, none)
    fits = none is None or torch.equal(none.to(torch.uint8).long(), none)
    narrow = torch.uint8 if first.dtype == torch.uint8 and fits else torch.int32 if first.ndim else torch.int64
    return _Form(first.shape, narrow, None if none is None else none.to(narrow))
