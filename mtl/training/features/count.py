"""Time saved by kept features: how long it took to compute them, and how often they were read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class KeptCount:
    """One phase, in this process.

    Attributes:
        kept_in: Where they are kept: `ram` or `disk`; `off` if nothing is kept.
        modules: How many modules of the trunk are computed once; 0 for the whole trunk.
        image_s: Seconds to compute them for an image, as one batch was timed when the phase began.
        num_computed: Images for which they were computed.
        compute_s: Seconds spent on that, with reading the images and writing what was computed.
        num_read: Images for which they were read, training and validation, the first time included.
    """

    kept_in: str = "off"
    modules: int = 0
    image_s: float = 0.0
    num_computed: int = 0
    compute_s: float = 0.0
    num_read: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> KeptCount:
        """From `to_json`; from nothing, a count at zero."""
        return cls(**content)
