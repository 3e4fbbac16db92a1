"""A run's checkpoints: one folder each, links to some of them, and the way back to an older one if one is damaged."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from mtl.checkpoint.files import (
    FROZEN,
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointError,
    Content,
    DamagedCheckpoint,
    HasState,
    MomentsState,
    collect,
    load_checkpoint,
    write_tensors,
)
from mtl.checkpoint.frozen import FrozenFiles
from mtl.disk import sync, write_json

_STEP = re.compile(r"step-(\d{8,})")
# A checkpoint that makes place for another of the same step, and one that is half written or half removed.
_ASIDE, _UNFINISHED = ".old", ".tmp"


class SaveError(OSError):
    """A checkpoint that could not be written; those before it are as they were."""


class Checkpoints:
    """The checkpoints of a run.

    Each lies in a folder of its own, `step-<n>`; `last` and `best` are links to two of them, so that a new one takes
    the place of an old one at once; every other metric that a phase goes back to the best weights of has a link as
    well. Folders that no link points to are removed, but for the newest ones, which are there to fall back to. One
    process at a time may write to them.

    Whenever the process is killed, every `step-<n>` is whole: it is written, and removed, under a hidden name.
    """

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        """Opens a folder, which need not be there, and mends what a killed process left in the middle of a move.

        Args:
            folder: Where the checkpoints lie.
            keep_last: How many of the newest are kept, whether or not a link points to them.
        """
        self.folder = folder
        self._keep_last = keep_last
        self._frozen = FrozenFiles(folder / "frozen")
        for aside in folder.glob(f".step-*{_ASIDE}"):
            target = folder / aside.name[1 : -len(_ASIDE)]
            if target.exists():
                self._remove(aside)
            else:
                aside.rename(target)
                sync(folder)

    def save(
        self,
        module: HasState,
        frozen: Collection[str],
        moments: MomentsState,
        state: Mapping[str, Any],
        names: Collection[str],
        keep: bool = False,
    ) -> None:
        """Writes a checkpoint; one of the same step is replaced.

        Args:
            module: Whose tensors are kept, under their names, each once.
            frozen: Which of them are frozen (parameters and buffers), and so are stored once for many checkpoints;
                names that the module's state does not have do not count.
            moments: What optimizers remember of its parameters, and whatever else; see `nested.split`.
            state: Plain data beside them; `step` names the folder.
            names: The links that shall point to it: `last`, `best`.
            keep: Keep it for good.

        Raises:
            SaveError: The disk is full, or cannot be written.
            TypeError: There is something that cannot be kept; nothing was written.
        """
        content = collect(module, frozen, moments, state)
        target = self._of(state["step"])
        with self._explained(target, content.num_bytes):
            with self._replacing(target) as temporary:
                self._write(temporary, content)
            for name in [*names, *([target.name.replace("step", "kept")] if keep else [])]:
                self._link(name, target.name)
            self._prune()

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of a step."""
        return self._of(step).exists()

    def adopt(self, folder: Path, step: int, name: str) -> None:
        """Takes a copy of another run's checkpoint of a step under a link's name.

        Raises:
            SaveError: The disk is full, or cannot be written.
        """
        target = self._of(step)
        files = [folder / file for file in (MODEL, OPTIMIZER, STATE, FROZEN) if (folder / file).exists()]
        with self._explained(target, sum(file.stat().st_size for file in files)):
            if not target.exists():
                with self._replacing(target) as temporary:
                    for file in files:
                        if file.name == FROZEN:
                            self._frozen.adopt(temporary / FROZEN, file)
                        else:
                            shutil.copyfile(file, temporary / file.name)
                            sync(temporary / file.name)
            self._link(name, target.name)

    def find(self, name: str) -> Path | None:
        """The checkpoint that a link points to; None if there is none yet."""
        return self.folder / name if (self.folder / name).exists() else None

    def is_at(self, name: str, step: int) -> bool:
        """Whether a link points to the checkpoint of a step."""
        found = self.find(name)
        return found is not None and found.resolve().name == self._of(step).name

    def drop_newer(self, step: int) -> None:
        """Removes the checkpoints that are newer than a step, and the links that pointed to them."""
        newer = [folder for folder in newest_first(self.folder) if _step_of(folder) > step]
        names = {folder.name for folder in newer}
        for link in self._links():
            if link.readlink().name in names:
                link.unlink()
        for folder in newer:
            self._remove(folder)
        self._frozen.sweep(self._folders())

    def _of(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _folders(self) -> list[Path]:
        """All folders that may be whole, those under hidden names too."""
        return [*self.folder.glob("step-*"), *self.folder.glob(".step-*")]

    def _links(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_symlink() and not path.name.startswith(".")]

    def _write(self, folder: Path, content: Content) -> None:
        write_tensors(folder / MODEL, content.model)
        write_tensors(folder / OPTIMIZER, content.optimizer)
        if content.frozen:
            fingerprint = content.state["digests"]["frozen"]
            self._frozen.provide(folder / FROZEN, fingerprint, lambda file: write_tensors(file, content.frozen))
        write_json(folder / STATE, content.state)

    @contextlib.contextmanager
    def _replacing(self, target: Path) -> Iterator[Path]:
        """A folder to be filled, which takes the place of the target once it is, and goes if it cannot be filled."""
        temporary = _hidden(target, _UNFINISHED)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            sync(temporary)
            self._put(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._frozen.sweep(self._folders())
            raise

    def _put(self, temporary: Path, target: Path) -> None:
        aside = _hidden(target, _ASIDE)
        if target.exists():
            target.rename(aside)
        try:
            temporary.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
        sync(self.folder)
        if aside.exists():
            self._remove(aside)

    @contextlib.contextmanager
    def _explained(self, target: Path, num_bytes: int) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
            raise SaveError(
                f"{target} cannot be written: it needs {num_bytes:,} bytes, and {free:,} are free: {error}; the"
                " checkpoints before it are as they were"
            ) from error

    def _link(self, name: str, target: str) -> None:
        link = self.folder / f".{name}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        link.replace(self.folder / name)
        sync(self.folder)

    def _prune(self) -> None:
        kept = {link.readlink().name for link in self._links()}
        kept |= {folder.name for folder in newest_first(self.folder)[: self._keep_last]}
        for folder in self.folder.glob("step-*"):
            if folder.name not in kept:
                self._remove(folder)
        # What a run that was killed left half written, or half removed.
        for path in self.folder.glob(f".*{_UNFINISHED}"):
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)
        # Last: until here each of these folders had its own link, and whoever dies before leaves it to the next time.
        self._frozen.sweep(self._folders())

    def _remove(self, folder: Path) -> None:
        """Removes a checkpoint, or one that was moved aside; whoever dies half-way leaves what is nobody's."""
        unfinished = _hidden(folder, _UNFINISHED)
        shutil.rmtree(unfinished, ignore_errors=True)
        folder.rename(unfinished)
        shutil.rmtree(unfinished)


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints in a folder, the newest first; one that a killed process left moved aside stands for its step."""
    found = {}
    for path in [*folder.glob(f".step-*{_ASIDE}"), *folder.glob("step-*")]:
        if _STEP.fullmatch(path.name.strip(".").removesuffix(_ASIDE)) and path.is_dir() and not path.is_symlink():
            found[_step_of(path)] = path
    return [found[step] for step in sorted(found, reverse=True)]


def load_newest(folder: Path, module: nn.Module) -> tuple[Path, dict[str, Any], MomentsState, list[str]]:
    """Fills a module from the newest checkpoint that is sound.

    Args:
        folder: The run's `checkpoints`.
        module: Is filled strictly; it stays as it was if none is sound.

    Returns:
        The checkpoint, its plain data, what optimizers remembered, and one sentence for each newer one that is damaged.

    Raises:
        CheckpointError: None is sound, or the newest sound one does not fit the module.
    """
    refused: list[str] = []
    for path in newest_first(folder):
        try:
            return path, *load_checkpoint(path, module), refused
        except DamagedCheckpoint as error:
            refused.append(str(error))
    if refused:
        raise CheckpointError(f"{folder} has no checkpoint that is sound: {'; '.join(refused)}")
    raise CheckpointError(f"{folder} has no checkpoints")


def _step_of(folder: Path) -> int:
    return int(re.sub(r"\D", "", folder.name))


def _hidden(folder: Path, suffix: str) -> Path:
    plain = folder.name.strip(".").removesuffix(_ASIDE)
    return folder.with_name(f".{plain}{suffix}")
