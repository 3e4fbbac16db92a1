"""`init_from`: parameters and buffers that another run or a file of tensors gives, checked before any is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl.checkpoint.files import CheckpointError
from mtl.checkpoint.tensor_file import UnreadableError, read_contents
from mtl.checkpoint.trained_run import TrainedRun, open_trained_run
from mtl.config import InitFromConfig, RunConfig, SettingError
from mtl.config.phase import patterns_of
from mtl.model.teachers import TEACHERS
from mtl.patterns import PatternError, Selection, select, text_of
from mtl.patterns.module_tree import describe
from mtl.runtime.fingerprint import fingerprint, root
from mtl.runtime.text import condense, count, hint, parents, shorten


@dataclass(frozen=True)
class Taken:
    """The tensors that one entry of `init_from` gave, as the run's history records them.

    Attributes:
        source: The checkpoint of the run, or the path of the file.
        step: The step of that checkpoint; None for a file.
        tensors: How many tensors were taken, by the pattern that decided.
        digest: One digest of them under their names there.
    """

    source: str
    step: int | None
    tensors: Mapping[str, int]
    digest: str

    def __str__(self) -> str:
        parts = ", ".join(f"{pattern} ({count(num, 'tensor')})" for pattern, num in self.tensors.items())
        return f"{self.source}: {parts}; digest {self.digest}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class InitialWeights:
    """Tensors for a new model, found to fit.

    Attributes:
        tensors: By their names in the new model.
        taken: Where they come from, an item for each entry.
        has_trunk: Whether they are all that the trunk has.
        notes: What may be a mistake, a sentence each.
    """

    tensors: Mapping[str, Tensor]
    taken: tuple[Taken, ...]
    has_trunk: bool
    notes: tuple[str, ...] = ()

    def load_into(self, module: nn.Module) -> None:
        """Puts them into the module that they were checked against, or one like it."""
        own = module.state_dict()
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                own[name].copy_(tensor)


NOTHING = InitialWeights({}, (), has_trunk=False)


def read_initial_weights(
    config: RunConfig, module: nn.Module, class_names: Mapping[str, Sequence[str]]
) -> InitialWeights:
    """Reads what `init_from` takes, and checks that all of it fits.

    Args:
        config: The run.
        module: What it is for, with the names that users write; may be on the meta device.
        class_names: By task, the names of its classes in the run's data; empty if it has none.

    Raises:
        SettingError: A source cannot be read; a pattern matches nothing there; what patterns select is not in both, or
            has another shape or type; two entries give one tensor; or nothing gives the head of an unlabelled task.
    """
    found, taken, notes = dict[str, Tensor](), list[Taken](), list[str]()
    for number, entry in enumerate(config.init_from):
        source = _WeightSource(entry, f"init_from.{number}")
        own, item = source.take(module, class_names)
        if twice := [name for name in own if name in found]:
            names = shorten(condense(twice, module.state_dict()), 4)
            raise SettingError(f"init_from.{number}.names", f"an entry before this one gives {names} already")
        found |= own
        taken.append(item)
        notes += source.notes
    expected = _own_names(module)
    for task, own_task in config.tasks.items():
        missing = [name for name in expected if name.startswith(f"heads.{task}.") and name not in found]
        if own_task.unlabelled and missing:
            message = f"nothing trains heads.{task}, and init_from does not give it"
            raise SettingError(f"tasks.{task}.unlabelled", message)
    has_trunk = all(name in found for name in expected if name.startswith("trunk."))
    return InitialWeights(found, tuple(taken), has_trunk, tuple(notes))


def _own_names(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that may be given: a teacher has weights of its own."""
    return {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(f"{TEACHERS}.")}


