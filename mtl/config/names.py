"""Field types of text that names a device, a directory or a phase."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

# File systems take 255 bytes, and other file names are built from this one.
_MOST_BYTES = 200


def _check_device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        nearest = "cuda" if re.search(r"gpu|nvidia|cuda", text.lower()) else "auto"
        raise PydanticCustomError("device", "Input should be auto, cpu, cuda or cuda:N", {"nearest": nearest})
    return text


def _check_length(text: str) -> str:
    if (size := len(text.encode(errors="replace"))) > _MOST_BYTES:
        raise PydanticCustomError("name", f"Input should be a name of at most {_MOST_BYTES} bytes, not {size}")
    return text


Device = Annotated[str, AfterValidator(_check_device)]
# The name that gives every run one of its own.
AUTO = "auto"
# Names a directory.
RunName = Annotated[str, Field(pattern=r"^[\w\-][\w.\-]*$"), AfterValidator(_check_length)]
# Stands in lines of logs and tables.
PhaseName = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]*$"), AfterValidator(_check_length)]
