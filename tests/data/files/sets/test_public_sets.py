"""What holds for every public data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_trees import put
from pydantic import ValidationError

from data_settings import SETTINGS
from mtl.data import DataError
from mtl.data.files.fileset import FileSet
from mtl.data.files.sets import NAMES, public_set
from mtl.data.files.sets.base import NO_CLASS, Numbers


def test_every_set_has_a_class_and_a_model_of_its_keys() -> None:
    assert set(NAMES) <= set(SETTINGS)
    for name in NAMES:
        assert issubclass(public_set(name), FileSet)
        assert SETTINGS[name].model_validate({"name": name, "root": "x"}).name == name
        assert {*public_set(name).splits} <= {"train", "val", "test"}


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_a_set_has_not_are_refused(name: str) -> None:
    for wrong in ({"name": name}, {"name": name, "root": ""}, {"name": "other", "root": "x"}):
        with pytest.raises(ValidationError):
            SETTINGS[name].model_validate(wrong)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        SETTINGS[name].model_validate({"name": name, "root": "x", "download": True})


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_is_not_there_is_refused_with_the_layout(name: str, tmp_path: Path) -> None:
    kind = public_set(name)
    config = SETTINGS[name].model_validate({"name": name, "root": str(tmp_path / "nowhere")})
    kinds = {label: allowed[0] for label, allowed in kind.label_kinds.items()}
    for split in kind.splits:
        with pytest.raises(DataError) as error:
            kind(config, split, kinds)
        assert str(error.value) == f"{tmp_path}/nowhere: no such folder; expected layout: {kind.layout}"


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_is_refused(name: str, tmp_path: Path) -> None:
    kind = public_set(name)
    config = SETTINGS[name].model_validate({"name": name, "root": str(tmp_path)})
    for kinds in ({}, {label: allowed[0] for label, allowed in kind.label_kinds.items()}):
        with pytest.raises(DataError, match=r"no such (folder|list|file)"):
            kind(config, "train", kinds)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pascal_mt"])
def test_nothing_has_to_be_prepared(name: str) -> None:
    messages: list[str] = []
    public_set(name).prepare(SETTINGS[name].model_validate({"name": name, "root": "x"}), messages.append)
    assert messages == [f"{name}: nothing to prepare"]


def test_class_names_are_those_of_labels() -> None:
    for name in NAMES:
        kind = public_set(name)
        assert set(kind.classes) <= set(kind.label_kinds)
        for names in kind.classes.values():
            assert len(names) == len(set(names)) >= 2


@settings(max_examples=25, deadline=None)
@given(
    class_of=st.dictionaries(st.integers(0, 255), st.integers(0, 254), min_size=1),
    none=st.sets(st.integers(0, 255)),
    places=st.lists(st.integers(0, 10**6), min_size=1, max_size=30),
)
def test_numbers_of_a_mask_are_looked_up_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, class_of: dict[int, int], none: set[int], places: list[int]
) -> None:
    expected = {number: NO_CLASS if number in none else each for number, each in class_of.items()}
    expected |= dict.fromkeys(none, NO_CLASS)
    held = sorted(expected)
    stored = [held[place % len(held)] for place in places]
    file = tmp_path_factory.mktemp("mask") / "a.npy"
    for kind in (np.uint8, np.uint16, np.int64, np.float32):
        put(file, np.array([stored], dtype=kind))
        assert Numbers(class_of, none).read(file).tolist() == [[expected[number] for number in stored]]
    if missing := sorted(set(range(256)) - set(held)):
        put(file, np.array([[*stored, missing[0]]], dtype=np.uint8))
        with pytest.raises(DataError, match=rf"a\.npy: expected the numbers .*, got {missing[0]}$"):
            Numbers(class_of, none).read(file)


@pytest.mark.parametrize("number", [-1, 256, 70000])
def test_a_number_of_more_than_8_bits_is_never_taken_for_a_smaller_one(tmp_path: Path, number: int) -> None:
    put(tmp_path / "a.npy", np.array([[0, number]], dtype=np.int32))
    with pytest.raises(DataError, match=f"expected the numbers 0, 255, got {number}"):
        Numbers({0: 0}, none=[255]).read(tmp_path / "a.npy")
