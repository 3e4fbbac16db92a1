"""Frozen tensors, stored once: checkpoints have hard links to one file, or to the files of one folder, per set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mtl.checkpoint.files import fingerprint_of
from mtl.checkpoint.run_files import FROZEN_FILE
from mtl.checkpoint.tensor_file import TensorFileError, file_digest, read_tensor_file, shards
from mtl.distributed.world import World
from mtl.runtime.files import sync
from mtl.runtime.fingerprint import root


class FrozenFiles:
    """Files of frozen tensors, or folders of their shards, named after the fingerprint of what is in them.

    Every checkpoint has a link of its own to the file, so that the file stays for as long as one of them does, whatever
    happens to this folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # By fingerprint, the file that was read or written last, and when it was last changed.
        self._sound: dict[str, tuple[int, ...]] = {}

    def provide(self, file: Path, fingerprint: str, write: Callable[[Path], None]) -> None:
        """Makes a file of a checkpoint a link to the one with a fingerprint.

        Args:
            file: The checkpoint's.
            fingerprint: Of the tensors.
            write: Writes the tensors to a file, and forces it to disk; called if they are missing or damaged.
        """
        kept = self._kept(fingerprint)
        # Read again if it was touched: a file that was damaged since would damage all later checkpoints.
        if self._sound.get(fingerprint) != _state_of(kept) and file_fingerprint(kept) != fingerprint:
            self.folder.mkdir(exist_ok=True)
            temporary = self.folder / f".{kept.name}.tmp"
            temporary.unlink(missing_ok=True)
            write(temporary)
            temporary.replace(kept)
            sync(self.folder)
        link_or_copy(kept, file)
        self._sound[fingerprint] = _state_of(kept)

    def has(self, fingerprint: str) -> bool:
        """Whether `provide` would write nothing, and read nothing."""
        return fingerprint in self._sound and self._sound[fingerprint] == _state_of(self._kept(fingerprint))

    def adopt(self, file: Path, source: Path) -> None:
        """Makes a file of a checkpoint a link to another run's, or a copy of it, and keeps it here as well."""
        fingerprint = file_fingerprint(source)
        if fingerprint is None:
            # Reading it raises an error with the reason.
            link_or_copy(source, file)
        else:
            self.provide(file, fingerprint, lambda target: link_or_copy(source, target))

    def _kept(self, fingerprint: str) -> Path:
        return self.folder / f"{fingerprint}.safetensors"

    def provide_shards(
        self, folder: Path, digests: Mapping[str, str], file: str, write: Callable[[Path], None], world: World
    ) -> None:
        """As `provide`, for a folder with a file of each process; all have to call it.

        Args:
            folder: The checkpoint's.
            digests: Of all files, by name.
            file: The name of this process's file.
            write: Writes the shards to a folder, and forces them to disk; called if they are missing or damaged.
            world: The processes.
        """
        kept = self.folder / root(digests)
        is_sound = file not in digests or file_digest(kept / file) == digests[file]
        if world.all_reduce_flags(broken=not is_sound).broken:
            temporary = self.folder / f".{kept.name}.tmp"
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            world.barrier()
            write(temporary)
            if world.is_main:
                shutil.rmtree(kept, ignore_errors=True)
                temporary.rename(kept)
                sync(self.folder)
        if world.is_main:
            _link_all(kept, folder, digests)

    def adopt_shards(self, folder: Path, source: Path) -> None:
        """As `adopt`, for a folder of another run's checkpoint."""
        # A damaged one gets another name, and reading it raises an error with the reason.
        digests = _digests(source)
        kept = self.folder / root(digests)
        if not kept.is_dir() or _digests(kept) != digests:
            temporary = self.folder / f".{kept.name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            _link_all(source, temporary, digests)
            shutil.rmtree(kept, ignore_errors=True)
            temporary.rename(kept)
            sync(self.folder)
        _link_all(kept, folder, digests)

    def sweep(self, checkpoints: Iterable[Path]) -> None:
        """Removes the files that none of these checkpoints has a link to."""
        if not self.folder.is_dir():
            return
        # Not by the number of links: another run may have one.
        held = {
            _identity(file)
            for folder in checkpoints
            for file in (folder / FROZEN_FILE, *(folder / shards.FROZEN).glob("*"))
            if file.exists()
        }
        for kept in self.folder.iterdir():
            files = list(kept.iterdir()) if kept.is_dir() else [kept]
            if not any(_identity(file) in held for file in files):
                shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _state_of(file: Path) -> tuple[int, ...]:
    """Another one whenever a file's content may be another, or it is another file; a new link to it changes nothing."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def file_fingerprint(file: Path) -> str | None:
    """The fingerprint of the tensors that a file holds; None if there is no such file, or it cannot be read."""
    try:
        return fingerprint_of(read_tensor_file(file))
    except TensorFileError:
        return None


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system has such, or a copy that is forced to disk."""
    try:
        # Never a link to a link, which would point out of the folder.
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def _digests(folder: Path) -> dict[str, str]:
    """The digests of a folder's shards, by file; empty for what cannot be read."""
    return {file.name: file_digest(file) or "" for file in sorted(folder.iterdir())}


def _link_all(source: Path, folder: Path, names: Iterable[str]) -> None:
    folder.mkdir(parents=True)
    for name in names:
        link_or_copy(source / name, folder / name)
    sync(folder)


def _identity(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino
