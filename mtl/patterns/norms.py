"""Which modules are normalisation layers: what the pattern `type:norm` selects."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_OF_TORCH = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
# Normalisation layers of timm and torchvision that are subclasses of none of torch's. timm's are recognised by their
# file: which classes there are depends on its version, and nothing need be imported.
_FILES = {
    *("timm.layers.norm", "timm.layers.norm_act", "timm.layers.evo_norm", "timm.layers.filter_response_norm"),
    *("timm.layers.grn", "timm.layers.inplace_abn"),
}
_CLASSES = {("torchvision.ops.misc", "FrozenBatchNorm2d")}


def is_norm(kind: type[nn.Module]) -> bool:
    """Whether a class is a normalisation layer of torch, timm or torchvision, or a subclass of one.

    A block with a norm in it, such as timm's `ConvNormAct`, is none; nor is an affine layer that stands in place of one
    and does not normalise, such as ResMLP's.
    """
    return issubclass(kind, _OF_TORCH) or any(
        base.__module__ in _FILES or (base.__module__, base.__name__) in _CLASSES for base in kind.__mro__
    )
