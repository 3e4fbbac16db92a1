"""Where a recorded pass can be cut: which module calls need not be run again, and what is kept in their place.

A value is *constant* (no image is in it), *still* (made of images by what neither trains nor draws random numbers), or
*live*. A call that makes still values only can be skipped. What live operations read of still values has to be there:
it is followed back to the outputs of skipped calls, and these are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mtl.model.prefix.trace import Call, Step, Trace, Value

_CONSTANT, _STILL, _LIVE = 0, 1, 2


class PrefixError(ValueError):
    """The reason why a trunk's prefix cannot be kept."""


@dataclass(frozen=True)
class Size:
    """An extent of a tensor.

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
    """What to skip and what to keep.

    Attributes:
        skipped: Calls that are skipped; none lies in another.
        kept: Values that are kept, batch first; with nothing that trains, the results.
        shapes: Shapes of the tensors that the skipped calls return.
        changed: Storages that operations which are not skipped change in place.
        readers: Names of the modules in which kept values meet what trains.
        is_first: Whether all that is kept is made before the first live operation.
        all_still: Whether nothing trains at all.
    """

    skipped: list[int]
    kept: list[int]
    shapes: dict[int, tuple[Size, ...]]
    changed: set[int]
    readers: list[str]
    is_first: bool
    all_still: bool


def find_cut(trace: Trace, other: Trace) -> Cut:
    """Decides where to cut.

    Args:
        trace: A pass.
        other: A pass of fewer of these images, which tells how shapes grow with the batch.

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
        self.noisy = {0}.union(*(self._around(step.call) for step in self._live_steps()))
        self.shapes: dict[int, tuple[Size, ...]] = {}
        self.twins: dict[int, Value] = {}
        self._size_value(0, 0, other)
        pairs = enumerate(zip(trace.calls, other.calls, strict=True))
        self.sized = {number for number, (call, twin) in pairs if self._size(call, twin, other)}
        self._size_results(other)

    def cut(self) -> Cut:
        trace = self.trace
        if all(self.state[value] == _STILL for value in trace.results):
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
        changed = {trace.values[value].storage for step in self._visible(skipped) for value in step.changed}
        return Cut(skipped, kept, self.shapes, changed, readers, last <= first_live, False)

    def _follow_forward(self) -> list[bool]:
        """Sets the state of every value; returns which steps are live."""
        values, calls = self.trace.values, self.trace.calls
        self.state[0] = _STILL
        live = []
        for step in self.trace.steps:
            for value in step.inputs:
                origin = values[value].altered_from
                if origin is not None:
                    self.state[value] = max(self.state[value], self.state[origin])
            state = max((self.state[value] for value in step.inputs), default=_CONSTANT)
            if step.trains or any(calls[call].mixes_images for call in self._around(step.call)):
                state = _LIVE
            for value in step.outputs:
                self.state[value] = state
            live.append(state == _LIVE)
        return live

    def _around(self, call: int) -> list[int]:
        """A call and those that it lies in, without the pass as a whole."""
        found = []
        while call > 0:
            found.append(call)
            call = self.trace.calls[call].parent
        return found

    def _live_steps(self) -> list[Step]:
        return [step for step, live in zip(self.trace.steps, self.is_live, strict=True) if live]

    def _size(self, call: Call, twin: Call, other: Trace) -> bool:
        """Finds how a call's outputs grow with the batch; whether that is known for all of them."""
        if call.is_tensor != twin.is_tensor or call.spec != twin.spec:
            return False
        for one, two, is_tensor in zip(call.leaves, twin.leaves, call.is_tensor, strict=True):
            if is_tensor and not self._size_value(one, two, other):
                return False
            # What else is returned is given again as it is: plain values, which are the same for every batch.
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
            sizes.append(Size(size // num_a, True) if per_image else Size(size))
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
        """Whether all tensors that a call returns are new, and made of images."""
        return bool(call.outputs) and all(o >= call.start and self.state[o] == _STILL for o in call.outputs)

    def _visible(self, skipped: list[int]) -> list[Step]:
        """Steps outside skipped calls."""
        hidden = set(skipped)
        return [step for step in self.trace.steps if hidden.isdisjoint(self._around(step.call))]

    def _maker(self, skipped: list[int]) -> dict[int, int]:
        return {value: call for call in skipped for value in self.trace.calls[call].outputs}

    def _needed(self, opened: set[int]) -> tuple[list[int], list[str]]:
        """Values that must be kept if all calls but the opened ones are skipped, and where they meet what trains."""
        skipped = self._skipped(opened)
        visible, made_in = self._visible(skipped), self._maker(skipped)
        made_by = {value: step for step in visible for value in step.outputs}
        kept: set[int] = set()
        readers: dict[str, None] = {}
        todo = [(value, "") for value in self.trace.results]
        todo += [(v, self._name(s)) for s in visible if s.reads or self._is_live(s) for v in s.inputs]
        seen: set[int] = set()
        for value, reader in todo:
            if self.state[value] != _STILL:
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

    def _is_live(self, step: Step) -> bool:
        return any(self.state[value] == _LIVE for value in step.outputs)

    def _name(self, step: Step) -> str:
        return self.trace.calls[step.call].name or "the trunk itself"

    def _not_to_skip(self, opened: set[int]) -> set[int]:
        """Calls that cannot be skipped after all: they are run, and what they are made of is kept instead."""
        skipped = self._skipped(opened)
        # A backward runs these regions again, without what stands in for a skipped call.
        trained_regions = {step.region for step in self._visible(skipped) if self._is_live(step)} - {None}
        wrong = {call for call in skipped if self.trace.calls[call].region in trained_regions}
        if wrong:
            return wrong
        made_in = self._maker(skipped)
        return {made_in[value] for value in self._needed(opened)[0] if not self._is_batch_first(value)}

    def _is_batch_first(self, value: int) -> bool:
        first, *others = self.shapes[value] or (Size(1),)
        return first == Size(1, True) and not any(size.per_image for size in others)

    def _check_each_image_alone(self, kept: Iterable[int]) -> None:
        """Raises `PrefixError` if what is kept of an image is another in another batch.

        Kernels for other batch sizes round in other ways, most of all with TF32 or half precision.
        """
        for value, twin in ((self.trace.values[number], self.twins[number]) for number in kept):
            tensor = value.tensor
            if tensor._version != value.version or not tensor.is_floating_point() or tensor.is_meta:
                continue  # its numbers have changed since, or it has none
            two = twin.tensor.detach().double()
            one = value.tensor.detach()[: len(two)].double()
            if (one - two).norm() > (0.01 if value.tensor.dtype.itemsize > 2 else 0.05) * two.norm():
                raise PrefixError("what is frozen mixes the images of a batch, so nothing can be kept per image")

    def _open_what_costs_memory(self, opened: set[int]) -> None:
        """Runs a cheap call, one without a matrix of weights, if less has to be kept then."""
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
    return f"{reader or 'a feature'} needs the images, and no frozen module lies before it"


def num_bytes(trace: Trace, values: Iterable[int]) -> int:
    """Size of values for all images of a pass."""
    return sum(trace.values[value].tensor.numel() * trace.values[value].tensor.element_size() for value in values)
