"""Shards of webdataset: tar files whose members make samples by a common key."""

from mtl.data.files.shards.opening import open_shards
from mtl.data.files.shards.shards import ShardSet

__all__ = ["ShardSet", "open_shards"]
