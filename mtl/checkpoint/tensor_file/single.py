"""Reads one file of tensors, whoever wrote it; nothing in it is ever run."""

from __future__ import annotations

import io
import json
import os
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mtl.checkpoint.tensor_file.plain_data import STAND_INS
from mtl.runtime.console import first_line
from mtl.runtime.text import with_article

# safetensors' own key in the metadata, next to names of tied tensors.
_FORMAT = "format"
# The entry of a header that describes no tensor.
_METADATA = "__metadata__"
# What the pickle of every module has in it.
_OF_A_MODULE = (b"_parameters", b"_buffers", b"_modules")
_INSTEAD = "save its tensors where its code is at hand: torch.save(model.state_dict(), FILE)"


class TensorFileError(ValueError):
    """A file that cannot be read as tensors; the message has the reason."""


def file_inside(folder: Path, name: object) -> Path:
    """The file of a folder that an index names; it may be a link, as in the cache of Hugging Face.

    Raises:
        TensorFileError: The name points out of the folder, or there is no such file.
    """
    if not isinstance(name, str):
        raise TensorFileError(f"it names {name!r} as a file")
    # The file may have been written on the other system.
    for form in (PurePosixPath(name), PureWindowsPath(name)):
        if form.anchor or ".." in form.parts:
            raise TensorFileError(f"it names {name}, which is outside the folder; not read")
    file = folder / PurePath(name)
    if not file.is_file():
        raise TensorFileError(f"it names {name}, which is missing")
    return file


def read_tensor_file(file: Path) -> Any:
    """The content of a `.safetensors` file, or of one of `torch.save`: mostly tensors by name, perhaps in containers.

    Tied tensors of a `.safetensors` file have all their names.

    Raises:
        TensorFileError: It is damaged, is no such file, or holds code.
    """
    if file.suffix != ".safetensors":
        return load_pickle(file)
    tensors, tied = read_safetensors(file)
    return tensors | {name: tensors[kept] for name, kept in tied.items()}


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a `.safetensors` file, and other names of some of them, each with the name that is in the file.

    Raises:
        TensorFileError: It is damaged, or is no such file. That memory ran out is raised as it is.
    """
    try:
        tensors: dict[str, Tensor] = load_file(file)
        with safe_open(file, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
    except MemoryError:
        raise
    except Exception as error:  # the library raises a dozen unrelated types for a file that is not its own
        raise TensorFileError(first_line(error)) from error
    # `safetensors.torch.save_model` keeps one of several names, and lists the others in the metadata.
    tied = {name: kept for name, kept in metadata.items() if kept in tensors and name not in tensors}
    return tensors, {name: kept for name, kept in tied.items() if name != _FORMAT}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of a `.safetensors` file describes it (huggingface/safetensors, "Format").

    Attributes:
        dtype: The format's name of its type, such as `F32`.
        shape: Its shape.
        begin: The place of its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a `.safetensors` file by name, none of which is read: the library does not say where they begin.

    Raises:
        TensorFileError: It is damaged, or is no such file.
        OSError: It cannot be read.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length:
            raise TensorFileError("its header is cut short")
        text = stream.read(length)
    try:
        described = {name: own for name, own in json.loads(text).items() if name != _METADATA}
        found = {
            name: StoredTensor(own["dtype"], tuple(own["shape"]), 8 + length + own["data_offsets"][0])
            for name, own in described.items()
        }
        end = max((own["data_offsets"][1] for own in described.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise TensorFileError(f"its header is damaged: {error!r}") from error
    if size < 8 + length + end:
        raise TensorFileError("its tensors are cut short")
    return found


def load_pickle(source: Path | io.BytesIO) -> Any:
    """The content of a file of `torch.save`: tensors and plain data, of which some classes are read as stand-ins.

    Raises:
        TensorFileError: It is damaged, is no such file, or holds code; names the class.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(c, name) for name, c in STAND_INS.items()]):
            # Of old forms and rare layouts, which are read all the same.
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen unrelated types for a file that is not its own
        raise TensorFileError(_reason(error, source)) from error


def _reason(error: Exception, source: Path | io.BytesIO) -> str:
    """Why torch refuses a file. It advises to load such a file with the code in it, which is not passed on."""
    text = str(error)
    if "TorchScript" in text:
        return f"it is a TorchScript archive, which is code; not run; {_INSTEAD}"
    if found := re.search(r"GLOBAL (\S+)", text) or re.search(r"got <class '([^']+)'>", text):
        name = found[1]
        if _holds_module(source):
            return f"it holds a whole module ({name}), whose class is code; not run; {_INSTEAD}"
        return f"it holds {with_article(name)}, which is code; not run"
    if "DTensor" in text:
        return "it holds a torch.distributed.tensor.DTensor, one process's part of a tensor; save full tensors instead"
    if isinstance(error, EOFError):
        return "it is empty, or was cut short"
    if "Weights only" in text:
        return "it is damaged, or holds more than tensors and plain data; code in it is not run"
    return first_line(error)


def _holds_module(source: Path | io.BytesIO) -> bool:
    """Whether a pickle looks like that of a whole module; its text is searched, nothing is unpickled."""
    try:
        with zipfile.ZipFile(source) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    except (OSError, zipfile.BadZipFile):
        # The form before zip files: a pickle from the first byte on.
        pickles = [source.getvalue() if isinstance(source, io.BytesIO) else source.read_bytes()]
    return any(all(word in content for word in _OF_A_MODULE) for content in pickles)
