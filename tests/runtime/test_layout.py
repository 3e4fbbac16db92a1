"""Lines and tables that fit a width: nothing is cut, and nothing is wrapped that need not be."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl.runtime.layout import columns_of, fit_fields, table, wrap_lines, wrap_text

EPOCH = "warm  epoch 1  step 5  loss 2.903  segmentation miou 0.034"


def test_a_line_of_fields_is_wrapped_between_fields_with_an_indent() -> None:
    assert wrap_lines(EPOCH, 34) == "warm  epoch 1  step 5  loss 2.903\n    segmentation miou 0.034"
    assert wrap_lines(EPOCH, 32) == "warm  epoch 1  step 5\n    loss 2.903\n    segmentation miou 0.034"


def test_a_field_that_is_longer_than_a_line_is_wrapped_between_its_words() -> None:
    line = "warm  surface_normals_of_the_rooms abs_rel 0.525  9 img/s"
    assert wrap_lines(line, 40) == "warm  surface_normals_of_the_rooms\n    abs_rel 0.525  9 img/s"


def test_every_line_of_a_text_keeps_its_indent_and_no_word_is_broken() -> None:
    path = f"/{'a' * 40}/b"
    text = f"audit: 2 violations\n  warm, step 3: changed: trunk.conv1.weight; see {path}"
    assert wrap_lines(text, 30).split("\n") == [
        "audit: 2 violations",
        "  warm, step 3: changed:",
        "      trunk.conv1.weight; see",
        f"      {path}",
    ]
    assert wrap_lines(text, None) == wrap_lines(text, 200) == text


@pytest.mark.parametrize("width", [None, len(EPOCH), 200])
def test_a_line_that_fits_or_has_any_width_stays_whole(width: int | None) -> None:
    assert wrap_lines(EPOCH, width) == EPOCH
    assert wrap_text(EPOCH, width, indent=0) == EPOCH


def test_fields_that_do_not_fit_are_left_out_whole() -> None:
    line = "loss 2.903  depth 0.525  normals 0.220"
    assert fit_fields(line, 38) == line
    assert fit_fields(line, 37) == "loss 2.903  depth 0.525  ..."
    assert fit_fields(line, 27) == "loss 2.903  ..."
    assert fit_fields(line, 9) == "..."


def test_prose_is_wrapped_after_punctuation_and_else_between_words() -> None:
    text = "2 tensors, 3,000 parameters: trunk.conv1, trunk.bn1"
    assert wrap_text(text, 34, indent=4) == "2 tensors, 3,000 parameters:\n    trunk.conv1, trunk.bn1"
    assert wrap_text("one long part without any mark, two", 24, indent=4) == (
        "one long part\n    without any mark,\n    two"
    )


WORDS = st.text("abc.1", min_size=1, max_size=12)


@given(st.lists(st.lists(WORDS, min_size=1, max_size=3).map(" ".join), min_size=1, max_size=9), st.integers(44, 90))
def test_no_field_that_fits_a_line_is_broken_or_lost(fields: list[str], width: int) -> None:
    wrapped = wrap_lines("  ".join(fields), width).splitlines()
    assert [field for line in wrapped for field in re.split(" {2,}", line.strip())] == fields
    assert all(len(line) <= width for line in wrapped)


@given(st.lists(WORDS, min_size=1, max_size=30), st.integers(20, 60))
def test_no_word_of_prose_is_broken_or_lost(words: list[str], width: int) -> None:
    wrapped = wrap_text(", ".join(words), width, indent=4)
    assert " ".join(wrapped.split()) == ", ".join(words)
    first, *later = wrapped.splitlines()
    assert all(len(line) <= width for line in (f"    {first}", *later))


HEADER = ["phase", "freeze", "frozen parameters", "length"]
ROWS = [["warm", "trunk", "372,688", "1 epoch"], ["fine", "trunk.conv1, trunk.bn1", "8,442", "7 steps"]]


def test_a_table_that_fits_has_one_line_a_row() -> None:
    whole = [
        "phase  freeze                  frozen parameters  length",
        "-----  ----------------------  -----------------  -------",
        "warm   trunk                             372,688  1 epoch",
        "fine   trunk.conv1, trunk.bn1              8,442  7 steps",
    ]
    assert table(HEADER, ROWS, numbers=[2]).splitlines() == whole
    assert table(HEADER, ROWS, numbers=[2], width=57).splitlines() == whole


def test_a_table_that_is_too_wide_wraps_titles_first_and_then_text() -> None:
    assert table(HEADER, ROWS, numbers=[2], width=50).splitlines() == [
        "phase  freeze                      frozen  length",
        "                               parameters",
        "-----  ----------------------  ----------  -------",
        "warm   trunk                      372,688  1 epoch",
        "fine   trunk.conv1, trunk.bn1       8,442  7 steps",
    ]
    assert table(HEADER, ROWS, numbers=[2], width=40).splitlines() == [
        "phase  freeze            frozen  length",
        "                     parameters",
        "-----  ------------  ----------  -------",
        "warm   trunk            372,688  1 epoch",
        "fine   trunk.conv1,       8,442  7 steps",
        "       trunk.bn1",
    ]


def test_a_table_that_is_wider_still_is_split_into_blocks_with_the_keys() -> None:
    header = ["task", "metric", "first", "second", "third"]
    rows = [["depth", "rmse", "1.5", "1.25", "1.125"]]
    assert table(header, rows, numbers=[2, 3, 4], width=29, keys=2) == (
        "task   metric  first  second\n"
        "-----  ------  -----  ------\n"
        "depth  rmse      1.5    1.25\n"
        "\n"
        "task   metric  third\n"
        "-----  ------  -----\n"
        "depth  rmse    1.125"
    )


def test_words_of_a_table_are_broken_where_nothing_else_helps_and_numbers_never() -> None:
    header = ["task", "trivial", "heads_on_a_frozen_trunk"]
    rows = [["surface-normals_of.rooms", "1.234567", "-1.5e-05"], ["v1.5_2.0", "1", "2"]]
    assert table(header, rows, numbers=[1, 2], width=29) == (
        "task                  trivial\n"
        "-------------------  --------\n"
        "surface-normals_of.  1.234567\n"
        "rooms\n"
        "v1.5_2.0                    1\n"
        "\n"
        "task                   heads_\n"
        "                        on_a_\n"
        "                      frozen_\n"
        "                        trunk\n"
        "-------------------  --------\n"
        "surface-normals_of.  -1.5e-05\n"
        "rooms\n"
        "v1.5_2.0                    2"
    )


def test_letters_of_east_asia_are_two_columns_wide_and_combining_marks_none() -> None:
    assert [columns_of(text) for text in ("depth", "\u6df1\u5ea6", "\u30c7", "e\u0301")] == [5, 4, 2, 1]
    shown = table(["task", "rmse"], [["\u6df1\u5ea6", "1.5"], ["normals", "2"]], numbers=[1])
    assert shown.splitlines()[2:] == ["\u6df1\u5ea6      1.5", "normals     2"]
    assert wrap_lines("\u6df1\u5ea6 \u6cd5\u7ebf \u5206\u5272 \u6df1\u5ea6 \u6cd5\u7ebf", 20) == (
        "\u6df1\u5ea6 \u6cd5\u7ebf \u5206\u5272 \u6df1\u5ea6\n    \u6cd5\u7ebf"
    )


@given(
    st.integers(1, 8).flatmap(lambda n: st.lists(st.lists(WORDS, min_size=n, max_size=n), min_size=2, max_size=4)),
    st.integers(30, 80),
)
def test_a_table_of_words_fits_any_width_of_two_words_and_loses_none(cells: list[list[str]], width: int) -> None:
    header, *rows = cells
    text = table(header, rows, numbers=range(1, len(header)), width=width)
    assert all(len(line) <= width for line in text.splitlines())
    shown = text.split()
    assert all(word in shown for row in cells for word in row)
