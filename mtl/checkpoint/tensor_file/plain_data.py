"""Plain data in pickles that torch refuses for its class alone: namespaces of arguments, paths, NumPy's numbers.

They are read as stand-ins that keep what was stored: none of the classes that a file names is called. NumPy's own would
not be harmless: a type of elements with crafted state makes it take any bytes for addresses.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor


class StandIn:
    """Stands in for what a pickle calls: keeps the arguments, and the state that it is given.

    Attributes:
        full_name: The name in the pickle.
        arguments: What it would have been called with.
        state: What would have been its attributes.
    """

    full_name: ClassVar[str] = ""
    arguments: tuple[object, ...] = ()
    state: Any = None

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state

    @property
    def kind(self) -> str:
        """The class, as a user would name it."""
        return "NumPy array of something else than numbers" if self.full_name in _ARRAYS else self.full_name


_NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace")
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
# NumPy 2 has moved its functions.
_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_NAMES = (
    *_NAMESPACES,
    # Python 3.13 has moved the classes.
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *_ARRAYS,
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.ndarray"),
)


def _empty_bytes() -> bytes:
    """Only empty bytes are written as a call; others are text that is encoded."""
    return b""


def stand_in(full_name: str) -> type[StandIn]:
    """A class that keeps what was stored under a name in a pickle."""
    return type(full_name.rpartition(".")[2], (StandIn,), {"full_name": full_name})


STAND_INS: dict[str, Any] = {
    **{name: stand_in(name) for name in _NAMES},
    "builtins.bytes": _empty_bytes,
}
_PLAIN = (str, bytes, bytearray, bool, int, float, complex, type(None), torch.dtype, torch.device, torch.layout)


def is_plain(value: object) -> bool:
    """Whether something is numbers, text and the like, with no tensors in it."""
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, set | frozenset | torch.Size):
        return all(map(is_plain, value))
    if isinstance(value, StandIn) and value.full_name not in (*_NAMESPACES, *_ARRAYS):
        return all(is_plain(each) or _is_plain_tuple(each) for each in (*value.arguments, value.state))
    return False


def _is_plain_tuple(value: object) -> bool:
    return isinstance(value, tuple) and all(map(is_plain, value))


def attributes(value: StandIn) -> dict[Any, Any] | None:
    """The attributes of a namespace of arguments; None if it is none, or not of the usual form."""
    # One that is empty is given no state.
    state = {} if value.state is None else value.state
    return state if value.full_name in _NAMESPACES and not value.arguments and isinstance(state, dict) else None


def array(value: StandIn) -> Tensor | None:
    """A NumPy array of numbers as a tensor of the same bits; None if it is none."""
    try:
        _, shape, dtype, is_fortran, content = value.state
        written = f"{dtype.state[1]}{dtype.arguments[0]}"
        is_plain_array = value.full_name in _ARRAYS and isinstance(content, bytes)
        if not is_plain_array or not re.fullmatch(r"[<>|=][biufc]\d+", written):
            return None
        flat = np.frombuffer(content, np.dtype(written))
        shaped = flat.reshape(shape, order="F" if is_fortran else "C")
        return torch.from_numpy(shaped.astype(shaped.dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError, LookupError, AttributeError):
        return None
