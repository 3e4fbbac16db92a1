"""Features of images, computed once by a frozen trunk, kept by image and read back: in memory or on disk.

A caller needs two lines, whatever happens to the store:

    features = store.read(indices)
    if features is None:
        store.write(indices, features := trunk(images))
"""

from mtl.featurestore.base import FeatureStore, Field
from mtl.featurestore.disk import DiskStore
from mtl.featurestore.ram import RamStore
from mtl.featurestore.sharded import ShardedStore, batches_to_fill

__all__ = ["DiskStore", "FeatureStore", "Field", "RamStore", "ShardedStore", "batches_to_fill"]
