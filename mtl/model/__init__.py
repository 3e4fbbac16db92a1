"""The model: a shared timm trunk, one head per task, and the trunk's initial weights."""

from mtl.model.build import build_trunk
from mtl.model.heads import Head, enlarge, set_output_bias
from mtl.model.network import MultiTaskModel
from mtl.model.trunk import Features, FeatureShape
from mtl.model.weights import WeightsError

__all__ = [
    "FeatureShape",
    "Features",
    "Head",
    "MultiTaskModel",
    "WeightsError",
    "build_trunk",
    "enlarge",
    "set_output_bias",
]
