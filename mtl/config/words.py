"""Words that a configuration takes, checked for what the system makes of them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

# Of 255 bytes that file systems take; names of other files are made of it.
_MOST_BYTES = 200


def _is_a_device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        nearest = "cuda" if re.search(r"gpu|nvidia|cuda", text.lower()) else "auto"
        raise PydanticCustomError("device", "Input should be auto, cpu, cuda or cuda:N", {"nearest": nearest})
    return text


def _is_short(text: str) -> str:
    if (size := len(text.encode(errors="replace"))) > _MOST_BYTES:
        raise PydanticCustomError("name", f"Input should be a name of at most {_MOST_BYTES} bytes, not {size}")
    return text


Device = Annotated[str, AfterValidator(_is_a_device)]
# Names a directory.
RunName = Annotated[str, Field(pattern=r"^[\w\-][\w.\-]*$"), AfterValidator(_is_short)]
# Stands in lines of logs and tables.
PhaseName = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]*$"), AfterValidator(_is_short)]
