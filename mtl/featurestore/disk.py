"""Features on disk, shared by runs whose key is the same."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mtl.featurestore.base import FeatureStore, Field, new_places
from mtl.featurestore.entry import DamagedEntry, Entry, Layout
from mtl.featurestore.folder import NoRoom, StoreFolder, damage
from mtl.runtime.console import logger


class DiskStore(FeatureStore):
    """Rows in one file, in a directory of a folder that is named after the key.

    While rows are missing, the file has a temporary name that only this object reads; with the last row it gets its
    final name, and every store with the same key reads it. Of two that fill it at the same time the first one to
    finish is kept, and the other one reads that.

    No failure of the disk is raised. A file that is damaged is removed, and the store is empty again; if it cannot be
    written, the store is disabled: it has no rows and takes none. Either is logged in one warning.
    """

    def __init__(
        self,
        folder: Path,
        key: dict[str, Any],
        num_rows: int,
        fields: Sequence[Field],
        max_bytes: int | None = None,
        spare_bytes: int = 1 << 30,
        pin_memory: bool = False,
    ) -> None:
        """Opens the features of a key, or an empty store to be filled.

        Args:
            folder: Holds the features of many keys.
            key: Everything that the features depend on, as JSON. The fields and the number of rows belong to it anyway.
            num_rows: How many images there are.
            fields: The tensors of one image.
            max_bytes: The most that the folder may hold: what was not used for longest is removed, never what is in
                use. None for no limit; then something is removed only if the disk has too little room.
            spare_bytes: What has to be free on the disk besides, before filling begins.
            pin_memory: As in every store.
        """
        super().__init__(num_rows, fields, pin_memory)
        self._layout = Layout(key, num_rows, self.fields)
        self.path = Path(folder) / self._layout.digest
        self._folder = StoreFolder(Path(folder), max_bytes, spare_bytes)
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._num_damages = 0
        self._entry: Entry | None = None
        self._open()

    @property
    def num_present(self) -> int:
        entry = self._entry
        return 0 if entry is None else entry.num_present

    def read(self, indices: Tensor) -> list[Tensor] | None:
        wanted, entry = self._checked(indices), self._entry
        if entry is None or not entry.has(wanted):
            return None
        batch, parts = self._new_batch(len(wanted))
        try:
            entry.read(wanted, parts)
        except (DamagedEntry, OSError) as error:
            self._discard(entry, error)
            return None
        return batch

    def write(self, indices: Tensor, tensors: Sequence[Tensor]) -> None:
        wanted = self._checked(indices)
        self._check_fit(tensors, len(wanted))
        with self._lock:
            if self.is_disabled or self.is_complete or not len(wanted):
                return
            try:
                self._entry = entry = self._entry_to_fill()
                places = new_places(wanted, entry.present)
                if len(places):
                    entry.write(wanted[places], self._to_bytes(tensors, places))
                if self.is_complete and not entry.is_whole:
                    self._publish(entry)
            except (OSError, NoRoom) as error:
                self._disable(error)

    def close(self) -> None:
        with self._lock:
            entry, self._entry, self.is_disabled = self._entry, None, True
            # Forked processes have this object as well; the files are those of the one that made it.
            if entry is not None and self._owner == os.getpid():
                entry.touch()
                _remove_unfinished(entry)

    def _open(self) -> None:
        try:
            with self._folder.locked():
                self._folder.sweep()
                self._entry = self._folder.open(self._layout)
                if self._entry is None:
                    self._folder.make_room(self._layout.nbytes, dry=True)
        except (OSError, NoRoom) as error:
            self._disable(error)

    def _entry_to_fill(self) -> Entry:
        """The entry that rows go to; a complete one if another process has finished it meanwhile."""
        entry = self._entry
        if entry is not None and not self.path.exists():
            return entry
        with self._folder.locked():
            other = self._folder.open(self._layout)
            if other is None:
                return entry or self._folder.begin(self._layout)
        if entry is not None:
            _remove_unfinished(entry)
        return other

    def _publish(self, entry: Entry) -> None:
        entry.seal()
        with self._folder.locked():
            other = self._folder.open(self._layout)
            if other is None:
                self._folder.publish(entry)
                return
        self._entry = other
        _remove_unfinished(entry)

    def _discard(self, entry: Entry, error: Exception) -> None:
        """Lets go of an entry with a damaged row; of several threads that found it, only the first does something."""
        with self._lock:
            if self._entry is not entry:
                return
            self._entry = None
            self._num_damages += 1
            try:
                with self._folder.locked():
                    # Another process may have removed it, and even written it again.
                    if entry.is_at(entry.path):
                        self._folder.remove(entry.path)
            except OSError as failure:
                self._disable(failure)
            if self.is_disabled:
                return
            if self._num_damages == 1:
                logger.warning("%s", damage(entry.path, error))
            else:
                # Filling it again and again would cost more than it saves.
                self._disable(DamagedEntry(f"damaged again, {error}"))

    def _disable(self, error: Exception) -> None:
        entry, self._entry, self.is_disabled = self._entry, None, True
        if entry is not None:
            _remove_unfinished(entry)
        logger.warning("features are not kept in %s: %s; they are computed every time", self.path.parent, error)


def _remove_unfinished(entry: Entry) -> None:
    if not entry.is_whole:
        shutil.rmtree(entry.path, ignore_errors=True)
