"""The frozen first part of a trunk, stored per image: computed once, and skipped in later epochs.

    prefix = Prefix.record(trunk, read, images)      # raises PrefixError if there is nothing to keep
    features, kept = prefix.run(images)              # a plain pass, and the tensors to keep
    features = prefix.replay(rows_of_several_kept)   # the same features; no frozen module is run

A replay runs the trunk's own code, with the `forward` of frozen modules replaced during the call: modules whose output
is read by trainable ones return the kept tensors, others return placeholders of the right shape. A prefix is valid for
the freeze and the train/eval modes it was recorded with; record another after a change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mtl.model.prefix.cut import Cut, PrefixError, find_cut
from mtl.model.prefix.skipped_calls import Skip, kept_tensor, placeholder, plan_skips
from mtl.model.prefix.trace import Trace, no_side_effects, record_trace
from mtl.model.trunk import Features, features_from
from mtl.runtime.tensors import byte_view

__all__ = ["Prefix", "PrefixError"]

Read = Callable[[Tensor], Features]
Forward = Callable[..., Any]
# Comparing two passes of these batch sizes shows which dimensions grow with the batch.
_FEW, _FEWER = 3, 2
# A model's own code can raise them when it reads placeholders.
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, ArithmeticError)


class _Complete(BaseException):
    """All tensors to keep are computed. Not an `Exception`, so that no model's code catches it."""


