"""Reads columns of a Parquet file as the text that a CSV would hold; needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from mtl.data.files.extras import from_extra
from mtl.data.files.mistakes import Mistakes
from mtl.data.files.table.values import cell_of


def is_parquet(file: Path) -> bool:
    return file.suffix.lower() in (".parquet", ".pq")


def parquet_columns(file: Path, mistakes: Mistakes) -> tuple[str, ...]:
    """The names of its columns; none if it cannot be read.

    Raises:
        SettingError: pyarrow is not installed.
    """
    with _errors_as_mistakes(file, mistakes):
        return tuple(_pyarrow().parquet.read_schema(file).names)
    return ()


def read_parquet(file: Path, wanted: Sequence[str], mistakes: Mistakes) -> dict[str, list[str]]:
    """Some of its columns as text; none if it cannot be read.

    A list is written with `;` between its entries, a missing value as nothing, true and false as 1 and 0.

    Raises:
        SettingError: pyarrow is not installed.
    """
    cells: dict[str, list[str]] = {}
    with _errors_as_mistakes(file, mistakes):
        table = _pyarrow().parquet.read_table(file, columns=list(wanted))
        for name in wanted:
            try:
                cells[name] = [cell_of(value) for value in table.column(name).to_pylist()]
            except TypeError as error:
                mistakes.add(f"{file}: column {name!r}: expected text, numbers or lists of them, got {error}")
    return cells


def _pyarrow() -> ModuleType:
    with from_extra("parquet", "Parquet needs pyarrow", "data.train"):
        import pyarrow.parquet
    module: ModuleType = pyarrow
    return module


@contextmanager
def _errors_as_mistakes(file: Path, mistakes: Mistakes) -> Iterator[None]:
    """Adds an error of the file to the mistakes."""
    arrow = _pyarrow()
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        mistakes.add(f"{file}: {why}")
