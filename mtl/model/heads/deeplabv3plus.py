"""`deeplabv3plus`: dilated convolutions on the last level and a finer one, for an output per pixel."""

from __future__ import annotations

from torch import Tensor, nn

from mtl.model.heads.base import enlarge, resize, start_near_zero
from mtl.model.heads.smp import DecoderHead, new_decoder
from mtl.model.trunk import Features, FeatureShape


class DeepLabV3PlusHead(DecoderHead):
    """The decoder of DeepLabV3+ (Chen et al., arXiv 1802.02611), as in segmentation-models-pytorch.

    It reads the last level and the first. The paper's trunk is dilated, so that the last level has 1/4 of the first
    one's resolution (timm: `trunk.options: {output_stride: 16}`); where it has less, it is enlarged to that. With
    levels at a ratio of 2 or less, as a plain ViT's, the ratio is 2. Dilations are 6, 12 and 18, dropout is 0.1.
    """

    def __init__(self, shape: FeatureShape, num_outputs: int, width: int = 256) -> None:
        """Raises:
        MissingExtraError: segmentation-models-pytorch is not installed.
        """
        super().__init__()
        self.ratio = 4 if shape.strides[-1] > 2 * shape.strides[0] else 2
        self.decoder = new_decoder(
            "deeplabv3",
            "DeepLabV3PlusDecoder",
            # The decoder reads the third and the last of its levels.
            encoder_channels=[0, 0, shape.pyramid[0], shape.pyramid[-1]],
            encoder_depth=4,
            out_channels=width,
            atrous_rates=(6, 12, 18),
            output_stride=4 * self.ratio,
            aspp_separable=True,
            aspp_dropout=0.1,
        )
        self.out = nn.Conv2d(width, num_outputs, 1)
        start_near_zero(self.out)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        first, last = features.pyramid[0], features.pyramid[-1]
        (height, width), (least_height, least_width) = first.shape[-2:], last.shape[-2:]
        # Rounded up, so that no resolution is lost.
        height, width = max(-(-height // self.ratio), least_height), max(-(-width // self.ratio), least_width)
        first, last = resize(first, (self.ratio * height, self.ratio * width)), resize(last, (height, width))
        return enlarge(self.out(self.decoder([first, first, first, last])), size)
