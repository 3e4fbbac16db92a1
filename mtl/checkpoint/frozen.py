"""What is frozen, stored once: hard links to one file for every set of frozen tensors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from mtl.checkpoint.files import FROZEN, fingerprint_of
from mtl.disk import sync
from mtl.tensor_file import TensorFileError, read_tensor_file


class FrozenFiles:
    """Files of frozen tensors, named after the fingerprint of what is in them.

    Every checkpoint has a link of its own to the file, so that the file stays for as long as one of them does, whatever
    happens to this folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def provide(self, file: Path, fingerprint: str, write: Callable[[Path], None]) -> None:
        """Makes a file of a checkpoint a link to the one with a fingerprint.

        Args:
            file: The checkpoint's.
            fingerprint: Of the tensors.
            write: Writes the tensors to a file, and forces it to disk; called if they are not there whole.
        """
        kept = self.folder / f"{fingerprint}.safetensors"
        # Read, not believed: a file that has been damaged since would damage all checkpoints to come.
        if file_fingerprint(kept) != fingerprint:
            self.folder.mkdir(exist_ok=True)
            temporary = self.folder / f".{kept.name}.tmp"
            temporary.unlink(missing_ok=True)
            write(temporary)
            temporary.replace(kept)
            sync(self.folder)
        link_or_copy(kept, file)

    def adopt(self, file: Path, source: Path) -> None:
        """Makes a file of a checkpoint a link to another run's, or a copy of it, and keeps it here as well."""
        fingerprint = file_fingerprint(source)
        if fingerprint is None:
            # It will be refused when it is read, with the reason.
            link_or_copy(source, file)
        else:
            self.provide(file, fingerprint, lambda target: link_or_copy(source, target))

    def sweep(self, checkpoints: Iterable[Path]) -> None:
        """Removes the files that none of these checkpoints has a link to."""
        if not self.folder.is_dir():
            return
        # Not by the number of links: another run may have one.
        held = {_identity(folder / FROZEN) for folder in checkpoints if (folder / FROZEN).exists()}
        for file in self.folder.iterdir():
            if file.is_file() and _identity(file) not in held:
                file.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


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


def _identity(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino
