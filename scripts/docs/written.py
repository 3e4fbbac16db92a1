"""The command line of a script that makes a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def write_page(page: Callable[[], str], description: str | None, arguments: Sequence[str] | None) -> None:
    """Writes a page into the file that `--write` names, or prints it.

    Args:
        page: Makes it.
        description: The script's docstring.
        arguments: Those of the command line if not given.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="the file to write; without it, the page is printed")
    file: Path | None = parser.parse_args(arguments).write
    if file is None:
        sys.stdout.write(page())
    else:
        file.write_text(page(), encoding="utf-8")
