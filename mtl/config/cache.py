"""The `cache` component of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mtl.config.types import Count, Positive, Strict


def _off(value: Any) -> Any:
    """YAML reads `off` as false."""
    return "off" if value is False else value


CacheMode = Annotated[Literal["auto", "off", "ram", "disk"], BeforeValidator(_off)]


class CacheConfig(Strict):
    """Whether and where the activations of a frozen trunk, or of the frozen first part of one, are stored.

    Attributes:
        mode: `ram`, `disk`, `off`, or `auto`: where they fit, if it saves time.
        dtype: The type in which they are stored; `float32` is bit-exact, the others take half the space.
        views: For augmented images: how many views of each image are stored and used in turn, instead of a new view in
            every epoch.
        ram_gb: The most memory for stored activations of the run, in 10^9 bytes.
        disk_gb: The most disk space for stored activations of all runs, in 10^9 bytes.
        dir: Where they are stored on disk; `features` in the data cache's folder if not given.
    """

    mode: CacheMode = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    views: Count | None = None
    ram_gb: Positive = 4.0
    disk_gb: Positive = 20.0
    dir: Annotated[str, Field(min_length=1)] | None = None


def cache_word(value: Any) -> Any:
    """`cache: off` is short for `cache: {mode: off}`."""
    return {"mode": value} if isinstance(value, str | bool) else value
