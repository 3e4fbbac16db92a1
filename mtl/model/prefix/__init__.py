"""The frozen first part of a trunk: found by tracing a pass, computed once, replayed from stored tensors."""

from mtl.model.prefix.prefix import Prefix, PrefixError

__all__ = ["Prefix", "PrefixError"]
