"""Classes that a user brings as `package.module:Name`, found and made; what is wrong is blamed on their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Discriminator, ValidationError

from mtl.config.errors import OptionsError, SettingError
from mtl.runtime.plugin import PluginError, find_class, where_it_failed

# The tag of the model that takes a class of the user's own.
OWN = "package.module:Name"


def chosen_by(key: str, stand_in: str, absent: str | None = None) -> Discriminator:
    """Chooses among models by the word under a key, each tagged with its word; a class of the user's own by `OWN`.

    A word that is none of the tags is an error.

    Args:
        key: The key.
        stand_in: A tag for what is neither a mapping nor a model, which any of the models refuses.
        absent: The word where the key is not written; if not given, it is required.
    """

    def choose(value: Any) -> str | None:
        word = value.get(key, absent) if isinstance(value, dict) else getattr(value, key, stand_in)
        if isinstance(word, str) and is_own(word):
            return OWN
        return None if word is None and absent is None else str(word)

    # Errors name the key by the function that chooses.
    choose.__name__ = f"_by_{key}"
    return Discriminator(choose)


def is_own(name: str) -> bool:
    """Whether a name is that of a class of the user's own."""
    return ":" in name


def own_class(name: str, key: str, *bases: type) -> type[Any]:
    """Imports a class of the user's own.

    Args:
        name: `package.module:Name`.
        key: The key under which the name is written, dotted.
        bases: It has to be a subclass of one of them; any class may be named if there are none.

    Raises:
        SettingError: It cannot be imported, or is of another kind.
    """
    try:
        return find_class(name, *(bases or (object,)))
    except PluginError as error:
        raise SettingError(key, str(error)) from error


def checked_options(kind: type[Any], options: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Options as the class's own model `Options` reads them, defaults included; as they are if it has none.

    Args:
        kind: The class.
        options: As they are written.
        key: The key under which they are, dotted.

    Raises:
        OptionsError: They do not fit the model.
    """
    model: type[BaseModel] | None = getattr(kind, "Options", None)
    if model is None:
        return dict(options)
    try:
        return dict(model.model_validate(dict(options)))
    except ValidationError as error:
        raise OptionsError(key, model, error) from None


def make_own(kind: type[Any], options: Mapping[str, Any], key: str, what: str, **given: Any) -> Any:
    """Makes an object of a class of the user's own.

    Args:
        kind: The class.
        options: As they are written.
        key: The key under which they are, dotted.
        what: The object, at the beginning of an error.
        given: What the class is called with besides its options.

    Raises:
        SettingError: The options do not fit, or the class raised an error.
    """
    own = checked_options(kind, options, key)
    try:
        return kind(**given, **own)
    except Exception as error:  # the user's code may raise anything
        raise SettingError(key, f"{what}: {where_it_failed(error)}") from error
