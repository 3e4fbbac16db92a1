"""One checkpoint, whatever its form: a file, or a folder of files that belong together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mtl.checkpoint.run_files import FROZEN_FILE, MODEL_FILE, OPTIMIZER_FILE, STATE, RunFileError, read_state_file
from mtl.checkpoint.tensor_file.contents import Contents, Leaves, named
from mtl.checkpoint.tensor_file.dcp import METADATA, read_dcp
from mtl.checkpoint.tensor_file.shards import FROZEN, MODEL, OPTIMIZER, Shards
from mtl.checkpoint.tensor_file.single import TensorFileError, file_inside, read_safetensors, read_tensor_file
from mtl.runtime.files import JsonFileError, read_json

# What a folder may hold; the first one found is read: one file, shards with an index, or chunks.
_INDEX = ".index.json"
_IN_FOLDERS = (
    MODEL_FILE,
    f"{MODEL_FILE}{_INDEX}",
    METADATA,
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
)
# Files that may hold tensors; those of a folder that are not read are listed as left out.
_OF_TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


class UnreadableError(ValueError):
    """A file that holds no tensors, or not all that it should hold."""


def read_contents(path: Path) -> Contents:
    """All tensors of a checkpoint by name, and what in it was not read as tensors.

    Args:
        path: A `.safetensors` file; a file of `torch.save`, read with `weights_only`; or a folder: a checkpoint of a
            run of `mtl`, plain or in shards of its processes; one with `model.safetensors`; one with shards and their
            index, as Hugging Face writes them; or one with the chunks of `torch.distributed.checkpoint`.

    Raises:
        UnreadableError: There is no such file, it is damaged, holds code, or holds no tensors.
    """
    if path.name == MODEL_FILE and is_of_run(path.parent):
        # What a run froze is in a file of its own.
        path = path.parent
    try:
        leaves = _of_run(path) if is_of_run(path) else _leaves(path)
    except RecursionError as error:
        raise UnreadableError(f"{path}: cannot be read: it is nested too deeply") from error
    contents = named(leaves)
    if not any(isinstance(value, Tensor) for value in contents.everything.values()):
        # The reason for what could not be read is more use.
        reasons = [f": {name}: {each.reason}" for name, each in contents.rest.items() if not isinstance(each, Tensor)]
        raise UnreadableError(f"{path}: holds no tensors{reasons[0] if reasons else ''}")
    return contents


def is_of_run(path: Path) -> bool:
    """Whether a folder is a checkpoint that a run of `mtl` wrote."""
    return (path / STATE).is_file() and ((path / MODEL).is_dir() or (path / MODEL_FILE).is_file())


def is_in_shards(path: Path) -> bool:
    """Whether a folder is a sharded checkpoint of `mtl`: each process wrote its part."""
    return is_of_run(path) and (path / MODEL).is_dir()


def read_shards(folder: Path, kinds: Collection[str] = (MODEL, FROZEN)) -> dict[str, Tensor]:
    """The full tensors of a sharded checkpoint (see `is_in_shards`): of its model, or of others of its folders.

    Raises:
        UnreadableError: It is damaged.
    """
    try:
        return dict(Shards(folder, read_state_file(folder / STATE), kinds))
    except RunFileError as error:
        raise UnreadableError(str(error)) from error
    except TensorFileError as error:
        raise UnreadableError(f"{folder}: cannot be read: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise UnreadableError(f"{folder / STATE}: cannot be read: {error!r}") from error


def _of_run(folder: Path) -> Leaves:
    """The model under its own names, with all names of tied tensors; and the tensors of optimizers."""
    try:
        state = read_state_file(folder / STATE)
    except RunFileError as error:
        raise UnreadableError(str(error)) from error
    if is_in_shards(folder):
        model, optimizer = read_shards(folder), read_shards(folder, [OPTIMIZER])
    else:
        model = _readable(folder / MODEL_FILE)
        # Where some was frozen, there has to be its file.
        if "frozen" in state.get("digests", {}) or (folder / FROZEN_FILE).is_file():
            model |= _readable(folder / FROZEN_FILE)
        optimizer = _readable(folder / OPTIMIZER_FILE) if (folder / OPTIMIZER_FILE).is_file() else {}
    tied: Mapping[str, str] = state.get("tied", {})
    leaves = Leaves()
    leaves.add(model | {name: model[first] for name, first in tied.items() if first in model}, (MODEL,))
    leaves.add(optimizer, (OPTIMIZER,))
    return leaves


def _leaves(path: Path) -> Leaves:
    main = _main_file(path)
    leaves, read = Leaves(), {main}
    try:
        if main.name == METADATA:
            leaves = read_dcp(main.parent)
        elif main.name.endswith(_INDEX):
            parts = _indexed(main)
            read |= parts.keys()
            for tensors in parts.values():
                leaves.add(tensors)
        else:
            leaves.add(_readable(main))
    except TensorFileError as error:
        raise UnreadableError(f"{main}: cannot be read: {error}") from error
    for file in sorted(path.rglob("*")) if path.is_dir() else ():
        if file.suffix in _OF_TENSORS and file.is_file() and file not in read:
            leaves.leave_out((file.relative_to(path).as_posix(),), "a file of the folder that is not read", file)
    return leaves


def _readable(file: Path) -> Any:
    if not file.is_file():
        raise UnreadableError(f"{file}: no such checkpoint")
    try:
        return read_tensor_file(file)
    except TensorFileError as error:
        raise UnreadableError(f"{file}: cannot be read: {error}") from error


def _main_file(path: Path) -> Path:
    """The file to begin with."""
    if not path.is_dir():
        return path
    found = next((path / name for name in _IN_FOLDERS if (path / name).is_file()), None)
    if found is None:
        inside = path / "checkpoints"
        hint = f"; {path} is a run: give one of its checkpoints, such as {inside / 'last'}" if inside.is_dir() else ""
        raise UnreadableError(f"{path}: no such checkpoint (a folder with none of {', '.join(_IN_FOLDERS)}){hint}")
    return found


def _indexed(index: Path) -> dict[Path, dict[str, Tensor]]:
    """The tensors of each file that an index names; each has to hold exactly those that the index lists."""
    try:
        placed = read_json(index)["weight_map"].items()
    except JsonFileError as error:
        raise UnreadableError(str(error)) from error
    except (OSError, LookupError, AttributeError) as error:
        raise TensorFileError("it is no index with a weight_map") from error
    expected: dict[Path, set[str]] = {}
    for name, shard in placed:
        expected.setdefault(file_inside(index.parent, shard), set()).add(name)
    parts: dict[Path, dict[str, Tensor]] = {}
    for file, names in expected.items():
        try:
            tensors, tied = read_safetensors(file) if file.suffix == ".safetensors" else (read_tensor_file(file), {})
        except TensorFileError as error:
            raise TensorFileError(f"{file.name}: {error}") from error
        if not isinstance(tensors, Mapping) or not all(isinstance(each, Tensor) for each in tensors.values()):
            raise TensorFileError(f"{file.name}: holds no tensors by name, or other things next to them")
        for name in sorted(names ^ set(map(str, tensors))):
            if name not in tied:
                what = "lacks" if name in names else "holds, and the index not,"
                raise TensorFileError(f"{file.name}: {what} {name}")
        parts[file] = {**tensors, **{name: tensors[kept] for name, kept in tied.items()}}
    return parts
