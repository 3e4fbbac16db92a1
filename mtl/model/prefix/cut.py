"""Where a recorded pass can be cut: which module calls can be skipped, and which of their outputs must be kept.

A value is *constant* (independent of the images), *static* (computed from images without trainable parameters or random
numbers), or *live*. A call that makes only static values can be skipped. Static values that live operations read are
traced back to the outputs of skipped calls, which are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mtl.model.prefix.trace import Call, Operation, Trace, Value

_CONSTANT, _STATIC, _LIVE = 0, 1, 2


class PrefixError(ValueError):
    """The reason why a trunk's prefix cannot be kept."""


@dataclass(frozen=True)
class Extent:
    """The extent of one dimension of a tensor.

    Attributes:
        number: The extent, or how much of it there is per image.
        per_image: Whether it grows with the batch.
    """

    number: int
    per_image: bool = False

    def of(self, batch: int) -> int:
        """The extent for a number of images."""
        return self.number * batch if self.per_image else self.number


@dataclass(frozen=True)
class Cut:
    """The module calls to skip and the outputs to keep.

    Attributes:
        skipped: Calls that are skipped; none is inside another.
        kept: Values that are kept, batch first; the results if the whole trunk is static.
        shapes: Shapes of the tensors that the skipped calls return.
        changed: Storages that operations outside the skipped calls change in place.
        readers: Names of the modules in which live operations read kept values.
        is_first: Whether all kept values are made before the first live operation.
        all_static: Whether the whole trunk is static.
    """

    skipped: list[int]
    kept: list[int]
    shapes: dict[int, tuple[Extent, ...]]
    changed: set[int]
    readers: list[str]
    is_first: bool
    all_static: bool


def find_cut(trace: Trace, other: Trace) -> Cut:
    """Decides where to cut.

    Args:
        trace: A pass.
        other: A pass of fewer of these images, which shows how shapes grow with the batch.

    Raises:
        PrefixError: Nothing can be kept, or the two passes differ in more than the number of images.
    """
    return _Cutter(trace, other).cut()


