"""The `head` of a task in a configuration."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from mtl.config.types import Strict


class HeadConfig(Strict):
    """What maps the trunk's features to a task's output; see docs/heads.md.

    Attributes:
        name: For an output per image `linear`, `mlp` or `attention_pool`; for one per pixel `fpn`, `linear_bn`, `bins`,
            or, with the extra `heads`, `dpt`, `upernet`, `segformer`, `deeplabv3plus`; or your own as
            `package.module:Name`, see docs/own_head.md.
        options: Passed to the head.
    """

    name: Annotated[str, Field(min_length=1)]
    options: dict[str, Any] = {}
