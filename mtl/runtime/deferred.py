"""Packages whose `__init__` runs when something of it is asked for, not when a submodule of theirs is imported.

Python runs `torchvision/__init__.py`, which imports the whole package and torch's compiler, before
`torchvision.ops.misc`, of which timm wants one class. In a block of `deferred`, only that submodule is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
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

    It runs as soon as something is asked for that it makes. After the block it is as if the package had not been
    imported, only some of its submodules: the next import of it, or of another submodule, runs it, in the same module
    object. One that is loaded before the block stays as it is.

    Args:
        packages: By full name, what gives values of the package, in such blocks only, without running its `__init__`.
        whole: Those of them whose submodules are not imported without their `__init__` either.
    """
    finder = _BlockFinder(packages, whole)
    sys.meta_path.insert(0, finder)
    _open.append(finder)
    try:
        yield
    finally:
        _open.remove(finder)
        sys.meta_path.remove(finder)
        with _lock:
            for name in packages:
                _set_aside(name)


def _set_aside(name: str) -> None:
    """Takes a package that has not run out of the loaded modules, until it is imported again."""
    package = sys.modules.get(name)
    if not isinstance(package, _DeferredPackage) or any(name in finder.packages for finder in _open):
        return
    del sys.modules[name]
    _waiting[name] = package
    around, _, last = name.rpartition(".")
    if vars(sys.modules.get(around, package)).get(last) is package:
        delattr(sys.modules[around], last)
    if _waiting_finder not in sys.meta_path:
        sys.meta_path.insert(0, _waiting_finder)


class _DeferredPackage(ModuleType):
    """A package whose `__init__` has not run yet; once it has, it is a plain module."""

    def __getattr__(self, name: str) -> Any:
        own = self.__name__
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


class _DeferringLoader(Loader):
    """Loads a package without its `__init__`."""

    def __init__(self, loader: Loader, package: _DeferredPackage | None = None) -> None:
        self.loader = loader
        self.package = package

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _DeferredPackage(spec.name) if self.package is None else self.package

    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet; see `_run`."""


class _RunningLoader(_DeferringLoader):
    """Loads a package that was set aside."""

    def exec_module(self, module: ModuleType) -> None:
        _run(module)


class _LoadedLoader(Loader):
    """Gives a module that was loaded while Python looked for it."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:  # noqa: ARG002  Python's interface
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        # One that takes no new attributes (torch's modules of settings) has kept its own.
        if module.__spec__ is not self.spec:
            module.__spec__ = self.spec


class _BlockFinder(MetaPathFinder):
    def __init__(self, packages: Mapping[str, Early], whole: Collection[str]) -> None:
        self.packages = packages
        self.whole = frozenset(whole)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        around = sys.modules.get(fullname.rpartition(".")[0])
        if isinstance(around, _DeferredPackage) and around.__name__ in self.whole:
            _run(around)
            # Python would load it once more if it were there already.
            if (loaded := sys.modules.pop(fullname, None)) is not None:
                return ModuleSpec(fullname, _LoadedLoader(loaded), is_package=hasattr(loaded, "__path__"))
        if fullname not in self.packages:
            return None
        with _lock:
            if (package := _waiting.pop(fullname, None)) is not None:
                return _spec_of(package, _DeferringLoader)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeferringLoader(spec.loader)
        return spec


class _WaitingFinder(MetaPathFinder):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002  Python's interface
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        package = _waiting.get(fullname)
        return None if package is None else _spec_of(package, _RunningLoader)


def _spec_of(package: _DeferredPackage, loader: type[_DeferringLoader]) -> ModuleSpec:
    spec = package.__spec__
    assert spec is not None and isinstance(spec.loader, _DeferringLoader)
    spec.loader = loader(spec.loader.loader, package)
    return spec


# The blocks that are open, and packages that were set aside after others.
_open: list[_BlockFinder] = []
_waiting: dict[str, _DeferredPackage] = {}
_waiting_finder = _WaitingFinder()
_running: set[str] = set()
# One package at a time; another thread waits until it has run.
_lock = RLock()


def _run(package: ModuleType) -> None:
    """Runs the package's `__init__`, once."""
    name, spec = package.__name__, package.__spec__
    if name not in sys.modules:
        import_module(name)  # which comes back here
        return
    with _lock:
        if name in _running or spec is None or not isinstance(spec.loader, _DeferringLoader):
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
        _waiting.pop(name, None)
