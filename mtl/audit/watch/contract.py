"""The contract of one phase: the tensors that must not move, and all others, each by the place where it hangs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mtl.audit.watch.places import Inventory, Place, is_readable, is_sparse, take_inventory
from mtl.audit.watch.rotation import Turns
from mtl.audit.watch.rows import num_rows, rows_in_words, split_rows
from mtl.patterns import PatternLike, partition
from mtl.patterns.module_tree import describe_modules
from mtl.runtime.tensors import overlapping
from mtl.runtime.text import parents


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

    def inventory(self) -> Inventory:
        """All that hangs in the model and the modules beside it, by every path.

        Raises:
            ValueError: A module beside the model is to be called as something inside it is.
        """
        found = take_inventory(self.model)
        modules, places = list(found.modules), list(found.places)
        for name, module in self.also.items():
            if any(path.split(".")[0] == name for path, _, _ in modules) or hasattr(self.model, name):
                raise ValueError(f"also: the model has something called {name!r} already; choose another name")
            # A loss that holds the model itself adds nothing to it.
            known = {id(each) for _, each, _ in modules}
            beside = take_inventory(module, name)
            modules += [entry for entry in beside.modules if id(entry[1]) not in known]
            places += [place for place in beside.places if id(place.owner) not in known]
        return Inventory(modules, places)


@dataclass(frozen=True)
class Contract:
    """What is frozen in a phase, and what is not.

    Attributes:
        patterns: The patterns it was drawn from.
        frozen: Every name of every frozen tensor, rows of tensors, and what an average has of them.
        free: Every name of every other tensor; one of which only rows are frozen is free as well.
        modules: Modules by path.
        links: The ways to all tensors that torch knows: (module, name of its child, the child).
        pattern_of: For each name of something frozen, the place in `patterns` of the one that froze it.
    """

    patterns: tuple[PatternLike, ...]
    frozen: list[Place]
    free: list[Place]
    modules: dict[str, nn.Module]
    links: list[tuple[nn.Module, str, nn.Module]]
    pattern_of: dict[str, int]

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
    inventory = subject.inventory()
    by_path = {path: module for path, module, _ in inventory.modules}
    places = inventory.places
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
    decided_by = _in_order(split.decided_by, whole, patterns)
    return Contract(
        tuple(patterns), [*frozen, *sliced, *copied], free, by_path, links, _who_froze(frozen, decided_by, places)
    )


def _in_order(
    decided_by: Mapping[str, int], some: Sequence[PatternLike], every: Sequence[PatternLike]
) -> dict[str, int]:
    """The deciding patterns by their places among all, of which rows were taken out."""
    places = [place for place, pattern in enumerate(every) if any(pattern is each for each in some)]
    return {name: places[index] for name, index in decided_by.items()}


def _who_froze(frozen: Sequence[Place], decided_by: Mapping[str, int], places: Sequence[Place]) -> dict[str, int]:
    """Which pattern froze each name; a buffer of which none says anything follows the parameters beside it."""
    beside = {place.module_name: place.name for place in places if place.kind == "param" and place.name in decided_by}
    found = {}
    for place in frozen:
        name = place.name if place.name in decided_by else beside.get(place.module_name)
        if name is not None:
            found[place.name] = decided_by[name]
    return found


def _copies(ema: nn.Module, frozen: set[str]) -> Iterator[Place]:
    """What an average has of the frozen tensors.

    Raises:
        ValueError: It has none of them.
    """
    children = list(ema.named_children())
    # Classes of many libraries keep the averaged model as their only child.
    inner = children[0][1] if len(children) == 1 and children[0][0] == "module" else ema
    copies = [place for place in take_inventory(inner).places if place.name in frozen]
    if frozen and not copies:
        raise ValueError("the average given as ema has no tensor under the name of any frozen one")
    yield from (replace(place, name=f"ema.{place.name}", is_copy=True) for place in copies)


class Links:
    """Tells whether a module on the way to a tensor is no longer the one it was; of many ways, in turn."""

    def __init__(self, contract: Contract) -> None:
        children: list[_Link] = [(module._modules, key, child) for module, key, child in contract.links]
        # Nearly all that cuts one is told of by torch, at once; this is for the rest.
        self._turns: Turns[_Link] = Turns(children, 16)

    def are_cut(self, step: int) -> bool:
        """Looks at those that are due in a step."""
        return any(key not in children or children[key] is not child for children, key, child in self._turns.due(step))


# The children of a module, the name of one of them, and that child.
_Link = tuple[Mapping[str, nn.Module | None], str, nn.Module]


def _child(module: nn.Module, key: str) -> nn.Module | None:
    """A module's child; no `get`, which the dictionaries of a TorchScript module do not have."""
    children: Mapping[str, nn.Module | None] = module._modules
    return children[key] if key in children else None  # noqa: SIM401


def _links(modules: dict[str, nn.Module], places: list[Place]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    on_the_way = {path for place in places for path in parents(place.name)}
    for path in on_the_way - {""}:
        parent, _, key = path.rpartition(".")
        # Inside a wrapper, the child is not there under its own name.
        if parent in modules and path in modules and _child(modules[parent], key) is modules[path]:
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
