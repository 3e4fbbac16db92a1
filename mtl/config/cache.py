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
    """Whether and where the activations of a frozen trunk, or of its frozen first part, are kept.

    Attributes:
        mode: `ram`, `disk`, `off`, or `auto`: in memory if they fit there, else on disk, and only if that saves time.
        dtype: Number format of kept activations; `float32` keeps every bit, the others take half the room.
        views: With `data.augment` or `data.transform.train`: number of views of each image that are kept and used in
            turn, in place of a new view in every epoch. If not set, nothing of images that change is kept.
        ram_gb: Memory that all kept activations of the run may take, in 10^9 bytes.
        disk_gb: Disk space that the kept activations of all runs may take, in 10^9 bytes; what was not used for longest
            is deleted first.
        dir: The folder of what is kept on disk; if not set, `features` in the data cache's folder.
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
