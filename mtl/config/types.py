"""The base class and field types of the configuration's models: strict, frozen, with ranges in the types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
# All generators take 32 bits.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Strict(BaseModel):
    """Unknown keys, near-miss types and keys without a value are errors: nothing is ignored or converted in silence.

    "Off" is a missing key, a word or a number, never null: the configuration that a run saves leaves nulls out.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @field_validator("*", mode="after")
    @classmethod
    def _has_a_value(cls, value: Any) -> Any:
        if value is None:
            raise PydanticCustomError("null", "Input should be a value")
        return value


Side = Annotated[int, Field(ge=8)]
# One number for both, or height and width.
ImageSize = Annotated[
    Annotated[Side, Tag("one")] | Annotated[list[Side], Field(min_length=2, max_length=2), Tag("both")],
    Discriminator(lambda value: "both" if isinstance(value, list) else "one"),
]


def one_as_list(value: object) -> object:
    return [value] if isinstance(value, str | dict) else value


def _is_table(value: object) -> str:
    return "table" if isinstance(value, dict) else "number"


# A number for all, or pattern -> number.
PositiveByPattern = Annotated[
    Annotated[Positive, Tag("number")] | Annotated[dict[str, Positive], Field(min_length=1), Tag("table")],
    Discriminator(_is_table),
]
NotNegativeByPattern = Annotated[
    Annotated[NotNegative, Tag("number")] | Annotated[dict[str, NotNegative], Field(min_length=1), Tag("table")],
    Discriminator(_is_table),
]


class CountedConfig(Strict):
    """A pattern that must match an exact number of tensors: a guard against renamed layers.

    Attributes:
        pattern: The pattern.
        must_match: Number of parameters and buffers that it has to match.
    """

    pattern: str
    must_match: Count


PatternConfig = Annotated[
    Annotated[str, Tag("pattern")] | Annotated[CountedConfig, Tag("counted")],
    Discriminator(lambda value: "counted" if isinstance(value, dict | CountedConfig) else "pattern"),
]
Patterns = Annotated[list[PatternConfig], BeforeValidator(one_as_list)]

# A word, or the names of layers.
Depthwise = Annotated[
    Annotated[Literal["torch", "auto"], Tag("word")] | Annotated[list[str], Field(min_length=1), Tag("layers")],
    Discriminator(lambda value: "layers" if isinstance(value, list) else "word"),
]
