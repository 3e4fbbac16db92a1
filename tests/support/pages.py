"""The code in the pages of the documentation, which tests run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def code_blocks(page: str, language: str) -> list[str]:
    """The blocks of a language in a page, which is named from the root of the project."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def code_block(page: str, language: str) -> str:
    """The only such block."""
    (found,) = code_blocks(page, language)
    return found
