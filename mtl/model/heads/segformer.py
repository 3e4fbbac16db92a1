"""`segformer`: a linear map per level, fused, for an output per pixel."""

from __future__ import annotations

from torch import Tensor, nn

from mtl.model.heads.base import enlarge, start_near_zero
from mtl.model.heads.smp import DecoderHead, new_decoder
from mtl.model.trunk import Features, FeatureShape


class SegFormerHead(DecoderHead):
    """The decoder of SegFormer (Xie et al., arXiv 2105.15203), as in segmentation-models-pytorch.

    The linear maps have no bias here, since the BatchNorm after the fusion takes a constant away, so that it would
    never train.
    """

    def __init__(self, shape: FeatureShape, num_outputs: int, width: int = 256) -> None:
        """Raises:
        MissingExtraError: segmentation-models-pytorch is not installed.
        """
        super().__init__()
        self.decoder = new_decoder(
            "segformer",
            "SegformerDecoder",
            encoder_channels=[3, *shape.pyramid],
            encoder_depth=max(3, len(shape.pyramid)),
            segmentation_channels=width,
        )
        for layer in self.decoder.modules():
            if isinstance(layer, nn.Linear):
                layer.register_parameter("bias", None)
        self.out = nn.Conv2d(width, num_outputs, 1)
        start_near_zero(self.out)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        levels = features.pyramid
        # The decoder fuses at a quarter of the first map's size, and reads nothing else of that map.
        height, width = levels[0].shape[-2:]
        first = levels[0].new_zeros(1, 1, 1, 1).expand(1, 1, 4 * height, 4 * width)
        return enlarge(self.out(self.decoder([first, *levels])), size)
