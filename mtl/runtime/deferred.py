"""Packages whose `__init__` runs when something of it is asked for, not when a submodule of theirs is imported.

Python runs `torchvision/__init__.py`, which imports the whole package and torch's compiler, before
`torchvision.ops.misc`, of which timm wants one class. In a block of `deferred`, only that submodule is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from threading import RLock
from types import ModuleType
from typing import Any

# Gives a value of a package by its name, before its `__init__` has run; raises `AttributeError` if it has none.
Early = Callable[[str], Any]


def nothing(name: str) -> Any:
    """The `Early` of a package of which nothing is known before its `__init__` runs."""
    raise AttributeError(name)


@contextmanager
def deferred(packages: Mapping[str, Early], whole: Collection[str] = ()) -> Iterator[None]:
    """Defers the `__init__` of packages that are imported in the block.

    It runs as soon as something is asked for that it makes; after the block, with the first import that names the
    package or a submodule that is not loaded yet. Whatever is asked for later is thus what it would have been. One that
    is loaded already stays as it is.

    Args:
        packages: By full name, what gives values of the package, in such blocks only, without running its `__init__`.
        whole: Those of them whose submodules are not imported without their `__init__` either.
    """
    finder = _Finder(packages, whole)
    sys.meta_path.insert(0, finder)
    _open.append(finder)
    try:
        yield
    finally:
        _open.remove(finder)
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    def __init__(self, packages: Mapping[str, Early], whole: Collection[str]) -> None:
        self.packages = packages
        self.whole = frozenset(whole)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        around = fullname.rpartition(".")[0]
        if around in self.whole and isinstance(package := sys.modules.get(around), _DeferredPackage):
            _run(package)
        if fullname not in self.packages:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeferredLoader(spec.loader)
        return spec


# The blocks that are open.
_open: list[_Finder] = []
# One package at a time; another thread waits until it has run.
_lock = RLock()
_running: set[str] = set()


class _DeferredLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _DeferredPackage(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet; see `_run`."""


class _DeferredPackage(ModuleType):
    """A package whose `__init__` has not run yet; once it has, it is a plain module."""

    def __getattribute__(self, name: str) -> Any:
        # What Python's import asks of a package that is named, and of one in which it looks for a submodule.
        if name in ("__spec__", "__path__"):
            own = ModuleType.__getattribute__(self, "__name__")
            if not any(own in finder.packages for finder in _open):
                _run(self)
        # Not by `super()`: it may be a plain module by now.
        return ModuleType.__getattribute__(self, name)

    def __getattr__(self, name: str) -> Any:
        own = ModuleType.__getattribute__(self, "__name__")
        # Of such names, no package makes others: programs that look through all modules ask for them.
        if own in _running or (name.startswith("__") and name not in ("__all__", "__version__")):
            raise AttributeError(f"module {own!r} has no attribute {name!r}")
        # The innermost block first.
        for finder in reversed(_open):
            try:
                return finder.packages.get(own, nothing)(name)
            except AttributeError:
                continue
        _run(self)
        return getattr(self, name)

    def __dir__(self) -> list[str]:
        _run(self)
        return dir(self)


def _run(package: ModuleType) -> None:
    """Runs the package's `__init__`."""
    with _lock:
        namespace = ModuleType.__getattribute__(package, "__dict__")
        name, spec = namespace["__name__"], namespace["__spec__"]
        if name in _running or not isinstance(spec.loader, _DeferredLoader):
            return
        held = spec.loader
        _running.add(name)
        spec.loader = package.__loader__ = held.loader
        try:
            held.loader.exec_module(package)
        except BaseException:
            spec.loader = package.__loader__ = held
            raise
        finally:
            _running.discard(name)
        package.__class__ = ModuleType
