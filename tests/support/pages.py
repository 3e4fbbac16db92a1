"""The code and the commands in the pages of the documentation, which tests run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
# What a line of a page begins with if it is to be typed.
PROGRAMS = ("mtl", "bash", "python", ".venv/bin/python", ".venv/bin/mtl", "pip", "pre-commit", "git", "source")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, and the line of the page on which the text begins."""

    page: str
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """All fenced blocks of a page, which is named from the root of the project."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(page, each[1], each[2], text[: each.start(2)].count("\n") + 1) for each in fences]


def code_blocks(page: str, language: str) -> list[str]:
    """The blocks of a language in a page."""
    return [block.text for block in blocks_of(page) if block.language == language]


def code_block(page: str, language: str) -> str:
    """The only such block."""
    (found,) = code_blocks(page, language)
    return found


def commands_of(page: str) -> list[str]:
    """The commands of a page: indented lines that begin with a program, without what is said of them."""
    programs = "|".join(map(re.escape, PROGRAMS))
    lines = re.findall(rf"^    ((?:{programs}) .*)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.split(r"\s+#\s", line)[0].rstrip() for line in lines]
