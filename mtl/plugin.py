"""Finds what a user names as `package.module:Name`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from mtl.nearest import hint


class PluginError(ValueError):
    """What was named cannot be had."""


def find_class(text: str, base: type) -> type:
    """Imports a class by name; modules of the working directory are found as well.

    Args:
        text: `package.module:Name`.
        base: What it has to be a subclass of.

    Raises:
        PluginError: The module cannot be imported, has no such class, or it is of another kind. An error inside the
            module itself, other than a missing module, is raised as it is.
    """
    module_name, _, name = text.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise PluginError(f"{text!r}: expected package.module:Name")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise PluginError(f"{module_name!r} cannot be imported: {error}") from error
    finally:
        sys.path.remove(here)
    found = getattr(module, name, None)
    if found is None:
        raise PluginError(f"{module_name} has no {name!r}{hint(name, dir(module))}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(f"{text} is no subclass of {base.__module__}.{base.__qualname__}")
    return found
