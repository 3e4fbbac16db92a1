"""The contract of one phase: the tensors that must not move, and all others, each by the place where it hangs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mtl.audit.places import Module, Place, every_module, is_readable, is_sparse, places_in
from mtl.audit.rows import num_rows, rows_in_words, split_rows
from mtl.moduletree import describe_modules
from mtl.names import parents
from mtl.patterns import PatternLike, partition
from mtl.storage import overlapping


@dataclass(frozen=True)
class Subject:
    """What a contract is about.

    Attributes:
        model: The model.
        also: Modules beside it that take part in training, such as losses that learn, by the names put before theirs.
        ema: An averaged copy of the model, whose frozen tensors must not move either; named `ema.*`.
    """

    model: nn.Module
    also: Mapping[str, nn.Module]
    ema: nn.Module | None

    def modules(self) -> list[Module]:
        """Every module of the model and those beside it, by every path.

        Raises:
            ValueError: A module beside the model is to be called as something inside it is.
        """
        found = every_module(self.model)
        for name, module in self.also.items():
            if any(path.split(".")[0] == name for path, _, _ in found) or hasattr(self.model, name):
                raise ValueError(f"also: the model has something called {name!r} already; choose another name")
            # A loss that holds the model itself adds nothing to it.
            known = {each for _, each, _ in found}
            found += [entry for entry in every_module(module, name) if entry[1] not in known]
        return found


@dataclass(frozen=True)
class Contract:
    """What is frozen in a phase, and what is not.

    Attributes:
        patterns: The patterns it was drawn from.
        frozen: Every name of every frozen tensor, rows of tensors, and what an average has of them.
        free: Every name of every other tensor; one of which only rows are frozen is free as well.
        modules: Modules by path.
        links: The ways to all tensors that torch knows: (module, name of its child, the child).
    """

    patterns: tuple[PatternLike, ...]
    frozen: list[Place]
    free: list[Place]
    modules: dict[str, nn.Module]
    links: list[tuple[nn.Module, str, nn.Module]]

    def is_unlinked(self) -> bool:
        """Whether a module on the way to a tensor is no longer the one it was."""
        return any(module._modules.get(key) is not child for module, key, child in self.links)

    def around(self, place: Place) -> list[nn.Module]:
        """The modules that a tensor hangs in, the innermost first."""
        return [self.modules[path] for path in parents(f"{place.module_name}.{place.key}") if path in self.modules]


def draw_contract(subject: Subject, patterns: Sequence[PatternLike]) -> Contract:
    """Resolves patterns against every tensor: parameters, buffers (persistent or not), plain attributes.

    What hangs in Python lists and dictionaries is held to the contract too, if it is frozen.

    Raises:
        PatternError: A pattern cannot be read or selects nothing.
        ValueError: A frozen tensor cannot be read, or the average has none of what is frozen.
    """
    modules = subject.modules()
    by_path = {path: module for path, module, _ in modules}
    places = list(places_in(modules))
    lengths = {place.name: num_rows(place.look()) for place in places}
    whole, rows = split_rows(patterns, lengths)
    split = partition(
        whole,
        [place.name for place in places if place.kind == "param"],
        # A plain tensor attribute follows the rule of buffers: frozen by name, or with the parameters beside it.
        [place.name for place in places if place.kind != "param"],
        describe_modules(by_path),
    )
    names = {*split.frozen, *split.frozen_buffers}
    frozen = [place for place in places if place.name in names]
    free = [place for place in places if place.name not in names]
    sliced = [
        replace(place, name=rows_in_words(place.name, part), rows=part)
        for place in free
        for part in rows.get(place.name, ())
    ]
    for place in frozen:
        if (tensor := place.look()) is not None and not is_readable(tensor):
            raise ValueError(
                f"{place.name} is frozen, but its bytes cannot be read (quantised, nested, meta, not yet made);"
                f" take it back with !{place.name}"
            )
    copied = list(_copies(subject.ema, names)) if subject.ema is not None else []
    links = list(_links(by_path, [place for place in places if not place.hidden]))
    return Contract(tuple(patterns), [*frozen, *sliced, *copied], free, by_path, links)


def _copies(ema: nn.Module, frozen: set[str]) -> Iterator[Place]:
    """What an average has of the frozen tensors.

    Raises:
        ValueError: It has none of them.
    """
    children = list(ema.named_children())
    # Classes of many libraries keep the averaged model as their only child.
    inner = children[0][1] if len(children) == 1 and children[0][0] == "module" else ema
    copies = [place for place in places_in(every_module(inner)) if place.name in frozen]
    if frozen and not copies:
        raise ValueError("the average given as ema has no tensor under the name of any frozen one")
    yield from (replace(place, name=f"ema.{place.name}", is_copy=True) for place in copies)


def _links(modules: dict[str, nn.Module], places: list[Place]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    on_the_way = {path for place in places for path in parents(place.name)}
    for path in on_the_way - {""}:
        parent, _, key = path.rpartition(".")
        # Inside a wrapper, the child is not there under its own name.
        if parent in modules and path in modules and modules[parent]._modules.get(key) is modules[path]:
            yield modules[parent], key, modules[path]


def shared_memory(contract: Contract) -> list[tuple[Place, Place]]:
    """Pairs of a frozen and a free place that have bytes in common, of which at least one is a parameter.

    Buffers may be shared and only read, such as a table of positions; one that moves is found by its bytes.
    """
    frozen, free = (
        [
            (place, tensor)
            for place in places
            if place.rows is None
            and (tensor := place.look()) is not None
            and is_readable(tensor)
            and not is_sparse(tensor)
        ]
        for places in (contract.frozen, [place for place in contract.free if not place.hidden])
    )
    pairs = overlapping([tensor for _, tensor in frozen], [tensor for _, tensor in free])
    found = [(frozen[one][0], free[other][0]) for one, other in pairs]
    return [pair for pair in found if "param" in (pair[0].kind, pair[1].kind)]
