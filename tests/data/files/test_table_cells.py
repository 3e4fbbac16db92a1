"""The language of a table's cells: what is written is what is read, and nothing else gets through."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtl.data.cache import DataError
from mtl.data.files.table.cells import CellError, NumberList, language_of
from mtl.tasks.base import LabelKind
from tables import table

BY_TMP_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
# Text without spaces around it, as it stands in a cell.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool)
TAGS = NAMES.filter(lambda name: ";" not in name and name not in ("?", "0", "1"))
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
MAYBE = st.none() | NUMBERS


def written(numbers: list[float | None], missing: str = "") -> str:
    return ";".join(missing if number is None else repr(number) for number in numbers)


@given(st.sets(NAMES.filter(lambda name: not name.lstrip("-").replace(".", "").isdigit()), min_size=1))
def test_class_names_are_their_places_in_the_alphabet(names: set[str]) -> None:
    language = language_of("class", list(names))
    assert language.classes == tuple(sorted(names))
    assert [language.parse(name) for name in sorted(names)] == list(range(len(names)))


@given(st.sets(st.integers(0, 2000), min_size=1, max_size=9))
def test_class_numbers_are_read_as_they_are_written(numbers: set[int]) -> None:
    language = language_of("class", [str(number) for number in numbers])
    assert [language.parse(str(number)) for number in numbers] == list(numbers)
    assert [language.parse(f"{number}.0") for number in numbers] == list(numbers)
    assert len(language.classes) == max(numbers) + 1
    assert math.isnan(language.parse("-1"))  # type: ignore[arg-type]


@given(st.lists(st.sets(TAGS), min_size=1).filter(any))
def test_tags_are_read_as_they_are_written(rows: list[set[str]]) -> None:
    cells = [";".join(sorted(row)) or ";" for row in rows]
    language = language_of("tags", cells)
    assert language.classes == tuple(sorted(set().union(*rows)))
    assert [language.parse(cell) for cell in cells] == [[float(tag in row) for tag in language.classes] for row in rows]


@given(st.integers(1, 9), st.data())
def test_lists_of_0_and_1_are_read_as_they_are_written(num: int, data: st.DataObject) -> None:
    row = data.draw(st.lists(st.sampled_from(["0", "1", "?"]), min_size=num, max_size=num))
    language = language_of("tags", [";".join(row)])
    expected = [math.nan if entry == "?" else float(entry) for entry in row]
    np.testing.assert_array_equal(language.parse(";".join(row)), expected)
    assert language.classes == tuple(map(str, range(num)))


@given(st.lists(MAYBE, min_size=1), st.sampled_from(["", "?", "nan"]))
def test_numbers_are_read_as_they_are_written(numbers: list[float | None], missing: str) -> None:
    cell = written(numbers, missing)
    language = language_of("numbers", [cell or "?"])
    expected = [math.nan if number is None else number for number in numbers]
    np.testing.assert_array_equal(language.parse(cell or "?"), expected[0] if len(expected) == 1 else expected)


@given(st.lists(st.none() | st.tuples(NUMBERS, NUMBERS, st.integers(0, 2)), min_size=1))
def test_points_are_read_as_they_are_written(points: list[tuple[float, float, int] | None]) -> None:
    cell = ";".join("?" if point is None else ",".join(map(repr, point)) for point in points)
    assert language_of("points", [cell]).parse(cell) == [[0.0, 0.0, 0.0] if p is None else list(p) for p in points]


@given(st.lists(st.text("0123456789.+-eE_nainf x", max_size=6) | NUMBERS.map(repr)))
def test_a_column_that_is_read_the_fast_way_has_no_wrong_cell(cells: list[str]) -> None:
    language = NumberList(1)
    if (numbers := language.parse_all(cells)) is not None:
        np.testing.assert_array_equal(numbers, [language.parse(cell) if cell else math.nan for cell in cells])
    elif all(cells):
        assert not cells or any(_is_unusual(cell) for cell in cells)


def _is_unusual(cell: str) -> bool:
    """Whether a cell is no plain number."""
    try:
        return math.isnan(NumberList(1).parse(cell))  # type: ignore[arg-type]
    except CellError:
        return True


@BY_TMP_PATH
@given(st.lists(st.tuples(NAMES, NAMES), min_size=1, max_size=20), st.sampled_from(["\n", "\r\n"]))
def test_what_csv_writes_is_read(tmp_path: Path, rows: list[tuple[str, str]], ending: str) -> None:
    rows = [(f"i{image.replace(chr(0), '').replace('..', '')}", f"c{name}") for image, name in rows]
    stream = io.StringIO()
    csv.writer(stream, lineterminator=ending, quoting=csv.QUOTE_ALL).writerows([("image", "label"), *rows])
    data = table(tmp_path, stream.getvalue())
    names = sorted({name for _, name in rows})
    assert data.classes == {"label": tuple(names)}
    assert [int(data.read(index, ["label"])["label"]) for index in range(len(rows))] == [
        names.index(n) for _, n in rows
    ]


@BY_TMP_PATH
@given(
    st.binary(max_size=200) | st.text('",;\n\r \t01a?.-\0', max_size=60).map(str.encode),
    st.sampled_from(["class", "tags", "numbers", "mask", "points"]),
    st.sampled_from([{}, {"split": {"by": "column", "column": "a"}}, {"split": {"by": "hash", "val": 0.5}}]),
    st.sampled_from([b"", b"image,label,a\n", b"image,label,a\n1,1,train\n2,1,val\n"]),
)
def test_any_bytes_are_a_table_or_a_mistake(
    tmp_path: Path, content: bytes, kind: LabelKind, split: dict[str, object], header: bytes
) -> None:
    try:
        data = table(tmp_path, header + content, {"label": kind}, **split)
    except DataError:
        return
    for index in range(len(data)):
        data.where(index)
        if kind != "mask":
            data.read(index, ["label"])
        with pytest.raises(DataError, match=r"a\.csv, line"):
            data.read(index, ["image"])
    data.column("label")
