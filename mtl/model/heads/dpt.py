"""`dpt`: the decoder of dense prediction transformers, for an output per pixel."""

from __future__ import annotations

from torch import Tensor, nn

from mtl.model.heads.base import enlarge, resize, start_near_zero
from mtl.model.heads.smp import DecoderHead, halved, new_decoder
from mtl.model.trunk import Features, FeatureShape


class DptHead(DecoderHead):
    """The decoder of DPT (Ranftl et al., arXiv 2103.13413), as in segmentation-models-pytorch.

    The levels of a plain ViT are reassembled at 4, 2, 1 and 1/2 times their resolution, whatever the patch size, and
    class tokens are not read (the paper's readout "ignore"). The levels of a pyramid are at these ratios already.
    """

    def __init__(self, shape: FeatureShape, num_outputs: int, width: int = 256) -> None:
        """Raises:
        MissingExtraError: segmentation-models-pytorch is not installed.
        """
        super().__init__()
        self.is_plain = shape.is_plain
        levels = range(len(shape.pyramid))
        self.decoder = new_decoder(
            "dpt",
            "DPTDecoder",
            encoder_out_channels=shape.pyramid,
            # The decoder brings level i from its stride to 2 ** (i + 2); what is a pyramid already, it leaves as it is.
            encoder_output_strides=[16 if self.is_plain else 2 ** (level + 2) for level in levels],
            encoder_has_prefix_tokens=False,
            readout="ignore",
            intermediate_channels=[min(width << level, 4 * width) for level in levels],
            fusion_channels=width,
        )
        self.smooth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.out = nn.Conv2d(width, num_outputs, 1)
        start_near_zero(self.out)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        levels = _even(features.pyramid) if self.is_plain else halved(features.pyramid)
        return enlarge(self.out(self.smooth(self.decoder(levels, [None] * len(levels)))), size)


def _even(levels: list[Tensor]) -> list[Tensor]:
    """Levels of one size with an even number of rows and columns: the decoder halves and doubles them again."""
    height, width = levels[0].shape[-2:]
    return [resize(level, (height + height % 2, width + width % 2)) for level in levels]
