"""The configuration of what is kept of a frozen trunk."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mtl.config.types import Count, Positive, Strict


def _off(value: Any) -> Any:
    """YAML reads `off` as false."""
    return "off" if value is False else value


CacheMode = Annotated[Literal["auto", "off", "ram", "disk"], BeforeValidator(_off)]


class CacheConfig(Strict):
    """Whether and where the activations of a frozen trunk, or of the frozen first part of one, are kept.

    Attributes:
        mode: `ram`, `disk`, `off`, or `auto`: where they fit, if it saves time.
        dtype: The type in which they are kept; `float32` keeps what was computed to the bit, the others halve it.
        views: For images that are augmented: so many views of each are kept and taken in turn, in place of a new one
            in every epoch.
        ram_gb: Memory that all kept activations of the run may take, in 10^9 bytes.
        disk_gb: Room that the kept activations of all runs may take on disk.
        dir: Where they are kept on disk; `features` in the data cache's folder if not given.
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
