"""The contract of one phase: every frozen and every other tensor, by module and key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mtl.audit.watch.places import Inventory, TensorPlace, build_inventory, is_readable, is_sparse
from mtl.audit.watch.rotation import Rotation
from mtl.audit.watch.rows import num_rows, rows_in_words, split_rows
from mtl.patterns import PatternLike, partition
from mtl.patterns.module_tree import describe_modules
from mtl.runtime.tensors import overlapping
from mtl.runtime.text import parents


@dataclass(frozen=True)
class AuditTarget:
    """The audited modules.

    Attributes:
        model: The model.
        also: Other trained modules, such as losses with parameters, by the prefix of their names.
        ema: An averaged copy of the model, whose copies of frozen tensors must not change either; named `ema.*`.
    """

    model: nn.Module
    also: Mapping[str, nn.Module]
    ema: nn.Module | None

    def inventory(self) -> Inventory:
        """All modules and tensors of the model and of `also`, by every path.

        Raises:
            ValueError: A name in `also` is the name of something in the model.
        """
        found = build_inventory(self.model)
        modules, places = list(found.modules), list(found.places)
        for name, module in self.also.items():
            if any(path.split(".")[0] == name for path, _, _ in modules) or hasattr(self.model, name):
                raise ValueError(f"also: the model has something called {name!r} already; choose another name")
            # A loss that holds the model itself adds nothing to it.
            known = {id(each) for _, each, _ in modules}
            other = build_inventory(module, name)
            modules += [entry for entry in other.modules if id(entry[1]) not in known]
            places += [place for place in other.places if id(place.owner) not in known]
        return Inventory(modules, places)


@dataclass(frozen=True)
class Contract:
    """The frozen and the free tensors of a phase.

    Attributes:
        patterns: The freeze patterns.
        frozen: Every name of every frozen tensor, of frozen rows, and of the copies of these in an average.
        free: Every name of every other tensor, including tensors of which only rows are frozen.
        modules: Modules by path.
        links: The modules above registered tensors: (parent, name of its child, the child).
        pattern_of: For each frozen name, the index in `patterns` of the one that froze it.
    """

    patterns: tuple[PatternLike, ...]
    frozen: list[TensorPlace]
    free: list[TensorPlace]
    modules: dict[str, nn.Module]
    links: list[tuple[nn.Module, str, nn.Module]]
    pattern_of: dict[str, int]

    def around(self, place: TensorPlace) -> list[nn.Module]:
        """The modules around a tensor, the innermost first."""
        return [self.modules[path] for path in parents(f"{place.module_name}.{place.key}") if path in self.modules]


def build_contract(target: AuditTarget, patterns: Sequence[PatternLike]) -> Contract:
    """Resolves patterns against every tensor: parameters, buffers (persistent or not), plain attributes.

    Tensors in Python lists and dictionaries belong to the contract too, if they are frozen.

    Raises:
        PatternError: A pattern cannot be read or selects nothing.
        ValueError: A frozen tensor cannot be read, or the average has none of the frozen tensors.
    """
    inventory = target.inventory()
    by_path = {path: module for path, module, _ in inventory.modules}
    places = inventory.places
    lengths = {place.name: num_rows(place.current()) for place in places}
    full_patterns, rows = split_rows(patterns, lengths)
    split = partition(
        full_patterns,
        [place.name for place in places if place.kind == "param"],
        # A plain tensor attribute follows the rule of buffers: frozen by name, or with its module's parameters.
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
    _require_readable(frozen)
    copied = list(_copies(target.ema, names)) if target.ema is not None else []
    links = list(_links(by_path, [place for place in places if not place.is_hidden]))
    decided_by = _in_order(split.decided_by, full_patterns, patterns)
    return Contract(
        tuple(patterns), [*frozen, *sliced, *copied], free, by_path, links, _pattern_of(frozen, decided_by, places)
    )


def _require_readable(frozen: Sequence[TensorPlace]) -> None:
    for place in frozen:
        if (tensor := place.current()) is not None and not is_readable(tensor):
            raise ValueError(
                f"{place.name} is frozen, but its bytes cannot be read (quantised, nested, meta, uninitialized); take"
                f" it back with !{place.name}"
            )


def _in_order(
    decided_by: Mapping[str, int], some: Sequence[PatternLike], every: Sequence[PatternLike]
) -> dict[str, int]:
    """Turns indices into the patterns without rows into indices into all patterns."""
    places = [place for place, pattern in enumerate(every) if any(pattern is each for each in some)]
    return {name: places[index] for name, index in decided_by.items()}


def _pattern_of(
    frozen: Sequence[TensorPlace], decided_by: Mapping[str, int], places: Sequence[TensorPlace]
) -> dict[str, int]:
    """The pattern that froze each name; a buffer that no pattern names follows its module's parameters."""
    by_module = {
        place.module_name: place.name for place in places if place.kind == "param" and place.name in decided_by
    }
    found = {}
    for place in frozen:
        name = place.name if place.name in decided_by else by_module.get(place.module_name)
        if name is not None:
            found[place.name] = decided_by[name]
    return found


