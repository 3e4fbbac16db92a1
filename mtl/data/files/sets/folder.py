"""The folder of a public data set: lists its files, checks that none is missing, and keeps paths inside it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from mtl.data.cache import DataError
from mtl.data.files.reading import inside
from mtl.runtime.files import dead_link
from mtl.runtime.text import count, hint, shorten


class SetFolder:
    """The folder of a data set. All names are relative to it."""

    def __init__(self, root: str, layout: str, follow_links: bool) -> None:
        """Raises `DataError` if there is no such folder.

        Args:
            root: The folder.
            layout: What it should hold, in a line, at the end of messages.
            follow_links: Whether links may lead out of it.
        """
        self.root = Path(root)
        self._layout = layout
        self._follow_links = follow_links
        if not self.root.is_dir():
            raise self.mistake(f"{root}: no such folder{dead_link(self.root)}")

    def path(self, name: str) -> Path:
        """Raises `DataError` if the name leads out of the folder."""
        return inside(self.root, name, self._follow_links)

    def mistake(self, message: str) -> DataError:
        """An error with the layout that was expected."""
        return DataError(f"{message}; expected layout: {self._layout}")

    def has(self, folder: str) -> bool:
        return (self.root / folder).is_dir()

    def folders(self, name: str) -> list[str]:
        """The names of the folders in a folder, sorted; hidden ones are left out.

        Raises:
            DataError: There is no such folder.
        """
        return sorted(entry.name for entry in self._scan(name) if entry.is_dir() and not entry.name.startswith("."))

    def names(self, folder: str, suffix: str) -> list[str]:
        """The names of a folder's files that end in a suffix, without it: numbers in their order, others sorted.

        Hidden files are left out, such as those that macOS puts into archives.

        Raises:
            DataError: There is no such folder, or no such file in it.
        """
        entries = [entry.name for entry in self._scan(folder)]
        found = [name.removesuffix(suffix) for name in entries if name.endswith(suffix) and not name.startswith(".")]
        if not found:
            holds = f"; it holds {shorten(sorted(entries), 3)}" if entries else "; it is empty"
            raise self.mistake(f"{self.root / folder}: no file ends in {suffix}{holds}")
        return sorted(found, key=_in_order)

    def lines(self, file: str) -> list[str]:
        """The lines of a text file that are not empty.

        Raises:
            DataError: It cannot be read.
        """
        path = self.path(file)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            if isinstance(error, FileNotFoundError):
                raise self.mistake(f"{self.root / file}: no such list{self._near(file)}") from error
            raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        return [stripped for line in text.splitlines() if (stripped := line.strip())]

    def check_same(self, names: Mapping[str, Sequence[str]]) -> None:
        """Checks that folders hold files of the same names.

        Args:
            names: What `names` returned, by folder.

        Raises:
            DataError: They do not; the message gives the counts, and a name of the difference.
        """
        (first, expected), *others = names.items()
        for folder, found in others:
            if expected == found:
                continue
            missing, surplus = set(expected) - set(found), set(found) - set(expected)
            where, name = (folder, min(missing, key=_in_order)) if missing else (first, min(surplus, key=_in_order))
            raise self.mistake(
                f"{self.root / folder}: expected the names of the {count(len(expected), 'file')} of {first},"
                f" got {len(found):,}; {where} has no {name}"
            )

    def check_files(self, files: Iterable[str]) -> None:
        """Checks that files are there; every folder is listed once.

        Raises:
            DataError: A file is missing; the message names the first one and says how many there are.
        """
        wanted: dict[str, list[str]] = defaultdict(list)
        for file in files:
            folder, _, name = file.rpartition("/")
            wanted[folder].append(name)
        missing: list[str] = []
        for folder, names in wanted.items():
            there = {entry.name for entry in self._scan(folder)}
            if not there.issuperset(names):
                missing += [f"{folder}/{name}" for name in names if name not in there]
        if missing:
            more = f", and {count(len(missing) - 1, 'more file')}" if len(missing) > 1 else ""
            raise self.mistake(f"{self.root / missing[0]}: no such file{more}")

    def _scan(self, folder: str) -> list[os.DirEntry[str]]:
        path = self.path(folder)
        try:
            with os.scandir(path) as entries:
                return list(entries)
        except FileNotFoundError as error:
            raise self.mistake(
                f"{self.root / folder}: no such folder{dead_link(self.root / folder)}{self._near(folder)}"
            ) from error
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error

    def _near(self, name: str) -> str:
        """The nearest name that is there, in the innermost folder of the path that is there."""
        at = PurePosixPath(name)
        while at.parent != at and not (self.root / at.parent).is_dir():
            at = at.parent
        return hint(at.name, [each.name for each in (self.root / at.parent).iterdir()])


def _in_order(name: str) -> tuple[int, str]:
    return (len(name) if name.isdecimal() else 0, name)
