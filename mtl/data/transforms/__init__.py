"""Joint transforms of images and labels, by torchvision's v2 on tv_tensors."""

from mtl.data.transforms.pipeline import Pipeline, build_transforms

__all__ = ["Pipeline", "build_transforms"]
