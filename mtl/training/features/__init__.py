"""The dividend: what a phase freezes in the trunk is computed once for each image, and read from then on."""

from mtl.training.features.source import FeatureSource

__all__ = ["FeatureSource"]
