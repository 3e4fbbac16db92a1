"""Shared by heads around decoders of segmentation-models-pytorch: options, lazy import, levels that fit them."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from mtl.config.types import Count, Strict
from mtl.model.heads.base import Head, resize
from mtl.model.trunk import Kind


class MissingExtraError(ValueError):
    """segmentation-models-pytorch is not installed."""


class DecoderHead(Head):
    """A head around a decoder of segmentation-models-pytorch, which reads the pyramid."""

    class Options(Strict):
        """Attributes:
        width: Channels of the decoder: of each level, or in which the levels are fused.
        """

        width: Count = 256

    output: ClassVar[Literal["dense", "vector"]] = "dense"
    reads: frozenset[Kind] = frozenset({"pyramid"})


def new_decoder(architecture: str, name: str, **options: Any) -> nn.Module:
    """A decoder of segmentation-models-pytorch, with initial weights as that library sets them.

    Args:
        architecture: Its module there, such as `upernet`.
        name: Its class.
        options: Passed to the class.

    Raises:
        MissingExtraError: The library is not installed.
    """
    try:
        module = import_module(f"segmentation_models_pytorch.decoders.{architecture}.decoder")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "segmentation_models_pytorch":
            raise
        raise MissingExtraError(
            "needs segmentation-models-pytorch, which is not installed; install the extra `heads`:"
            " pip install 'mtl-freeze[heads]'"
        ) from error
    decoder: nn.Module = getattr(module, name)(**options)
    import_module("segmentation_models_pytorch.base.initialization").initialize_decoder(decoder)
    return decoder


def halved(pyramid: list[Tensor]) -> list[Tensor]:
    """The levels of a pyramid, each brought to exactly twice the size of the next, from the coarsest up.

    Image sizes that are no multiple of the coarsest stride leave levels that were rounded up; only those change.

    Args:
        pyramid: From fine to coarse, each "b c h w".
    """
    height, width = pyramid[-1].shape[-2:]
    doublings = range(len(pyramid) - 1, -1, -1)
    return [resize(level, (height << k, width << k)) for level, k in zip(pyramid, doublings, strict=True)]
