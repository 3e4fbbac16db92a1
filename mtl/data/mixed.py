"""Several data sets, opened as one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from mtl.config import DataConfig, GeneratedData, SettingError
from mtl.config.errors import OptionsError
from mtl.config.file_data import SplitName
from mtl.config.mixed import SHARED, MixedData
from mtl.data.cache import DataError
from mtl.data.dataset import Batch, Split
from mtl.data.files.mistakes import LabelError
from mtl.data.generated.generated_source import check_room
from mtl.data.mixed_split import MixedPart, MixedSplit
from mtl.data.orders import Order, mixed_order
from mtl.data.source import Source
from mtl.runtime.text import hint
from mtl.tasks import Task


class MixedSource(Source):
    """Several data sets as one. A task learns from those that it names, or all that have its label.

    Attributes: as of every data set, and
        sets: The data sets by name.
        tasks_of: The tasks that learn from each.
    """

    def __init__(
        self,
        config: MixedData,
        label_of: Mapping[str, str],
        chosen: Mapping[str, Sequence[str]],
        has_teachers: bool,
        open_one: Callable[[str, Sequence[str]], Source],
    ) -> None:
        """Opens each data set.

        Args:
            config: Which ones.
            label_of: The name of each task's label.
            chosen: The data sets of each task that names them.
            has_teachers: Whether there are tasks that learn from every image, without any label.
            open_one: Opens the data set of a name for the tasks that may learn from it.

        Raises:
            SettingError: One cannot be had, a task names one that there is not or that lacks its label, the classes of
                a task's sets differ, or no task learns from one.
            DataError: Something of one cannot be read.
        """
        self._config = config
        for task, names in chosen.items():
            for number, name in enumerate(names):
                if name not in config.sets:
                    there = f"there are: {', '.join(config.sets)}{hint(name, config.sets)}"
                    raise SettingError(f"tasks.{task}.data.{number}", f"no data set {name!r}; {there}")
        self.sets = dict[str, Source]()
        for name in config.sets:
            may_learn = [task for task in label_of if name in chosen.get(task, config.sets)]
            with self._at(name):
                self.sets[name] = open_one(name, may_learn)
        self.labels = tuple(dict.fromkeys(label for own in self.sets.values() for label in own.labels))
        # A label that no set has is named at its task.
        is_free = has_teachers or not set(self.labels).issuperset(label_of.values())
        self.tasks_of = {name: self._learn_from(name, label_of, chosen, is_free) for name in self.sets}
        self._check(label_of)
        self.classes = {f"{name}/{label}": n for name, own in self.sets.items() for label, n in own.classes.items()}
        num_train, num_val = zip(*(own.num_images for own in self.sets.values()), strict=True)
        self.num_images = (sum(num_train), sum(num_val))
        self._chosen = chosen

    @property
    def channels(self) -> int:
        return max(own.channels for own in self.sets.values())

    def labels_of(self, task: str) -> Sequence[str]:
        names = self._chosen.get(task, self.sets)
        return list(dict.fromkeys(label for name in names for label in self.sets[name].labels))

    def class_names(self, label_of: Mapping[str, str]) -> dict[str, Sequence[str]]:
        return {task: self._class_names(task, label) for task, label in label_of.items()}

    def order(self, tasks: Collection[str]) -> Order:
        sizes = {name: own.num_images[0] for name, own in self.sets.items()}
        labelled = {name: set(self.tasks_of[name]) & set(tasks) for name in self.sets}
        return mixed_order(sizes, labelled, tasks, self._config.mix)

    def load_split(
        self, which: SplitName, tasks: Mapping[str, Task], label_of: Mapping[str, str], quiet: bool
    ) -> Split:
        parts = list[MixedPart]()
        for name, own in self.sets.items():
            learn = self.tasks_of[name]
            with self._at(name):
                split = own.load_split(which, {t: tasks[t] for t in learn}, {t: label_of[t] for t in learn}, quiet)
            parts.append(MixedPart(name, split, learn))
        return MixedSplit(parts, tasks, self._config.mix)

    def preview(self, tasks: Mapping[str, Task], label_of: Mapping[str, str], num: int) -> Batch:
        """Samples of the first data set alone."""
        name, own = next(iter(self.sets.items()))
        learn = self.tasks_of[name]
        return own.preview({t: tasks[t] for t in learn}, {t: label_of[t] for t in learn}, num)

    def _learn_from(
        self, name: str, label_of: Mapping[str, str], chosen: Mapping[str, Sequence[str]], is_free: bool
    ) -> tuple[str, ...]:
        """The tasks that learn from a data set."""
        labels, learn = self.sets[name].labels, list[str]()
        for task, label in label_of.items():
            if label in labels and name in chosen.get(task, self.sets):
                learn.append(task)
            elif name in chosen.get(task, ()):
                there = f"it has: {', '.join(labels)}{hint(label, labels)}"
                raise SettingError(f"tasks.{task}.data", f"{name} has no label {label!r}; {there}")
        if not learn and not is_free:
            has = f"it has: {', '.join(labels)}"
            raise SettingError(f"data.sets.{name}", f"no task learns from it; {has}")
        return tuple(learn)

    def _check(self, label_of: Mapping[str, str]) -> None:
        """Raises `SettingError` if a task's data sets name its classes differently."""
        for task, label in label_of.items():
            named = [
                (name, tuple(own.classes[label]))
                for name, own in self.sets.items()
                if task in self.tasks_of[name] and own.classes.get(label)
            ]
            for name, classes in named[1:]:
                if classes != named[0][1]:
                    first = f"{named[0][0]} ({', '.join(named[0][1][:3])}, ...)"
                    raise SettingError(
                        f"tasks.{task}",
                        f"its classes are others in {first} than in {name} ({', '.join(classes[:3])}, ...);"
                        " tasks.x.data chooses the data sets of a task",
                    )

    def _class_names(self, task: str, label: str) -> Sequence[str]:
        found = (own.classes.get(label, ()) for name, own in self.sets.items() if task in self.tasks_of[name])
        return next((names for names in found if names), ())

    @contextmanager
    def _at(self, name: str) -> Iterator[None]:
        """Names the data set in errors about it."""
        try:
            with _at_its_key(self._config, name):
                yield
        except LabelError:
            raise
        except DataError as error:
            raise DataError(f"{name}: {error}") from error


def check_rooms(config: DataConfig) -> None:
    """As `check_room`, of whatever is made of one data set or several."""
    if isinstance(config, GeneratedData):
        check_room(config)
    if isinstance(config, MixedData):
        for name, own in config.each.items():
            with _at_its_key(config, name):
                check_rooms(own)


@contextmanager
def _at_its_key(config: MixedData, name: str) -> Iterator[None]:
    """Names in errors the key of one of several data sets, where those of a single one name its key."""
    try:
        yield
    except SettingError as error:
        head, _, rest = error.key.partition(".")
        key = rest.partition(".")[0]
        is_shared = key in (*SHARED, "transform") and key not in config.sets[name].model_fields_set
        if head != "data" or isinstance(error, OptionsError) or is_shared:
            raise
        raise SettingError(f"data.sets.{name}.{rest}", error.message) from error
