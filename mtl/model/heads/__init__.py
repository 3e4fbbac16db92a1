"""Heads: modules that map the trunk's features to one task's output, a file each, found by name."""

from mtl.model.heads.base import Head, enlarge
from mtl.model.heads.build import HEADS, build_head, class_of, set_output_bias, try_out
from mtl.model.heads.shared_linear import share_weights

__all__ = ["HEADS", "Head", "build_head", "class_of", "enlarge", "set_output_bias", "share_weights", "try_out"]
