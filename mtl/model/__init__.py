"""The model: a shared timm trunk, one head per task, and the trunk's initial weights."""

from mtl.model.heads import start_from
from mtl.model.network import MultiTaskModel, build_trunk
from mtl.model.weights import WeightsError

__all__ = ["MultiTaskModel", "build_trunk", "WeightsError", "start_from"]