class _WeightSource:
    """The source of one entry's tensors."""

    def __init__(self, entry: InitFromConfig, key: str) -> None:
        self._entry, self._key = entry, key
        self._run: TrainedRun | None = None
        self.notes: list[str] = []
        try:
            if entry.run is not None:
                self._run = open_trained_run(Path(entry.run), entry.which)
                self._there, self._from = self._run.tensors(), str(self._run.checkpoint)
                self.notes += _of_unfinished(self._run)
            else:
                self._from = str(entry.weights)
                self._there = read_contents(Path(self._from)).tensors
        except (CheckpointError, UnreadableError) as error:
            raise SettingError(f"{key}.{'weights' if entry.run is None else 'run'}", str(error)) from error

    def take(self, module: nn.Module, class_names: Mapping[str, Sequence[str]]) -> tuple[dict[str, Tensor], Taken]:
        """The tensors by their names here, and the record of them."""
        here = _own_names(module)
        place = {name: number for number, name in enumerate(here)}
        there = sorted(self._there, key=lambda name: place.get(self._here(name), len(place)))
        chosen, both = self._select(there, here, module)
        problems = [*self._not_in_both(both.names, here), *self._of_another_form(chosen.names, here, class_names)]
        if problems:
            raise SettingError(f"{self._key}.names", f"{self._from} does not fit: {'; '.join(problems)}")
        tensors = {self._here(name): self._there[name] for name in chosen.names}
        self._check_tied(tensors, module)
        patterns = [text_of(pattern) for pattern in patterns_of(self._entry.names)]
        per_pattern = Counter(patterns[chosen.decided_by[name]] for name in chosen.names)
        digest = root({name: fingerprint(self._there[name]) for name in chosen.names})
        step = None if self._run is None else self._run.step
        self.notes += self._other_classes(chosen.names, class_names)
        return tensors, Taken(self._from, step, dict(per_pattern), digest)

    def _select(
        self, there: Sequence[str], here: Mapping[str, Tensor], module: nn.Module
    ) -> tuple[Selection, Selection]:
        """The source's tensors that the patterns select, and those that this model has too, by the source's names."""
        patterns, tree = patterns_of(self._entry.names), describe(module)
        for old in self._entry.rename:
            if not any(_is_below(name, old) for name in there):
                message = f"{self._from} has nothing of that name{hint(old, _modules_of(there))}"
                raise SettingError(f"{self._key}.rename.{old}", message)
        back = {new: old for old, new in self._entry.rename.items()}
        # A name here that is the new one of something there stands for that; one that was renamed stands for nothing.
        also = [_renamed(name, back) for name in here if not any(_is_below(name, old) for old in self._entry.rename)]
        try:
            return select(patterns, there, tree), select(patterns, list(dict.fromkeys([*there, *also])), tree)
        except PatternError as error:
            message = f"{error}; the names are those in {self._from}"
            raise SettingError(f"{self._key}.names.{error.index}", message) from error

    def _here(self, name: str) -> str:
        return _renamed(name, self._entry.rename)

    def _not_in_both(self, names: Sequence[str], here: Mapping[str, Tensor]) -> list[str]:
        # Older files lack this counter, which does not affect the computation.
        missing = [n for n in names if n not in self._there and not n.endswith("num_batches_tracked")]
        unexpected = [name for name in names if name in self._there and self._here(name) not in here]
        problems = []
        for what, lacking, others in (
            ("it lacks {} of the new model", missing, list(self._there)),
            ("it has {} that the new model has not", unexpected, list(here)),
        ):
            if lacking:
                parts = condense(lacking, [*names, *here])
                near = hint(self._here(parts[0]), _modules_of(others), cutoff=0.7)
                number = what.format(count(len(lacking), "tensor"))
                problems.append(f"{number}: {shorten(parts, 4)}{near}")
        return problems

    def _of_another_form(
        self, names: Sequence[str], here: Mapping[str, Tensor], class_names: Mapping[str, Sequence[str]]
    ) -> list[str]:
        shapes, types, heads = list[str](), list[str](), dict[str, None]()
        for name in names:
            new = self._here(name)
            if new not in here:
                continue
            one, other = self._there[name], here[new]
            if one.shape != other.shape:
                shapes.append(f"{name} is {tuple(one.shape)} there, {tuple(other.shape)} here")
                heads |= dict.fromkeys(_head_of(name) or ())
            # Widening keeps every value; nothing else does.
            elif torch.promote_types(one.dtype, other.dtype) != other.dtype:
                types.append(f"{name} is {one.dtype} there, {other.dtype} here".replace("torch.", ""))
        classes = self._other_classes([f"heads.{head}." for head in heads], class_names)
        found = (("of another shape", shapes), ("of another type", types))
        return [*(f"{len(each)} {what}: {shorten(each, 3)}" for what, each in found if each), *classes]

    def _other_classes(self, names: Sequence[str], class_names: Mapping[str, Sequence[str]]) -> list[str]:
        """Heads whose classes there have other names than here, in a sentence each."""
        if self._run is None:
            return []
        found = []
        for head in dict.fromkeys(task for name in names for task in _head_of(name)):
            new = "".join(_head_of(self._here(f"heads.{head}.")))
            if head not in self._run.config.tasks:
                continue
            there, here = list(self._run.class_names(head)), list(class_names.get(new, ()))
            if there and here and there != here:
                place = next((n for n, pair in enumerate(zip(there, here, strict=False)) if pair[0] != pair[1]), None)
                first = "" if place is None else f": class {place} is {there[place]} there, {here[place]} here"
                found.append(f"heads.{head} has {len(there)} classes there, {len(here)} here{first}")
        return found

    def _check_tied(self, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        """Raises `SettingError` if two names of one tensor here have two values there."""
        first: dict[int, str] = {}
        own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        for name, tensor in own:
            if name not in tensors:
                continue
            other = first.setdefault(id(tensor), name)
            if other != name and fingerprint(tensors[other]) != fingerprint(tensors[name]):
                message = f"{other} and {name} are one tensor in the new model, and two in {self._from}"
                raise SettingError(f"{self._key}.names", message)


def _of_unfinished(run: TrainedRun) -> list[str]:
    with suppress(CheckpointError):
        last = open_trained_run(run.folder, "last")
        if not last.is_at_end:
            return [f"{run.folder} is not finished: its last step so far is {last.step}, of {last.state['phase']!r}"]
    return []


def _head_of(name: str) -> tuple[str, ...]:
    """The task of a head's tensor; nothing for others."""
    parts = name.split(".")
    return (parts[1],) if parts[0] == "heads" and len(parts) > 2 else ()


def _is_below(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """A name after renaming; the longest module that is renamed decides."""
    old = max((each for each in names if _is_below(name, each)), key=len, default=None)
    return name if old is None else names[old] + name.removeprefix(old)


def _modules_of(names: Iterable[str]) -> list[str]:
    """The paths of all modules around some tensors."""
    return list(dict.fromkeys(path for name in names for path in parents(name)))