def _copies(ema: nn.Module, frozen: set[str]) -> Iterator[TensorPlace]:
    """The copies of frozen tensors in an average.

    Raises:
        ValueError: It has none of them.
    """
    children = list(ema.named_children())
    # Classes of many libraries keep the averaged model as their only child.
    inner = children[0][1] if len(children) == 1 and children[0][0] == "module" else ema
    copies = [place for place in build_inventory(inner).places if place.name in frozen]
    if frozen and not copies:
        raise ValueError("the average given as ema has no tensor under the name of any frozen one")
    yield from (replace(place, name=f"ema.{place.name}", is_copy=True) for place in copies)


class ModuleLinks:
    """Checks whether a module above a tensor was replaced; many modules are checked in rotation."""

    def __init__(self, contract: Contract) -> None:
        children: list[_Link] = [(module._modules, key, child) for module, key, child in contract.links]
        # torch's registration hooks observe nearly all replacements at once; this is for the rest.
        self._rotation: Rotation[_Link] = Rotation(children, 16)

    def are_cut(self, step: int) -> bool:
        """Checks the modules that are due in a step."""
        return any(
            key not in children or children[key] is not child for children, key, child in self._rotation.due(step)
        )


# The children of a module, the name of one of them, and that child.
_Link = tuple[Mapping[str, nn.Module | None], str, nn.Module]


def _child(module: nn.Module, key: str) -> nn.Module | None:
    """A module's child; without `get`, which the dictionaries of a TorchScript module lack."""
    children: Mapping[str, nn.Module | None] = module._modules
    return children[key] if key in children else None  # noqa: SIM401


def _links(modules: dict[str, nn.Module], places: list[TensorPlace]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    above = {path for place in places for path in parents(place.name)}
    for path in above - {""}:
        parent, _, key = path.rpartition(".")
        # A wrapper's child is not registered under its own name.
        if parent in modules and path in modules and _child(modules[parent], key) is modules[path]:
            yield modules[parent], key, modules[path]


def shared_memory(contract: Contract) -> list[tuple[TensorPlace, TensorPlace]]:
    """Pairs of a frozen and a free place that share bytes, of which at least one is a parameter.

    Shared buffers may be read only, such as a table of positions; one that changes is found by its bytes.
    """
    frozen, free = (
        [
            (place, tensor)
            for place in places
            if place.rows is None
            and (tensor := place.current()) is not None
            and is_readable(tensor)
            and not is_sparse(tensor)
        ]
        for places in (contract.frozen, [place for place in contract.free if not place.is_hidden])
    )
    pairs = overlapping([tensor for _, tensor in frozen], [tensor for _, tensor in free])
    found = [(frozen[one][0], free[other][0]) for one, other in pairs]
    return [pair for pair in found if "param" in (pair[0].kind, pair[1].kind)]