class Prefix:
    """The part of a trunk that need not be recomputed, and how to run the trunk without it.

    Attributes:
        shapes: Shape of each kept tensor for one image.
        dtypes: Type of each kept tensor.
        orders: Of each kept tensor, the dimensions, batch included, from the widest stride to the narrowest.
        bytes_per_image: Size of all kept tensors for one image.
        modules: Names of the modules that a replay skips; empty if it skips the whole trunk.
        readers: Names of the modules in which trainable operations read kept tensors; empty if the trunk is frozen.
    """

    def __init__(self, trunk: nn.Module, read: Read, trace: Trace, cut: Cut) -> None:
        """Use `record` or `forecast` instead."""
        self._trunk, self._read = trunk, read
        self._kept = [kept_tensor(trace, cut, value) for value in cut.kept]
        self._images = placeholder(trace, cut, 0)
        self._plan = plan_skips(trace, cut)
        self._is_first = cut.is_first
        # In a frozen trunk the features themselves are kept; these are their indices among the kept tensors.
        self._results = [cut.kept.index(value) for value in trace.results] if cut.all_static else None
        self._kinds = trace.kinds
        self._trainable = _trainable_names(trunk)
        self.shapes = [kept.shape for kept in self._kept]
        self.dtypes = [kept.dtype for kept in self._kept]
        self.orders = [kept.order for kept in self._kept]
        self.bytes_per_image = sum(math.prod(kept.shape) * kept.dtype.itemsize for kept in self._kept)
        self.modules = tuple(dict.fromkeys(trace.calls[call].name for call in cut.skipped))

    @classmethod
    def record(cls, trunk: nn.Module, read: Read, images: Tensor) -> Prefix:
        """Finds the prefix by passes of a few images, which have no side effects on the trunk.

        Args:
            trunk: The trunk, with the freeze and the train/eval modes of later passes.
            read: Reads the features from the trunk, such as `partial(read_features, trunk, levels=..., pooled=...)`.
            images: "b 3 h w", at least one; of the size, type, layout and device of later ones. Autocast must be as in
                later passes.

        Raises:
            PrefixError: Nothing can be kept, or a replay does not give the same features.
        """
        if any(_is_compiled(module) for module in trunk.modules()):
            raise PrefixError("the operations of a compiled module cannot be traced")
        # Flips make three different images of a single one.
        few = (images if len(images) >= _FEW else torch.cat([images, images.flip(-1), images.flip(-2)]))[:_FEW]
        trace = record_trace(trunk, read, few)
        prefix = cls(trunk, read, trace, find_cut(trace, record_trace(trunk, read, few[:_FEWER])))
        try:
            same = prefix.agrees(few)
        except _ERRORS as error:
            raise PrefixError(f"the trunk does not run without its frozen modules: {error}") from error
        if not same:
            raise PrefixError("without its frozen modules the trunk does not give the same features")
        return prefix

    @classmethod
    def forecast(cls, trunk: nn.Module, read: Read, images: Tensor) -> Prefix:
        """The prefix that `record` would find, judged by shapes only; works on the meta device.

        Args, Raises: as for `record`, with three images.
        """
        trace = record_trace(trunk, read, images)
        return cls(trunk, read, trace, find_cut(trace, record_trace(trunk, read, images[:_FEWER])))

    def bytes_in(self, dtype: torch.dtype) -> int:
        """Size of all kept tensors for one image, if floats are kept in this type."""
        return sum(
            math.prod(shape) * (dtype if own.is_floating_point else own).itemsize
            for shape, own in zip(self.shapes, self.dtypes, strict=True)
        )

    def run(self, images: Tensor) -> tuple[Features, list[Tensor]]:
        """A plain pass.

        Args:
            images: "b 3 h w".

        Returns:
            The features, and the tensors to keep: batch first, detached.
        """
        # Not under no_grad: no parameter of the prefix requires a gradient, so there is no graph, and trainable modules
        # could not change views made under no_grad in place.
        kept: dict[int, Tensor] = {}
        with self._in_place_of_modules(partial(self._capture, kept)):
            features = self._read(images)
        return features, self._in_order(kept, features)

    def compute(self, images: Tensor) -> list[Tensor]:
        """Only the tensors to keep: the pass stops once they are computed.

        Args:
            images: "b 3 h w".

        Returns:
            The same as the second value of `run`.
        """
        kept: dict[int, Tensor] = {}

        def capture(skip: Skip, forward: Forward, args: Any, kwargs: Any) -> Any:
            output = self._capture(kept, skip, forward, args, kwargs)
            if len(kept) == len(self._kept):
                raise _Complete
            return output

        features = Features([], None)
        # A trainable part on another path may run before the end of the prefix: its statistics must not move.
        with nullcontext() if self._is_first else no_side_effects(self._trunk, images.device):
            try:
                with torch.no_grad(), self._in_place_of_modules(capture):
                    features = self._read(images)
            except _Complete:
                pass
        return self._in_order(kept, features)

    def replay(self, kept: Sequence[Tensor]) -> Features:
        """The features of the images whose tensors were kept; trainable parameters get gradients as in a plain pass.

        Args:
            kept: The tensors from `run` or `compute`, or rows of them for any images, in any layout; not changed.

        Raises:
            ValueError: A shape or type differs from the recorded one.
        """
        for tensor, expected in zip(kept, self._kept, strict=True):
            if tuple(tensor.shape[1:]) != expected.shape or tensor.dtype != expected.dtype:
                raise ValueError(
                    f"expected a kept tensor of shape (b, {str(expected.shape)[1:]} and type {expected.dtype},"
                    f" got {tuple(tensor.shape)} and {tensor.dtype}"
                )
        tensors = [expected.laid_out(tensor) for tensor, expected in zip(kept, self._kept, strict=True)]
        if self._results is not None:
            return features_from([tensors[number] for number in self._results], self._kinds)
        batch, device = len(tensors[0]), tensors[0].device

        def fill(skip: Skip, forward: Forward, args: Any, kwargs: Any) -> Any:
            del forward, args, kwargs
            return skip.output(tensors, batch, device)

        with self._in_place_of_modules(fill):
            return self._read(self._images.make(batch, device))

    def agrees(self, images: Tensor) -> bool:
        """Whether `run`, `compute` and `replay` give the bits of a plain pass; runs all four, without side effects.

        False if other parameters are trainable than when the prefix was recorded: gradients would be missing.

        Args:
            images: "b 3 h w".
        """
        if _trainable_names(self._trunk) != self._trainable:
            return False
        # Detached at once: three passes' activations need not be in memory together.
        with no_side_effects(self._trunk, images.device), torch.enable_grad():
            plain = [tensor.detach() for tensor in self._read(images).tensors()]
        with no_side_effects(self._trunk, images.device), torch.enable_grad():
            features, kept = self.run(images)
            ran = [tensor.detach() for tensor in features.tensors()]
            del features
        # In the layout of rows that were stored.
        kept = [tensor.clone(memory_format=torch.contiguous_format) for tensor in kept]
        with no_side_effects(self._trunk, images.device), torch.enable_grad():
            replayed = [tensor.detach() for tensor in self.replay(kept).tensors()]
        with no_side_effects(self._trunk, images.device):
            computed = self.compute(images)
        pairs = [(plain, ran), (plain, replayed), (kept, computed)]
        return all(len(one) == len(two) and all(map(_same_bits, one, two)) for one, two in pairs)

    def _capture(self, kept: dict[int, Tensor], skip: Skip, forward: Forward, args: Any, kwargs: Any) -> Any:
        """Runs a module of the prefix and records the tensors to keep."""
        output = forward(*args, **kwargs)
        for slot, leaf in zip(skip.slots, tree_leaves(output), strict=True):
            if slot.kept is not None:
                kept[slot.kept] = leaf.detach().clone() if self._kept[slot.kept].changes else leaf.detach()
        return output

    def _in_order(self, kept: dict[int, Tensor], features: Features) -> list[Tensor]:
        if self._results is not None:
            kept = {n: tensor.detach() for n, tensor in zip(self._results, features.tensors(), strict=True)}
        return [kept[number] for number in range(len(self._kept))]

    @contextmanager
    def _in_place_of_modules(self, replacement: Callable[[Skip, Forward, Any, Any], Any]) -> Iterator[None]:
        """Calls `replacement` instead of `forward` at every module call that a replay skips."""
        inside = False

        def swapped(name: str, forward: Forward, skips: Iterator[Skip | None]) -> Forward:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                if inside:
                    return forward(*args, **kwargs)
                try:
                    skip = next(skips)
                except StopIteration:
                    message = f"the trunk calls {name} more often than when its prefix was recorded"
                    raise PrefixError(message) from None
                if skip is None:
                    return forward(*args, **kwargs)
                inside = True
                try:
                    return replacement(skip, forward, args, kwargs)
                finally:
                    inside = False

            return call

        before = {module: module.__dict__.get("forward") for module in self._plan}
        try:
            for module, skips in self._plan.items():
                # An instance attribute overrides the class's method.
                module.__dict__["forward"] = swapped(type(module).__name__, module.forward, iter(skips))
            yield
        finally:
            for module, own in before.items():
                module.__dict__.pop("forward", None)
                if own is not None:
                    module.__dict__["forward"] = own


def _trainable_names(trunk: nn.Module) -> set[str]:
    return {name for name, parameter in trunk.named_parameters() if parameter.requires_grad}


def _is_compiled(module: nn.Module) -> bool:
    compiled = getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
    return compiled or isinstance(module, torch.jit.ScriptModule)


def _same_bits(one: Tensor, two: Tensor) -> bool:
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    return torch.equal(byte_view(one.contiguous()), byte_view(two.contiguous()))
