"""Finds what a user names as `package.module:Name`."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from contextlib import suppress
from pathlib import Path

from mtl.runtime.text import hint

_NOT_THEIRS = (importlib.__file__, str(Path(__file__).parents[1]) + os.sep)
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


# Where modules are looked for besides the working directory: the folders of the configurations that were read.
_FOLDERS: list[str] = []


class PluginError(ValueError):
    """The named object cannot be imported, or is of another kind."""


def search_in(folder: Path) -> None:
    """Has modules of a folder found from now on; those of the working directory come first."""
    if str(folder.resolve()) not in _FOLDERS:
        _FOLDERS.append(str(folder.resolve()))


def searched_folders() -> list[str]:
    """The folders given to `search_in`, absolute."""
    return list(_FOLDERS)


def find_class(text: str, *bases: type) -> type:
    """Imports a class by name; modules of the working directory and of `search_in` are found as well.

    Args:
        text: `package.module:Name`.
        bases: It has to be a subclass of one of them.

    Raises:
        PluginError: The module cannot be imported, or fails while it is; it has no such class; or that is of another
            kind, or abstract.
    """
    module_name, _, name = text.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise PluginError(f"{text!r}: expected package.module:Name")
    folders = [str(Path.cwd()), *_FOLDERS]
    sys.path[:0] = folders
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        where = "; looked for in the working directory, next to the configuration and where Python does"
        is_not_there = isinstance(error, ModuleNotFoundError) and module_name.startswith(error.name or " ")
        why = f"{where_it_failed(error)}{where if is_not_there else ''}"
        raise PluginError(f"{module_name!r} cannot be imported: {why}") from error
    finally:
        # The module may have changed it.
        for folder in folders:
            with suppress(ValueError):
                sys.path.remove(folder)
    found = getattr(module, name, None)
    if found is None:
        raise PluginError(f"{module_name} has no {name!r}{hint(name, dir(module))}")
    if not (isinstance(found, type) and issubclass(found, bases)):
        expected = " or ".join(f"{base.__module__}.{base.__qualname__}" for base in bases)
        raise PluginError(f"{text} is no subclass of {expected}")
    if lacks := sorted(getattr(found, "__abstractmethods__", ())):
        raise PluginError(f"{text} is abstract: it lacks {', '.join(lacks)}")
    return found


def where_it_failed(error: BaseException) -> str:
    """An error in a user's code in one line: its message, and the file and line that raised it."""
    message = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        return message
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    # Python's own import machinery is of no help to who wrote the module.
    own = [frame for frame in frames if not frame.filename.startswith(("<", *_NOT_THEIRS))]
    # Nor is a library that the module calls, or that has put its own function in the place of one of Python's.
    own = [frame for frame in own if not frame.filename.startswith(_LIBRARIES)] or own
    place = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{': ' if message else ''}{message}{place}"
