"""The stores of kept features: those of the phase, and those in memory that earlier phases have left."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl.data import Split
from mtl.data.cache import default_cache_dir
from mtl.distributed.world import World
from mtl.featurestore import DiskStore, FeatureStore, Field, RamStore
from mtl.featurestore.sharded import ShardedStore
from mtl.model.prefix import Prefix
from mtl.training.setup import RunSetup


class FeatureStores:
    """Opens a store for each split, and keeps those in memory by key, so that a later phase finds its features."""

    def __init__(self, setup: RunSetup, num_views: int, world: World) -> None:
        """Args:
        setup: The run.
        num_views: Views of each training image that are kept.
        world: The ranks; each keeps a part of the rows.
        """
        self._setup = setup
        self._settings = setup.config.cache
        self._num_views = num_views
        self._world = world
        # Of the phase, by the identity of the split.
        self._open: dict[int, FeatureStore] = {}
        # Of this phase and earlier ones, by key, the one used last at the end.
        self._in_ram: dict[str, FeatureStore] = {}
        self._digests: dict[int, str] = {}

    @property
    def are_in_memory(self) -> bool:
        """Whether features of some phase are in memory."""
        return bool(self._in_ram)

    def state_dict(self) -> list[Any]:
        """Which features are in memory, as plain data; not the features."""
        return [
            [key, store.num_rows, [[field.shape, str(field.dtype).removeprefix("torch.")] for field in store.fields]]
            for key, store in self._in_ram.items()
        ]

    def load_state_dict(self, in_memory: Sequence[Any]) -> None:
        """Opens empty stores for the features that the interrupted run had in memory."""
        for key, num_rows, fields in in_memory:
            own = [Field(tuple(shape), getattr(torch, dtype)) for shape, dtype in fields]
            self._in_ram[key] = self._new("ram", json.loads(key), num_rows, own)

    def open(self, prefix: Prefix, place: str, key: Mapping[str, Any]) -> bool:
        """Opens the stores of both splits, empty or as an earlier phase or run left them.

        Args:
            prefix: What computes the features.
            place: `ram` or `disk`.
            key: From `feature_key`.

        Returns:
            Whether every rank can keep its part; the store has warned if not.
        """
        kind = getattr(torch, self._settings.dtype)
        fields = [
            Field(tuple(shape[axis - 1] for axis in order[1:]), kind if dtype.is_floating_point else dtype)
            for shape, dtype, order in zip(prefix.shapes, prefix.dtypes, _orders(prefix), strict=True)
        ]
        for split in (self._setup.train, self._setup.val):
            own, num_rows = self._key_of(split, key), len(split)
            if split is self._setup.train:
                num_rows *= self._num_views
            name = json.dumps(own)
            store = self._in_ram.pop(name, None) if place == "ram" else None
            store = store or self._new(place, own, num_rows, fields)
            if place == "ram":
                self._in_ram[name] = store
            self._open[id(split)] = store
        self._forget_old()
        return not self._world.all_reduce_flags(broken=any(store.is_disabled for store in self._open.values())).broken

    def of(self, split: Split) -> FeatureStore:
        """The store of a split, which is open."""
        return self._open[id(split)]

    def close(self) -> None:
        """Closes the stores of the phase, but for those that stay in memory."""
        for store in self._open.values():
            if not any(store is kept for kept in self._in_ram.values()):
                store.close()
        self._open = {}

    def clear(self) -> None:
        """Drops everything that is in memory."""
        self._in_ram.clear()

    def has(self, split: Split, key: Mapping[str, Any]) -> bool:
        """Whether an earlier phase has left the features of a split in memory."""
        return json.dumps(self._key_of(split, key)) in self._in_ram

    def num_bytes(self, prefix: Prefix) -> int:
        """The size of what is kept of all images."""
        num_images = self._num_views * len(self._setup.train) + len(self._setup.val)
        return num_images * prefix.bytes_in(getattr(torch, self._settings.dtype))

    def _key_of(self, split: Split, key: Mapping[str, Any]) -> dict[str, Any]:
        """The key with the identity of the images."""
        name = id(split)
        if name not in self._digests:
            # Without a digest, edited images would go unnoticed: features are this process's alone.
            self._digests[name] = split.identity() or uuid.uuid4().hex
        return {**key, "images": self._digests[name]}

    def _new(self, place: str, key: dict[str, Any], num_rows: int, fields: list[Field]) -> FeatureStore:
        def make(rows: int, own: dict[str, Any]) -> FeatureStore:
            # A copy to a GPU from memory that is not pinned would wait for it at every step.
            pin_memory = self._setup.device.type == "cuda"
            if place == "ram":
                return RamStore(rows, fields, pin_memory)
            return DiskStore(
                self._folder(), own, rows, fields, int(1e9 * self._settings.disk_gb), pin_memory=pin_memory
            )

        if self._world.is_alone:
            return make(num_rows, key)
        part = {**key, "part": [self._world.rank, self._world.size]}
        return ShardedStore(num_rows, fields, self._world, lambda rows: make(rows, part))

    def _forget_old(self) -> None:
        """Drops stores of earlier phases, the least recently used first, until the rest is within `cache.ram_gb`."""
        while sum(store.nbytes for store in self._in_ram.values()) > 1e9 * self._settings.ram_gb:
            oldest = next(iter(self._in_ram))
            if self._in_ram[oldest] in self._open.values():
                return
            del self._in_ram[oldest]

    def _folder(self) -> Path:
        settings, data = self._settings, self._setup.config.data
        own = Path(data.cache_dir) if data.cache_dir else default_cache_dir()
        return Path(settings.dir or own / "features").expanduser()


def as_stored(computed: Sequence[Tensor], prefix: Prefix) -> list[Tensor]:
    """The activations that a prefix has computed, with their dimensions in the order of the store."""
    return [tensor.permute(order) for tensor, order in zip(computed, _orders(prefix), strict=True)]


def as_computed(kept: Sequence[Tensor], prefix: Prefix, device: torch.device) -> list[Tensor]:
    """Kept tensors on a device, and in the types and the layout in which a prefix has computed them."""
    computed = []
    for tensor, dtype, order in zip(kept, prefix.dtypes, _orders(prefix), strict=True):
        back = sorted(range(len(order)), key=order.__getitem__)
        computed.append(tensor.to(device, dtype, non_blocking=True).permute(back))
    return computed


def _orders(prefix: Prefix) -> list[tuple[int, ...]]:
    """The order of each kept tensor's dimensions in the store: that in memory, so that no batch is rearranged."""
    return [order if order[0] == 0 else tuple(range(len(order))) for order in prefix.orders]
