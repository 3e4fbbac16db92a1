"""What happens in one forward pass: which module calls and operations make which tensor from which.

A tensor that is changed in place is another value afterwards: a value is a tensor object together with its version.
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

from mtl.model.trunk import Features

# They take shape, type and device of what they are given, not its numbers.
_SHAPE_ONLY = {f"{name}_like" for name in ("empty", "full", "ones", "rand", "randn", "zeros")} | {
    f"new_{name}" for name in ("empty", "full", "ones", "tensor", "zeros")
}
# They turn numbers of a tensor into Python's, on which the code may then branch.
_READERS = {"__bool__", "__contains__", "__float__", "__index__", "__int__", "allclose", "equal", "item", "numpy"}
_READERS.add("tolist")
_CHECKPOINT = inspect.unwrap(checkpoint.checkpoint).__code__


@dataclass
class Value:
    """A tensor as it was at one version.

    Attributes:
        tensor: The tensor; held, so that no other gets its id.
        version: Its version.
        storage: Where its memory starts; views of each other share it.
        altered_from: The value it was before something else than a recorded operation on it changed it.
    """

    tensor: Tensor
    version: int
    storage: int
    altered_from: int | None = None


@dataclass
class Step:
    """One operation.

    Attributes:
        inputs: Values whose numbers it reads.
        outputs: Values that it makes.
        changed: Those of its inputs that it changes in place.
        call: The innermost module call around it.
        trains: Whether a tensor in it needs a gradient, or it draws random numbers.
        reads: Whether it turns numbers into Python's.
        region: The checkpointed region that it is in, which a backward runs again.
    """

    inputs: list[int]
    outputs: list[int]
    changed: list[int]
    call: int
    trains: bool
    reads: bool
    region: int | None


@dataclass
class Call:
    """One call of a module; the first of a trace stands for the pass as a whole.

    Attributes:
        name: The module's name in the trunk.
        module: The module.
        parent: The call around it; -1 for the first.
        inputs: Values that it was given.
        mixes_images: Whether it computes statistics over the batch, or changes its buffers.
        region: The checkpointed region that it is in.
        start: How many values there were before it.
        end: How many steps there were when it returned.
        leaves: What it returned, flattened: the index of a value for a tensor.
        spec: How the leaves are put together.
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
        """Values that it returned."""
        return [leaf for leaf, tensor in zip(self.leaves, self.is_tensor, strict=True) if tensor]


@dataclass
class Trace:
    """A recorded pass; value 0 is the images.

    Attributes:
        values: All tensors at all versions.
        steps: All operations in their order.
        calls: All module calls in the order in which they began.
        results: The features' values, the pooled vector last.
        has_pooled: Whether there is one.
    """

    values: list[Value]
    steps: list[Step]
    calls: list[Call]
    results: list[int]
    has_pooled: bool


def tensors_of(features: Features) -> list[Tensor]:
    """The pyramid, then the pooled vector if there is one."""
    return [*features.pyramid, *([] if features.pooled is None else [features.pooled])]


def record_trace(trunk: nn.Module, read: Callable[[Tensor], Features], images: Tensor) -> Trace:
    """Runs a pass with autograd on and writes down what happens; gradients, buffers and random numbers stay.

    Args:
        trunk: The module whose calls are recorded.
        read: Runs it.
        images: "b 3 h w".
    """
    recorder = _Recorder(trunk, images)
    with untouched(trunk, images.device), torch.enable_grad(), recorder.watching(), recorder:
        features = read(images)
    results = [recorder.see(tensor) for tensor in tensors_of(features)]
    return Trace(recorder.values, recorder.steps, recorder.calls, results, features.pooled is not None)


@contextmanager
def untouched(trunk: nn.Module, device: torch.device) -> Iterator[None]:
    """Lets passes run that leave no trace: on copies of the buffers, and with random numbers as if nothing had run."""
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
            # Autocast keeps the weights that it cast; those cast without gradient would be used with gradient.
            torch.clear_autocast_cache()


class _Recorder(TorchFunctionMode):
    """Sees every operation on tensors that Python asks for, and through hooks every module call."""

    def __init__(self, trunk: nn.Module, images: Tensor) -> None:
        super().__init__()
        self._trunk = trunk
        self._device = images.device
        self._index: dict[tuple[int, int], int] = {}
        self._latest: dict[int, int] = {}
        self._frames: dict[FrameType, int] = {}
        self._buffers: list[list[Tensor]] = []
        self.values: list[Value] = []
        self.steps: list[Step] = []
        self.calls = [Call("", trunk, -1, [self.see(images)], False, None, 0)]
        self._stack = [0]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks hang in the modules, and afterwards none does."""
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
        inputs = [self.see(tensor) for tensor in given]
        trains, random = any(tensor.requires_grad for tensor in given), self._random_state()
        versions = [tensor._version for tensor in given]
        result = func(*args, **(kwargs or {}))
        changed = [i for i, t, v in zip(inputs, given, versions, strict=True) if t._version != v]
        made = [*_tensors(result), *(self.values[i].tensor for i in changed)]
        outputs = [self._new(tensor) for tensor in made if (id(tensor), tensor._version) not in self._index]
        if outputs or name in _READERS:
            trains |= any(tensor.requires_grad for tensor in made)
            trains |= any(not torch.equal(a, b) for a, b in zip(random, self._random_state(), strict=True))
            inputs = [] if name in _SHAPE_ONLY else inputs
            self._step(inputs, outputs, changed, trains, name in _READERS)
        return result

    def see(self, tensor: Tensor) -> int:
        """The value that a tensor is now."""
        known = self._index.get((id(tensor), tensor._version))
        return self._new(tensor, self._latest.get(id(tensor))) if known is None else known

    def _new(self, tensor: Tensor, altered_from: int | None = None) -> int:
        number = len(self.values)
        self.values.append(Value(tensor, tensor._version, tensor.untyped_storage().data_ptr(), altered_from))
        self._index[id(tensor), tensor._version] = self._latest[id(tensor)] = number
        return number

    def _step(self, inputs: list[int], outputs: list[int], changed: list[int], trains: bool, reads: bool) -> None:
        self.steps.append(Step(inputs, outputs, changed, self._stack[-1], trains, reads, self._region()))

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            with torch._C.DisableTorchFunction():
                inputs = [self.see(tensor) for tensor in _tensors((args, kwargs))]
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
            # Made by code that the mode cannot see, such as a scripted function: of what the module was given.
            unseen = [self._new(t) for t in tensors if (id(t), t._version) not in self._index]
            if unseen:
                self._step(call.inputs, unseen, [], any(t.requires_grad for t in tensors), False)
            before, now = self._buffers.pop(), [b for b in module._buffers.values() if b is not None]
            call.mixes_images |= module.training and not (
                len(before) == len(now)
                # Without numbers, on the meta device, nothing is known to have changed.
                and all(a.is_meta or torch.equal(a, b) for a, b in zip(before, now, strict=True))
            )
        call.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        call.leaves = [self.see(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        call.end = len(self.steps)
        self._stack.pop()

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type not in ("cpu", "meta"):
            states.append(torch.get_device_module(self._device).get_rng_state(self._device))
        return states

    def _region(self) -> int | None:
        """The outermost `checkpoint` that is under way; frames are held, so that no other takes their place."""
        frame: FrameType | None = sys._getframe()
        found = None
        while frame is not None:
            found = frame if frame.f_code is _CHECKPOINT else found
            frame = frame.f_back
        return None if found is None else self._frames.setdefault(found, len(self._frames))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
