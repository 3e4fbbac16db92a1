"""The model: a shared timm trunk, one head per task, and the trunk's initial weights."""

from mtl.model.build import build_trunk
from mtl.model.heads import set_output_bias
from mtl.model.network import MultiTaskModel
from mtl.model.weights import WeightsError

__all__ = ["MultiTaskModel", "build_trunk", "WeightsError", "set_output_bias"]
