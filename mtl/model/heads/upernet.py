"""`upernet`: pyramid pooling and a feature pyramid, for an output per pixel."""

from __future__ import annotations

from torch import Tensor, nn

from mtl.model.heads.base import enlarge, start_near_zero
from mtl.model.heads.smp import DecoderHead, new_decoder
from mtl.model.trunk import Features, FeatureShape


class UperNetHead(DecoderHead):
    """The decoder of UPerNet (Xiao et al., arXiv 1807.10221), as in segmentation-models-pytorch.

    Each level passes a LayerNorm first, without a bias here: the BatchNorm two layers on takes a constant away, so that
    it would never train.
    """

    def __init__(self, shape: FeatureShape, num_outputs: int, width: int = 256) -> None:
        """Raises:
        MissingExtraError: segmentation-models-pytorch is not installed.
        """
        super().__init__()
        self.decoder = new_decoder(
            "upernet",
            "UPerNetDecoder",
            # The decoder leaves the two finest of its levels, the image and stride 2, out.
            encoder_channels=[0, 0, *shape.pyramid],
            encoder_depth=max(3, len(shape.pyramid) + 1),
            decoder_channels=width,
        )
        for norm in self.decoder.get_submodule("feature_norms").children():
            norm.register_parameter("bias", None)
        self.out = nn.Conv2d(width, num_outputs, 1)
        start_near_zero(self.out)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        levels = features.pyramid
        return enlarge(self.out(self.decoder([levels[0], levels[0], *levels])), size)
