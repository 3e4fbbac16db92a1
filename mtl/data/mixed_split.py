"""One half of several data sets as one split: one after the other, each with the labels that it has."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl.config.mixed import MixConfig
from mtl.data.augment import View
from mtl.data.cache import DataError
from mtl.data.dataset import Rows, Split, as_taken
from mtl.data.orders import Order, mixed_order
from mtl.runtime.fingerprint import fingerprint_of_json
from mtl.tasks import Task


@dataclass(frozen=True)
class MixedPart:
    """One of the data sets.

    Attributes:
        name: Its name among them.
        split: Its images, with labels of some tasks.
        tasks: These tasks.
    """

    name: str
    split: Split
    tasks: tuple[str, ...]


class MixedSplit(Split):
    """Several splits, one after the other; an image has no label of the tasks that do not learn from its data set."""

    def __init__(self, parts: Sequence[MixedPart], tasks: Mapping[str, Task], mix: MixConfig) -> None:
        """Reads the first sample of each part.

        Args:
            parts: The splits; all images are of one size.
            tasks: All tasks.
            mix: How training images are mixed.

        Raises:
            DataError: Parts differ in channels, or in the form of a task's label; or a task type needs a label for
                every image.
        """
        self._parts, self._tasks, self._mix = parts, tasks, mix
        self._starts = torch.tensor([0, *(len(part.split) for part in parts)]).cumsum(0)
        self.num_skipped = sum(part.split.num_skipped for part in parts)
        self.is_in_memory = all(part.split.is_in_memory for part in parts)
        # Grey images are shown to each of three channels.
        if len(several := {part.split.channels for part in parts} - {1}) > 1:
            raise DataError(f"expected images of as many channels in each data set, got {sorted(several)}")
        self._channels = max(part.split.channels for part in parts)
        first = [part.split.batch(torch.tensor([0])) for part in parts]
        self._is_float = any(batch.images.is_floating_point() for batch in first)
        self._none = {name: self._none_of(name, [batch.labels for batch in first]) for name in tasks}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def size(self) -> tuple[int, int]:
        return self._parts[0].split.size

    @property
    def channels(self) -> int:
        return self._channels

    def order(self, tasks: Collection[str]) -> Order:
        sizes = {part.name: len(part.split) for part in self._parts}
        labelled = {part.name: set(part.tasks) & set(tasks) for part in self._parts}
        return mixed_order(sizes, labelled, tasks, self._mix)

    def examples(self, num: int) -> Tensor:
        """Of each data set in turn."""
        own = [start + torch.arange(min(num, len(part.split))) for part, start in self._placed]
        in_turn = [part[at] for at in range(num) for part in own if at < len(part)]
        return torch.stack(in_turn[:num]).sort().values

    def rows(self, indices: Tensor, with_images: bool, view: View | None = None) -> Rows:
        labels = {name: none.expand(len(indices), *none.shape).clone() for name, none in self._none.items()}
        images: Tensor | None = None
        has_label = set[str]()
        for part, start in self._placed:
            here = ((indices >= start) & (indices < start + len(part.split))).nonzero().flatten()
            if not len(here):
                continue
            rows = part.split.rows(indices[here] - start, with_images, _view_of(view, part))
            if rows.fault:
                return rows
            for name in part.tasks:
                labels[name][here] = as_taken(rows.labels[name])
            has_label |= set(part.tasks) - rows.lacking
            if rows.images is not None:
                own = rows.images.float() if self._is_float else rows.images
                if images is None:
                    images = own.new_empty((len(indices), *self.size, self._channels))
                images[here] = own
        return Rows(labels, images, frozenset(self._tasks) - has_label)

    def labels_to_fit(self, task: str) -> Tensor:
        found = [as_taken(part.split.labels_to_fit(task)) for part in self._parts if task in part.tasks]
        return torch.cat(found)

    def identity(self) -> str | None:
        return _joined([part.split.identity() for part in self._parts])

    def label_identity(self, task: str) -> str | None:
        return _joined([part.split.label_identity(task) for part in self._parts if task in part.tasks])

    @property
    def _placed(self) -> list[tuple[MixedPart, int]]:
        return list(zip(self._parts, self._starts.tolist(), strict=False))

    def _none_of(self, name: str, first: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The label of an image without one, in the form that all parts have."""
        pairs = zip(self._parts, first, strict=True)
        own = {part.name: labels[name][0] for part, labels in pairs if name in part.tasks}
        if len(shapes := {tuple(label.shape) for label in own.values()}) > 1:
            raise DataError(f"{name}: expected labels of one shape in {', '.join(own)}, got {sorted(shapes)}")
        label = next(iter(own.values()))
        if len(own) == len(self._parts):
            return torch.zeros_like(label)
        try:
            return self._tasks[name].unlabelled(label)
        except NotImplementedError as error:
            lacking = next(part.name for part in self._parts if name not in part.tasks)
            raise DataError(f"{lacking} has no label of {name!r}, and {error}") from error


def _view_of(view: View | None, part: MixedPart) -> View | None:
    """The view of a part: images of the same index in several parts change in different ways."""
    return None if view is None else replace(view, place=part.name)


def _joined(digests: Sequence[str | None]) -> str | None:
    return None if any(digest is None for digest in digests) else fingerprint_of_json(list(digests))
