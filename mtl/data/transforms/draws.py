"""Has code that draws random numbers from the process draw them from a generator instead."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def drawing_from(generator: Generator) -> Iterator[None]:
    """Torch, NumPy and `random` draw from a generator while the block runs; their own states stay as they are.

    Those of NumPy and `random` are set and put back. Torch's is not touched at all, since a thread that makes batches
    shares it with the step that draws for dropout.

    Args:
        generator: Of the CPU; its next numbers are drawn.

    Raises:
        ValueError: An operation of torch draws random numbers and takes no generator.
    """
    seed = int(torch.randint(2**32, (), generator=generator))
    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        with _Drawing(generator):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Passes a generator to every operation that draws; a mode holds for its own thread only."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generators = {"cpu": generator}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        seeded = _seeded(func)
        if seeded is None:
            return func(*args, **(kwargs or {}))
        named = dict(kwargs or {})
        if named.get("generator") is None:
            named["generator"] = self._generator(args, named)
        return seeded(*args, **named)

    def _generator(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> Generator:
        """The generator of the device on which is drawn."""
        tensors = [each.device for each in args if isinstance(each, Tensor)]
        device = torch.device(named.get("device") or (tensors[0] if tensors else "cpu"))
        key = str(device)
        if key not in self._generators:
            seed = int(torch.empty((), dtype=torch.int64).random_(generator=self._generators["cpu"]))
            self._generators[key] = Generator(device).manual_seed(seed)
        return self._generators[key]


@cache
def _seeded(func: Any) -> Any:
    """The overload of an operation that takes a generator; None if the operation draws nothing."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return None
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    name, packet = func._overloadname, func.overloadpacket
    others = {"default": "generator", "low_dtype": "low_generator_dtype"}
    seeded = getattr(packet, others.get(name, f"{name}_generator"), None)
    if seeded is None:
        raise ValueError(f"{packet} draws random numbers and takes no generator, so no seed decides what it draws")
    return seeded
