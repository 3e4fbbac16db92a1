"""torch without its compiler, whose import takes a second, where nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mtl.runtime.deferred import deferred

# Where torch keeps what its compiler made of a function that is exempt from compilation.
_KEPT = "__dynamo_disable"


@contextmanager
def without_compiler() -> Iterator[None]:
    """In the block, torch does not import its compiler only to exempt functions from compilation.

    Optimizers, and the shapes of many operations on the meta device, are exempt, and ask the compiler for it when they
    are first called. In the block they get themselves; after it, or once whatever else is asked of the compiler has
    imported it, they ask as if they had not been called. A compiler that is imported already stays as it is.
    """
    exempt: list[Any] = []

    def disable(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        exempt.append(function)
        return function

    known: dict[str, Callable[..., Any]] = {"disable": disable, "graph_break": lambda *_, **__: None}

    def early(name: str) -> Any:
        if name not in known:
            # The compiler is about to be imported.
            forget()
            raise AttributeError(name)
        return known[name]

    def forget() -> None:
        while exempt:
            exempt.pop().__dict__.pop(_KEPT, None)

    try:
        with deferred({"torch._dynamo": early}, whole=["torch._dynamo"]):
            yield
    finally:
        forget()
