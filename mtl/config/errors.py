"""The errors of a configuration: found while it is read, or only when a value is used."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ValidationError


class ConfigError(ValueError):
    """Mistakes in a configuration, one line each."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = list(mistakes)


class SettingError(ValueError):
    """A value that passes validation and fails when it is used.

    Attributes:
        key: Its key, dotted.
        message: What is wrong with the value.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


class OptionsError(SettingError):
    """Options that do not fit the model of the class that they are for.

    Attributes:
        model: The model.
        errors: What pydantic says of them.
    """

    def __init__(self, key: str, model: type[BaseModel], errors: ValidationError) -> None:
        super().__init__(key, str(errors))
        self.model = model
        self.errors = errors