class _Cutter:
    def __init__(self, trace: Trace, other: Trace) -> None:
        if [(c.name, c.parent) for c in trace.calls] != [(c.name, c.parent) for c in other.calls]:
            raise PrefixError("the trunk does not call the same modules for every batch")
        self.trace = trace
        self.state = [_CONSTANT] * len(trace.values)
        self.is_live = self._follow_forward()
        self.noisy = {0}.union(*(self._around(operation.call) for operation in self._live_operations()))
        self.shapes: dict[int, tuple[Extent, ...]] = {}
        self.twins: dict[int, Value] = {}
        self._size_value(0, 0, other)
        pairs = enumerate(zip(trace.calls, other.calls, strict=True))
        self.sized = {number for number, (call, twin) in pairs if self._size(call, twin, other)}
        self._size_results(other)

    def cut(self) -> Cut:
        trace = self.trace
        if all(self.state[value] == _STATIC for value in trace.results):
            if not all(map(self._is_batch_first, trace.results)):
                raise PrefixError("the features are not batch first")
            self._check_each_image_alone(trace.results)
            return Cut([], list(dict.fromkeys(trace.results)), self.shapes, set(), [], True, True)
        opened: set[int] = set()
        while wrong := self._not_to_skip(opened):
            opened |= wrong
        self._open_what_costs_memory(opened)
        skipped, kept, readers = self._skipped(opened), *self._needed(opened)
        if not kept:
            raise PrefixError("the features are made of nothing that could be kept")
        self._check_each_image_alone(kept)
        made_in = self._maker(skipped)
        last = max(trace.calls[made_in[value]].end for value in kept)
        first_live = min(number for number, live in enumerate(self.is_live) if live)
        if not any(any(True for _ in trace.calls[call].module.parameters()) for call in skipped):
            raise PrefixError(_no_prefix(readers[0]))
        changed = {trace.values[value].storage for operation in self._visible(skipped) for value in operation.changed}
        return Cut(skipped, kept, self.shapes, changed, readers, last <= first_live, False)

    def _follow_forward(self) -> list[bool]:
        """Sets the state of every value; returns which operations are live."""
        values, calls = self.trace.values, self.trace.calls
        self.state[0] = _STATIC
        live = []
        for operation in self.trace.operations:
            for value in operation.inputs:
                origin = values[value].altered_from
                if origin is not None:
                    self.state[value] = max(self.state[value], self.state[origin])
            state = max((self.state[value] for value in operation.inputs), default=_CONSTANT)
            if operation.is_live or any(calls[call].mixes_images for call in self._around(operation.call)):
                state = _LIVE
            for value in operation.outputs:
                self.state[value] = state
            live.append(state == _LIVE)
        return live

    def _around(self, call: int) -> list[int]:
        """A call and the calls around it, without the first, which stands for the full pass."""
        found = []
        while call > 0:
            found.append(call)
            call = self.trace.calls[call].parent
        return found

    def _live_operations(self) -> list[Operation]:
        return [operation for operation, live in zip(self.trace.operations, self.is_live, strict=True) if live]

    def _size(self, call: Call, twin: Call, other: Trace) -> bool:
        """Records how the shapes of a call's outputs grow with the batch; returns whether that is known for all."""
        if call.is_tensor != twin.is_tensor or call.spec != twin.spec:
            return False
        for one, two, is_tensor in zip(call.leaves, twin.leaves, call.is_tensor, strict=True):
            if is_tensor and not self._size_value(one, two, other):
                return False
            # Other outputs must be plain values that are the same for every batch, since a replay returns them.
            if not is_tensor and (not isinstance(one, int | float | str | None) or one != two):
                return False
        return True

    def _size_value(self, one: int, two: int, other: Trace) -> bool:
        a, b = self.trace.values[one].tensor, other.values[two].tensor
        num_a, num_b = len(self.trace.values[0].tensor), len(other.values[0].tensor)
        sizes = []
        for size, twin in zip(a.shape, b.shape, strict=False):
            per_image = size != twin
            if per_image and (size % num_a or size // num_a * num_b != twin):
                return False
            sizes.append(Extent(size // num_a, True) if per_image else Extent(size))
        self.shapes[one], self.twins[one] = tuple(sizes), other.values[two]
        return a.ndim == b.ndim and a.dtype == b.dtype

    def _size_results(self, other: Trace) -> None:
        for one, two in zip(self.trace.results, other.results, strict=True):
            if not self._size_value(one, two, other):
                raise PrefixError("a feature's shape does not grow with the number of images")

    def _skipped(self, opened: set[int]) -> list[int]:
        """The outermost calls that can be skipped and are not opened."""
        found: list[int] = []
        inside: set[int] = set()
        for number, call in enumerate(self.trace.calls):
            if call.parent in inside:
                inside.add(number)
            elif number not in self.noisy and number not in opened and number in self.sized and self._makes(call):
                found.append(number)
                inside.add(number)
        return found

    def _makes(self, call: Call) -> bool:
        """Whether all tensors that a call returns are new and static."""
        return bool(call.outputs) and all(o >= call.start and self.state[o] == _STATIC for o in call.outputs)

    def _visible(self, skipped: list[int]) -> list[Operation]:
        """Operations outside skipped calls."""
        hidden = set(skipped)
        return [operation for operation in self.trace.operations if hidden.isdisjoint(self._around(operation.call))]

    def _maker(self, skipped: list[int]) -> dict[int, int]:
        return {value: call for call in skipped for value in self.trace.calls[call].outputs}

    def _needed(self, opened: set[int]) -> tuple[list[int], list[str]]:
        """Values that must be kept if all calls but the opened ones are skipped, and the modules that read them."""
        skipped = self._skipped(opened)
        visible, made_in = self._visible(skipped), self._maker(skipped)
        made_by = {value: operation for operation in visible for value in operation.outputs}
        kept: set[int] = set()
        readers: dict[str, None] = {}
        todo = [(value, "") for value in self.trace.results]
        todo += [(v, self._name(s)) for s in visible if s.reads or self._is_live(s) for v in s.inputs]
        seen: set[int] = set()
        for value, reader in todo:
            if self.state[value] != _STATIC:
                continue
            if reader:
                readers.setdefault(reader)
            if value in seen:
                continue
            seen.add(value)
            if value in made_in:
                kept.add(value)
            elif value in made_by:
                todo += [(source, reader) for source in made_by[value].inputs]
            elif value == 0:
                raise PrefixError(_no_prefix(reader))
            else:
                raise PrefixError(f"{reader or 'a feature'} needs a tensor that is changed in place under another name")
        return sorted(kept), list(readers)

    def _is_live(self, operation: Operation) -> bool:
        return any(self.state[value] == _LIVE for value in operation.outputs)

    def _name(self, operation: Operation) -> str:
        return self.trace.calls[operation.call].name or "the trunk itself"

    def _not_to_skip(self, opened: set[int]) -> set[int]:
        """Calls that cannot be skipped after all: they are run, and their inputs are kept instead."""
        skipped = self._skipped(opened)
        # A backward recomputes these regions, and then without replacements for skipped calls.
        live_regions = {each.region for each in self._visible(skipped) if self._is_live(each)} - {None}
        wrong = {call for call in skipped if self.trace.calls[call].region in live_regions}
        if wrong:
            return wrong
        made_in = self._maker(skipped)
        return {made_in[value] for value in self._needed(opened)[0] if not self._is_batch_first(value)}

    def _is_batch_first(self, value: int) -> bool:
        first, *others = self.shapes[value] or (Extent(1),)
        return first == Extent(1, True) and not any(size.per_image for size in others)

    def _check_each_image_alone(self, kept: Iterable[int]) -> None:
        """Raises `PrefixError` if a kept value of an image depends on the other images of the batch.

        The tolerance allows for rounding: kernels for other batch sizes round differently, most of all with TF32 or
        half precision.
        """
        for value, twin in ((self.trace.values[number], self.twins[number]) for number in kept):
            tensor = value.tensor
            if tensor._version != value.version or not tensor.is_floating_point() or tensor.is_meta:
                continue  # changed since, or without values to compare
            two = twin.tensor.detach().double()
            one = value.tensor.detach()[: len(two)].double()
            if (one - two).norm() > (0.01 if value.tensor.dtype.itemsize > 2 else 0.05) * two.norm():
                raise PrefixError("frozen modules mix the images of a batch, so nothing can be kept per image")

    def _open_what_costs_memory(self, opened: set[int]) -> None:
        """Opens a cheap call, one without a weight matrix, if less has to be kept then."""
        for call in self._skipped(opened):
            wider = {*opened, call}
            if any(parameter.ndim > 1 for parameter in self.trace.calls[call].module.parameters()):
                continue
            try:
                if not self._not_to_skip(wider) and self._bytes(wider) < self._bytes(opened):
                    opened.add(call)
            except PrefixError:
                continue

    def _bytes(self, opened: set[int]) -> int:
        return num_bytes(self.trace, self._needed(opened)[0])


def _no_prefix(reader: str) -> str:
    return f"{reader or 'a feature'} needs the images, and no frozen module is before it"


def num_bytes(trace: Trace, values: Iterable[int]) -> int:
    """Size of values in bytes, for all images of a pass."""
    return sum(trace.values[value].tensor.numel() * trace.values[value].tensor.element_size() for value in values)
