"""The labels of tasks from those of a data set: one form for each task, and its value for none where one is missing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl.data.cache import DataError
from mtl.data.items import words
from mtl.tasks import Task


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


class Labelling:
    """Puts the labels of a data set's items into the form in which tasks take them.

    Attributes:
        tasks: The tasks by name.
        label_of: The name of each task's label.
    """

    def __init__(self, tasks: Mapping[str, Task], label_of: Mapping[str, str], first: Mapping[str, Tensor]) -> None:
        """Args:
        tasks: The tasks by name.
        label_of: The name of each task's label.
        first: A label of each task, by its name, whose form all others have.
        """
        self.tasks = tasks
        self.label_of = {name: label_of[name] for name in tasks}
        self._forms = {name: _form_of(task, first[name]) for name, task in tasks.items()}

    def names(self, tasks: Collection[str] | None = None) -> list[str]:
        """The labels that some tasks learn; all tasks if not given."""
        return sorted({label for name, label in self.label_of.items() if tasks is None or name in tasks})

    def of(self, labels: Mapping[str, Tensor], where: str, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        """The labels of one item, by task.

        Args:
            labels: By the data set's names; those that are missing are left out.
            where: The item, as messages name it.
            tasks: The tasks; all if not given.

        Raises:
            DataError: One has another form than the first one, or its task cannot be trained on it.
        """
        own = self.label_of if tasks is None else tasks
        return {name: self.of_task(name, labels.get(self.label_of[name]), where) for name in own}

    def of_column(self, name: str, column: Tensor, where: Callable[[int], str]) -> Tensor:
        """A task's label of all items, first axis n.

        Args:
            name: The task.
            column: From `FileSet.column`.
            where: An item, as messages name it.

        Raises:
            DataError: A task cannot be trained on them; the message names every item, or the first ones of many.
        """
        task, form, is_missing = self.tasks[name], self._forms[name], column.isnan()
        lacks = is_missing if column.ndim == 1 else is_missing.all(dim=1)
        labels = column.to(form.dtype)
        if bool(lacks.any()):
            labels[lacks] = self.none(name, where(int(lacks.nonzero()[0])))
        bad = task.bad_samples(labels.float() if form.dtype.is_floating_point else labels.long())
        if bool(bad.any()):
            places = bad.nonzero().flatten().tolist()
            why = (task.bad_samples.__doc__ or "").strip().lower().rstrip(".")
            lines = [f"{where(place)}: {self.label_of[name]}: cannot be trained on ({why})" for place in places[:20]]
            raise DataError("\n".join(lines + [f"and {len(places) - 20} more"] * (len(places) > 20)))
        return labels

    def none(self, name: str, where: str) -> Tensor:
        """The label of a task for an item that has none.

        Raises:
            DataError: The task type has no such value.
        """
        none = self._forms[name].none
        if none is None:
            kind = type(self.tasks[name]).__name__
            raise DataError(f"{where}: {self.label_of[name]}: is missing, and {kind} needs a label for every image")
        return none

    def empty(self, name: str, num: int) -> Tensor:
        """Room for the labels of a task, first axis n."""
        form = self._forms[name]
        return torch.zeros((num, *form.shape), dtype=form.dtype)

    def of_task(self, name: str, label: Tensor | None, where: str) -> Tensor:
        """The label of one item as a task takes it. Raises `DataError` as `of` does."""
        if label is None:
            return self.none(name, where)
        form, task, own = self._forms[name], self.tasks[name], f"{where}: {self.label_of[name]}"
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
            why = (task.bad_samples.__doc__ or "").strip().lower().rstrip(".")
            raise DataError(f"{own}: cannot be trained on ({why})")
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
