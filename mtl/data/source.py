"""A data set as a configuration names it, opened: what it has, before any image is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

from mtl.config import DataConfig, SettingError
from mtl.config.file_data import SplitName
from mtl.data.dataset import Batch, Split
from mtl.data.orders import Order, Shuffled
from mtl.data.transforms import Pipeline, build_transforms
from mtl.tasks import Task

TRAIN_VAL: tuple[SplitName, SplitName] = ("train", "val")


class Source(ABC):
    """A data set with a training and a validation split.

    Attributes:
        labels: The names of its labels.
        classes: The names of the classes, by label, as far as the data set knows them.
        num_images: Images in the training and in the validation split.
        channels: Channels of the images.
    """

    labels: tuple[str, ...]
    classes: Mapping[str, Sequence[str]]
    num_images: tuple[int, int]

    def labels_of(self, task: str) -> Sequence[str]:  # noqa: ARG002  several data sets need it
        """The names of the labels that a task may learn."""
        return self.labels

    def class_names(self, label_of: Mapping[str, str]) -> dict[str, Sequence[str]]:
        """The names of the classes of each task, as far as the data set knows them.

        Args:
            label_of: The name of each task's label.
        """
        return {task: self.classes.get(label, ()) for task, label in label_of.items()}

    def order(self, tasks: Collection[str]) -> Order:  # noqa: ARG002  as above
        """The order of the training images where these tasks are trained."""
        return Shuffled(self.num_images[0])

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of the images."""

    def load(self, tasks: Mapping[str, Task], label_of: Mapping[str, str], quiet: bool) -> tuple[Split, Split]:
        """The training and the validation split; arguments and errors as of `load_split`."""
        train, val = (self.load_split(which, tasks, label_of, quiet) for which in TRAIN_VAL)
        return train, val

    @abstractmethod
    def load_split(
        self, which: SplitName, tasks: Mapping[str, Task], label_of: Mapping[str, str], quiet: bool
    ) -> Split:
        """One split.

        Args:
            which: `train` with the transforms of training, `val` or `test` with those of validation.
            tasks: The tasks by name.
            label_of: The name of each task's label.
            quiet: Whether to show no progress bar.

        Raises:
            DataError: The data cannot be had.
            SettingError: The labels do not fit a task, or there is no such split.
        """

    @abstractmethod
    def preview(self, tasks: Mapping[str, Task], label_of: Mapping[str, str], num: int) -> Batch:
        """Some training samples at even distances; nothing else is read of data that lies in files.

        Args:
            tasks: The tasks by name.
            label_of: The name of each task's label.
            num: How many, at most.

        Raises:
            DataError, SettingError: As `load`.
        """


def pipelines_of(config: DataConfig) -> dict[str, Pipeline]:
    """The transforms that make samples of items, in training and in validation.

    Raises:
        SettingError: A transform cannot be had, or one of validation draws at random.
    """
    settings = {"train": config.transform.train, "val": config.transform.val}
    made = {split: build_transforms(own, config.size, f"data.transform.{split}") for split, own in settings.items()}
    if made["val"].is_random:
        names = ", ".join(each.name for each in config.transform.val)
        raise SettingError(
            "data.transform.val",
            f"validation shows images the same way every time, and one of these draws at random: {names}",
        )
    return made
