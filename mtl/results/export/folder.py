"""The folder of an export: all files of it or none, and no file of anybody else is replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mtl.config import SettingError
from mtl.runtime.files import JsonFileError, read_json, sync

# Lists the files of an export, next to what else a program wants to know of it.
RECORD, CARD = "export.json", "README.md"


def check_out(out: Path, run_dir: Path, force: bool) -> None:
    """Raises `SettingError` if nothing may be written into a folder.

    Args:
        out: The folder.
        run_dir: The run that is exported, which stays as it is.
        force: Whether the files of an earlier export are replaced.
    """
    if out.resolve().is_relative_to(run_dir.resolve()):
        raise SettingError("--out", f"{out} is inside the run's directory, which is not changed; name another one")
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir():
        raise SettingError("--out", f"{out} is there, and no folder; name another one")
    if not force and any(out.iterdir()):
        raise SettingError("--out", f"{out} is not empty; name another one, or replace the export in it by --force")
    _check_foreign(out, [CARD, RECORD], _of_export(out))


@contextmanager
def all_or_nothing(out: Path) -> Iterator[Path]:
    """A new folder whose files become those of an export when the block ends, and vanish if it raises.

    Raises:
        SettingError: A file of that name is there, and of no export; the folder is as it was.
        OSError: The folder cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    folder.mkdir()
    try:
        yield folder
        _move(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, out: Path) -> None:
    files = sorted(each.name for each in folder.iterdir())
    if not out.exists():
        folder.rename(out)
        sync(out.parent)
        return
    earlier = _of_export(out)
    _check_foreign(out, files, earlier)
    for name in earlier - set(files):
        (out / name).unlink(missing_ok=True)
    # The record last: until then, it lists what was there before.
    for name in sorted(files, key=lambda each: each == RECORD):
        (folder / name).replace(out / name)
    sync(out)


def _check_foreign(out: Path, files: Iterable[str], earlier: Collection[str]) -> None:
    for name in files:
        if name not in earlier and (out / name).exists():
            raise SettingError("--out", f"{out / name} is of no export, and is not replaced; name another folder")


def _of_export(out: Path) -> set[str]:
    """The files of an earlier export in a folder, as it lists them."""
    if not (out / RECORD).is_file():
        return set()
    try:
        listed = read_json(out / RECORD).get("files")
    except JsonFileError as error:
        raise SettingError("--out", f"{error}; remove it, or name another folder") from error
    if not isinstance(listed, list):
        return set()
    names = {str(name) for name in listed}
    # A record is a file that anybody can edit.
    return {RECORD, *(name for name in names if Path(name).name == name)}
