"""A run's checkpoints: one folder each, and links to some of them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from mtl.checkpoint.background import Background
from mtl.checkpoint.files import (
    CheckpointContent,
    HasState,
    OptimizerState,
    collect,
    num_bytes_of,
    write_state,
    write_tensors,
)
from mtl.checkpoint.frozen import FrozenFiles
from mtl.checkpoint.load import ASIDE, newest_first, step_of
from mtl.checkpoint.replace import UNFINISHED, hidden, remove, replacing
from mtl.checkpoint.run_files import FROZEN_FILE, MODEL_FILE, OPTIMIZER_FILE, STATE
from mtl.checkpoint.sharded import ShardedContent, collect_shards, shard_file, write_shards
from mtl.checkpoint.tensor_file import shards
from mtl.distributed.world import World
from mtl.runtime.files import sync

# Copies of no more bytes are made to write them in a thread: the machine may have no room for more.
_MOST_COPIED = 1 << 30


class SaveError(OSError):
    """A checkpoint that could not be written; those before it are as they were."""


class Checkpoints:
    """The checkpoints of a run.

    Each lies in a folder of its own, `step-<n>`; `last` and `best` are links to two of them, so that a new one takes
    the place of an old one at once; every other metric that a phase goes back to the best weights of has a link as
    well. Folders that no link points to are removed, but for the newest ones, which are there to fall back to. One
    process at a time may write to them.

    A checkpoint may be written in a thread, from copies of its tensors; whatever else is asked of the folder waits.

    Whenever the process is killed, every `step-<n>` is complete: it is written, and removed, under a hidden name.
    """

    def __init__(self, folder: Path, keep_last: int = 2, mends: bool = True) -> None:
        """Opens a folder, which need not be there, and mends what a killed process left in the middle of a move.

        Args:
            folder: Where the checkpoints lie.
            keep_last: How many of the newest are kept, whether or not a link points to them.
            mends: Whether it is this process that mends; of several, one does.
        """
        self.folder = folder
        self._keep_last = keep_last
        self._frozen = FrozenFiles(folder / "frozen")
        self._background = Background()
        for aside in folder.glob(f".step-*{ASIDE}") if mends else ():
            target = folder / aside.name[1 : -len(ASIDE)]
            if target.exists():
                remove(aside)
            else:
                aside.rename(target)
                sync(folder)

    def save(
        self,
        module: HasState,
        frozen: Collection[str],
        optimizer_state: OptimizerState,
        state: Mapping[str, Any],
        names: Collection[str],
        keep: bool = False,
        known: Mapping[str, str] | None = None,
        in_thread: bool = False,
    ) -> None:
        """Writes a checkpoint; one of the same step is replaced.

        Args:
            module: Whose tensors are kept, under their names, each once.
            frozen: Which of them are frozen (parameters and buffers), and so are stored once for many checkpoints;
                names that the module's state does not have do not count.
            optimizer_state: Optimizer state, and other nested state; see `nested.split`.
            state: Plain data; `step` names the folder.
            names: The links to point to it: `last`, `best`.
            keep: Keep it permanently.
            known: Fingerprints of frozen tensors whose bytes were compared just now; they are not taken again.
            in_thread: Return before it is written, if what has to be copied for that is not large, and the frozen
                tensors are on disk already; `wait` returns after.

        Raises:
            SaveError: The disk is full, or cannot be written: this one, or the one before, written in a thread.
            TypeError: Something cannot be stored; nothing was written.
        """
        self.wait()
        content = collect(module, frozen, optimizer_state, state, known)
        is_small = num_bytes_of(content.model) + num_bytes_of(content.optimizer) <= _MOST_COPIED
        if in_thread and is_small and (not content.frozen or self._frozen.has(content.state["digests"]["frozen"])):
            self._background.start(partial(self._save, content.with_copies(), [*names], keep))
        else:
            self._save(content, names, keep)

    def _save(self, content: CheckpointContent, names: Collection[str], keep: bool) -> None:
        target = self._of(content.state["step"])
        with self._explained(target, content.num_bytes):
            with self._replacing(target) as temporary:
                self._write(temporary, content)
            self._finish(target, names, keep)

    def wait(self) -> None:
        """Returns once nothing is being written.

        Raises:
            SaveError: What was written in a thread could not be.
        """
        self._background.wait()

    def save_shards(
        self,
        module: nn.Module,
        frozen: Collection[str],
        optimizer_state: OptimizerState,
        state: Mapping[str, Any],
        names: Collection[str],
        world: World,
        keep: bool = False,
    ) -> None:
        """As `save`, of a sharded module: each process writes its shards. All have to call it.

        The checkpoint takes its place once all have written. Rank 0 writes what is not sharded, the folders and links.
        """
        self.wait()
        content = collect_shards(module, frozen, optimizer_state, state, world)
        target = self._of(state["step"])
        with self._explained(target, content.num_bytes):
            unfinished = contextlib.nullcontext(hidden(target, UNFINISHED))
            with self._replacing(target) if world.is_main else unfinished as temporary:
                # The folder is there.
                world.barrier()
                self._write_shards(temporary, content, world)
            if world.is_main:
                self._finish(target, names, keep)

    def _finish(self, target: Path, names: Collection[str], keep: bool) -> None:
        for name in [*names, *([target.name.replace("step", "kept")] if keep else [])]:
            self._link(name, target.name)
        # The folder's new name and its links in one go; before any other checkpoint is removed.
        sync(self.folder)
        self._prune()

    def adopt(self, folder: Path, step: int, name: str) -> None:
        """Takes a copy of another run's checkpoint of a step under a link's name.

        Raises:
            SaveError: The disk is full, or cannot be written.
        """
        self.wait()
        target = self._of(step)
        with self._explained(target, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())):
            if not target.exists():
                with self._replacing(target) as temporary:
                    self._copy(folder, temporary)
            self._link(name, target.name)
            sync(self.folder)

    def find(self, name: str) -> Path | None:
        """The checkpoint that a link points to; None if there is none yet."""
        self.wait()
        return self.folder / name if (self.folder / name).exists() else None

    def is_at(self, name: str, step: int) -> bool:
        """Whether a link points to the checkpoint of a step."""
        found = self.find(name)
        return found is not None and found.resolve().name == self._of(step).name

    def drop_newer(self, step: int) -> None:
        """Removes the checkpoints that are newer than a step, and the links that pointed to them."""
        self.wait()
        newer = [folder for folder in newest_first(self.folder) if step_of(folder) > step]
        names = {folder.name for folder in newer}
        for link in self._links():
            if link.readlink().name in names:
                link.unlink()
        for folder in newer:
            remove(folder)
        self._frozen.sweep(self._folders())

    def _of(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _folders(self) -> list[Path]:
        """All folders that may be complete, those under hidden names too."""
        return [*self.folder.glob("step-*"), *self.folder.glob(".step-*")]

    def _links(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_symlink() and not path.name.startswith(".")]

    def _write(self, folder: Path, content: CheckpointContent) -> None:
        write_tensors(folder / MODEL_FILE, content.model)
        write_tensors(folder / OPTIMIZER_FILE, content.optimizer)
        if content.frozen:
            fingerprint = content.state["digests"]["frozen"]
            self._frozen.provide(folder / FROZEN_FILE, fingerprint, lambda file: write_tensors(file, content.frozen))
        write_state(folder, content.state)

    def _write_shards(self, folder: Path, content: ShardedContent, world: World) -> None:
        for kind in (shards.MODEL, shards.OPTIMIZER):
            # All processes have the same names, if not the same shards; whichever comes first makes the folder.
            (folder / kind).mkdir(exist_ok=True)
            if kind in content.state[shards.SHARDS]:
                write_shards(folder / kind, content.kinds[kind], world)
        if digests := shards.files_of(content.state, shards.FROZEN):
            self._frozen.provide_shards(
                folder / shards.FROZEN,
                digests,
                shard_file(world.rank),
                lambda place: write_shards(place, content.kinds[shards.FROZEN], world),
                world,
            )
        if world.is_main:
            write_state(folder, content.state)

    def _copy(self, folder: Path, target: Path) -> None:
        """Copies a checkpoint's files; what is frozen is linked, if it can be."""
        for name in (MODEL_FILE, OPTIMIZER_FILE, STATE):
            if (folder / name).exists():
                _copy_file(folder / name, target / name)
        if (folder / FROZEN_FILE).exists():
            self._frozen.adopt(target / FROZEN_FILE, folder / FROZEN_FILE)
        for kind in (shards.MODEL, shards.OPTIMIZER):
            for file in (folder / kind).glob("*"):
                (target / kind).mkdir(exist_ok=True)
                _copy_file(file, target / kind / file.name)
        if (folder / shards.FROZEN).is_dir():
            self._frozen.adopt_shards(target / shards.FROZEN, folder / shards.FROZEN)

    @contextlib.contextmanager
    def _replacing(self, target: Path) -> Iterator[Path]:
        """A folder to be filled, which takes the place of the target once it is, and goes if it cannot be filled."""
        try:
            with replacing(target) as temporary:
                yield temporary
        except BaseException:
            with contextlib.suppress(OSError):
                self._frozen.sweep(self._folders())
            raise

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

    def _prune(self) -> None:
        kept = {link.readlink().name for link in self._links()}
        kept |= {folder.name for folder in newest_first(self.folder)[: self._keep_last]}
        for folder in self.folder.glob("step-*"):
            if folder.name not in kept:
                remove(folder)
        # What a run that was killed left half written, or half removed.
        for path in self.folder.glob(f".*{UNFINISHED}"):
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)
        # Last: until here each of these folders had its own link, and whoever dies before leaves it to the next time.
        self._frozen.sweep(self._folders())


def _copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    sync(target)
