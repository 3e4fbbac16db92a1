"""A record of one forward pass: which module calls and operations make which tensor from which.

A value is a tensor object at one version: a tensor that is changed in place is another value afterwards.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from mtl.model.trunk import Features, Kind

# They read shape, type and device of their argument, not its values.
_SHAPE_ONLY = {f"{name}_like" for name in ("empty", "full", "ones", "rand", "randn", "zeros")} | {
    f"new_{name}" for name in ("empty", "full", "ones", "tensor", "zeros")
}
# They convert tensor values to Python values, on which the code may then branch.
_READERS = {"__bool__", "__contains__", "__float__", "__index__", "__int__", "allclose", "equal", "item", "numpy"}
_READERS.add("tolist")
_CHECKPOINT = inspect.unwrap(checkpoint.checkpoint).__code__


@dataclass
class Value:
    """A tensor as it was at one version.

    Attributes:
        tensor: The tensor; referenced, so that no other gets its id.
        version: Its version.
        storage: Where its memory starts; views of each other share it.
        altered_from: The value before a change in place that was not a recorded operation on this tensor.
    """

    tensor: Tensor
    version: int
    storage: int
    altered_from: int | None = None


@dataclass
class Operation:
    """One operation on tensors.

    Attributes:
        inputs: Values that it reads.
        outputs: Values that it makes.
        changed: Those of its inputs that it changes in place.
        call: The innermost module call around it.
        is_live: Whether one of its tensors requires a gradient, or it draws random numbers.
        reads: Whether it converts tensor values to Python values.
        region: The checkpointed region that it is in, which a backward recomputes.
    """

    inputs: list[int]
    outputs: list[int]
    changed: list[int]
    call: int
    is_live: bool
    reads: bool
    region: int | None


@dataclass
class Call:
    """One call of a module; the first of a trace stands for the full pass.

    Attributes:
        name: The module's name in the trunk.
        module: The module.
        parent: The call around it; -1 for the first.
        inputs: Values of its arguments.
        mixes_images: Whether it computes statistics over the batch, or changes its buffers.
        region: The checkpointed region that it is in.
        start: The number of values before it.
        end: The number of operations when it returned.
        leaves: Its output, flattened; tensors as indices of values.
        is_tensor: Whether each leaf is a tensor.
        spec: The structure of the output.
    """

    name: str
    module: nn.Module
    parent: int
    inputs: list[int]
    mixes_images: bool
    region: int | None
    start: int
    end: int = 0
    leaves: list[Any] = field(default_factory=list)
    is_tensor: list[bool] = field(default_factory=list)
    spec: TreeSpec | None = None

    @property
    def outputs(self) -> list[int]:
        """The values that it returned."""
        return [leaf for leaf, tensor in zip(self.leaves, self.is_tensor, strict=True) if tensor]


@dataclass
class Trace:
    """A recorded pass; value 0 is the images.

    Attributes:
        values: All tensors at all versions.
        operations: All operations in order.
        calls: All module calls in the order in which they began.
        results: The features' values, in the order of `Features.tensors`.
        kinds: The kinds of the features.
    """

    values: list[Value]
    operations: list[Operation]
    calls: list[Call]
    results: list[int]
    kinds: frozenset[Kind]


def record_trace(trunk: nn.Module, read: Callable[[Tensor], Features], images: Tensor) -> Trace:
    """Runs a pass with autograd on and records it; without side effects on gradients, buffers and random numbers.

    Args:
        trunk: The module whose calls are recorded.
        read: Runs it.
        images: "b 3 h w".
    """
    recorder = _Recorder(trunk, images)
    with no_side_effects(trunk, images.device), torch.enable_grad(), recorder.hooked(), recorder:
        features = read(images)
    results = [recorder.value_of(tensor) for tensor in features.tensors()]
    return Trace(recorder.values, recorder.operations, recorder.calls, results, features.kinds)


@contextmanager
def no_side_effects(trunk: nn.Module, device: torch.device) -> Iterator[None]:
    """Runs passes on copies of the buffers, and restores the random state and autocast cache afterwards."""
    buffers = [(module, name, b) for module in trunk.modules() for name, b in module._buffers.items() if b is not None]
    copies = {id(buffer): buffer.clone() for _, _, buffer in buffers}
    devices = [] if device.type in ("cpu", "meta") else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        try:
            for module, name, buffer in buffers:
                module._buffers[name] = copies[id(buffer)]
            yield
        finally:
            for module, name, buffer in buffers:
                module._buffers[name] = buffer
            # Autocast caches cast weights; those cast without gradient would be used with gradient.
            torch.clear_autocast_cache()


class _Recorder(TorchFunctionMode):
    """Records every tensor operation called from Python, and through hooks every module call."""

    def __init__(self, trunk: nn.Module, images: Tensor) -> None:
        super().__init__()
        self._trunk = trunk
        self._device = images.device
        self._index: dict[tuple[int, int], int] = {}
        self._latest: dict[int, int] = {}
        self._frames: dict[FrameType, int] = {}
        self._buffers: list[list[Tensor]] = []
        self.values: list[Value] = []
        self.operations: list[Operation] = []
        self.calls = [Call("", trunk, -1, [self.value_of(images)], False, None, 0)]
        self._stack = [0]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Registers hooks on all modules, and removes them afterwards."""
        with ExitStack() as hooks:
            for name, module in self._trunk.named_modules():
                enter = self._enter(name)
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(self._leave).remove)
            try:
                yield
            finally:
                self._frames.clear()

    def __torch_function__(
        self, func: Any, types: Iterable[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        name = getattr(func, "__name__", "")
        given = _tensors((args, kwargs))
        inputs = [self.value_of(tensor) for tensor in given]
        is_live, random = any(tensor.requires_grad for tensor in given), self._random_state()
        versions = [tensor._version for tensor in given]
        result = func(*args, **(kwargs or {}))
        changed = [i for i, t, v in zip(inputs, given, versions, strict=True) if t._version != v]
        made = [*_tensors(result), *(self.values[i].tensor for i in changed)]
        outputs = [self._new(tensor) for tensor in made if (id(tensor), tensor._version) not in self._index]
        if outputs or name in _READERS:
            is_live |= any(tensor.requires_grad for tensor in made)
            is_live |= any(not torch.equal(a, b) for a, b in zip(random, self._random_state(), strict=True))
            inputs = [] if name in _SHAPE_ONLY else inputs
            self._add(inputs, outputs, changed, is_live, name in _READERS)
        return result

    def value_of(self, tensor: Tensor) -> int:
        """The index of a tensor's current value."""
        known = self._index.get((id(tensor), tensor._version))
        return self._new(tensor, self._latest.get(id(tensor))) if known is None else known

    def _new(self, tensor: Tensor, altered_from: int | None = None) -> int:
        number = len(self.values)
        self.values.append(Value(tensor, tensor._version, tensor.untyped_storage().data_ptr(), altered_from))
        self._index[id(tensor), tensor._version] = self._latest[id(tensor)] = number
        return number

    def _add(self, inputs: list[int], outputs: list[int], changed: list[int], is_live: bool, reads: bool) -> None:
        self.operations.append(Operation(inputs, outputs, changed, self._stack[-1], is_live, reads, self._region()))

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            with torch._C.DisableTorchFunction():
                inputs = [self.value_of(tensor) for tensor in _tensors((args, kwargs))]
                buffers = [b.clone() for b in module._buffers.values() if b is not None] if module.training else []
                self._buffers.append(buffers)
                mixes = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
                self.calls.append(Call(name, module, self._stack[-1], inputs, mixes, self._region(), len(self.values)))
                self._stack.append(len(self.calls) - 1)

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        del args
        call = self.calls[self._stack[-1]]
        with torch._C.DisableTorchFunction():
            leaves, call.spec = tree_flatten(output)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            # Made by code that the mode cannot record, such as a scripted function: assumed to read all arguments.
            unseen = [self._new(t) for t in tensors if (id(t), t._version) not in self._index]
            if unseen:
                self._add(call.inputs, unseen, [], any(t.requires_grad for t in tensors), False)
            before, now = self._buffers.pop(), [b for b in module._buffers.values() if b is not None]
            call.mixes_images |= module.training and not (
                len(before) == len(now)
                # On the meta device there are no values to compare: assume no change.
                and all(a.is_meta or torch.equal(a, b) for a, b in zip(before, now, strict=True))
            )
        call.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        call.leaves = [self.value_of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        call.end = len(self.operations)
        self._stack.pop()

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type not in ("cpu", "meta"):
            states.append(torch.get_device_module(self._device).get_rng_state(self._device))
        return states

    def _region(self) -> int | None:
        """The outermost `checkpoint` on the stack; frames are referenced, so that their ids stay unique."""
        frame: FrameType | None = sys._getframe()
        found = None
        while frame is not None:
            found = frame if frame.f_code is _CHECKPOINT else found
            frame = frame.f_back
        return None if found is None else self._frames.setdefault(found, len(self._frames))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
