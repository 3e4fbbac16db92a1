"""What holds for every public data set."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from mtl.config.public_data import PUBLIC_DATA
from mtl.data import DataError
from mtl.data.fileset import FileSet
from mtl.data.sets import NAMES, public_set


def test_every_set_has_a_class_and_a_model_of_its_keys() -> None:
    assert tuple(PUBLIC_DATA) == NAMES
    for name in NAMES:
        assert issubclass(public_set(name), FileSet)
        assert PUBLIC_DATA[name].model_validate({"name": name, "root": "x"}).name == name
        assert {*public_set(name).splits} <= {"train", "val", "test"}


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_a_set_has_not_are_refused(name: str) -> None:
    for wrong in ({"name": name}, {"name": name, "root": ""}, {"name": "other", "root": "x"}):
        with pytest.raises(ValidationError):
            PUBLIC_DATA[name].model_validate(wrong)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        PUBLIC_DATA[name].model_validate({"name": name, "root": "x", "download": True})


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_is_not_there_is_refused_with_the_layout(name: str, tmp_path: Path) -> None:
    kind = public_set(name)
    settings = PUBLIC_DATA[name].model_validate({"name": name, "root": str(tmp_path / "nowhere")})
    kinds = {label: allowed[0] for label, allowed in kind.label_kinds.items()}
    for split in kind.splits:
        with pytest.raises(DataError) as error:
            kind(settings, split, kinds)
        assert str(error.value) == f"{tmp_path}/nowhere: no such folder; expected layout: {kind.layout}"


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_is_refused(name: str, tmp_path: Path) -> None:
    kind = public_set(name)
    settings = PUBLIC_DATA[name].model_validate({"name": name, "root": str(tmp_path)})
    for kinds in ({}, {label: allowed[0] for label, allowed in kind.label_kinds.items()}):
        with pytest.raises(DataError, match=r"no such (folder|list|file)"):
            kind(settings, "train", kinds)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pascal_mt"])
def test_nothing_has_to_be_prepared(name: str) -> None:
    messages: list[str] = []
    public_set(name).prepare(PUBLIC_DATA[name].model_validate({"name": name, "root": "x"}), messages.append)
    assert messages == [f"{name}: nothing to prepare"]


def test_class_names_are_those_of_labels() -> None:
    for name in NAMES:
        kind = public_set(name)
        assert set(kind.classes) <= set(kind.label_kinds)
        for names in kind.classes.values():
            assert len(names) == len(set(names)) >= 2
