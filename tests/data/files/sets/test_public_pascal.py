"""`pascal_mt`: what is stored, and what `prepare` derives from MATLAB's files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from public_trees import colours, opened, put
from scipy.io import savemat
from scipy.ndimage import laplace
from skimage.morphology import thin

from data_settings import SETTINGS
from mtl.data import DataError
from mtl.data.files.sets import public_set
from mtl.data.files.sets.pascal_derived import KNOWN_TO_NYU, PART_OF, edges_of, human_parts_of, known_normals
from mtl.data.files.sets.pascal_mt import PARTS

SIZE = (20, 24)
NAMES = {"train": ("2008_000002", "2008_000003"), "val": ("2008_000007",)}


def label_map() -> np.ndarray[Any, Any]:
    numbers = np.full(SIZE, 68, np.uint16)  # ceiling, which NYUv2 knows
    numbers[8:15, 5:20] = 2  # aeroplane, which it does not
    return numbers


def anno(objects: list[tuple[int, dict[str, np.ndarray[Any, Any]]]]) -> dict[str, Any]:
    """PASCAL-Part's structure, as MATLAB writes it."""
    rows = np.zeros((1, len(objects)), dtype=[(key, object) for key in ("class", "class_ind", "mask", "parts")])
    for place, (number, own) in enumerate(objects):
        parts: Any = np.zeros((0, 0))
        if own:
            parts = np.zeros((1, len(own)), dtype=[("part_name", object), ("mask", object)])
            for each, (name, mask) in enumerate(own.items()):
                parts[0, each] = (name, mask.astype(np.uint8))
        rows[0, place] = ("x", number, np.ones(SIZE, np.uint8), parts)
    return {"anno": {"imname": "x", "objects": rows}}


def box(top: int, bottom: int) -> np.ndarray[Any, Any]:
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, 3:9] = True
    return mask


def pascal(root: Path) -> Path:
    for split, names in NAMES.items():
        put(root / f"ImageSets/Context/{split}.txt", "\n".join(names) + "\n")
        for place, name in enumerate(names):
            put(root / f"JPEGImages/{name}.jpg", colours(*SIZE, place))
            mask = np.full(SIZE, 20 if place else 255, np.uint8)
            put(root / f"semseg/{'pascal-context' if place else 'VOC12'}/{name}.png", mask)
            put(root / f"sal_distill/{name}.png", np.arange(SIZE[0] * SIZE[1]).reshape(SIZE).astype(np.uint8))
            put(root / f"normals_distill/{name}.png", np.full((*SIZE, 3), (128, 128, 0), np.uint8))
            person = (15, {"head": box(0, 5), "torso": box(4, 10), "lfoot": box(15, 18)})
            dog = (12, {"head": box(10, 15), "tail": box(11, 12)})
            for folder in ("human_parts", "pascal-context/trainval"):
                (root / folder).mkdir(parents=True, exist_ok=True)
            savemat(root / f"human_parts/{name}.mat", anno([dog] if place else [dog, person, (15, {})]))
            savemat(root / f"pascal-context/trainval/{name}.mat", {"LabelMap": label_map()})
    return root


def prepared(root: Path) -> list[str]:
    messages: list[str] = []
    public_set("pascal_mt").prepare(
        SETTINGS["pascal_mt"].model_validate({"name": "pascal_mt", "root": str(root)}), messages.append
    )
    return messages


def test_an_item_has_what_is_stored_and_what_was_derived(tmp_path: Path) -> None:
    messages = prepared(pascal(tmp_path))
    assert [message.partition(" written")[0] for message in messages] == [
        f"{label}: 3 files" for label in ("human_parts", "normals", "edges")
    ]
    data = opened("pascal_mt", tmp_path, "train")
    assert len(data) == 2
    item = data[0]
    assert item.keys() == {"image", "segmentation", "human_parts", "normals", "saliency", "edges"}
    assert item["image"].shape == (3, *SIZE)
    assert torch.equal(item["segmentation"], torch.full(SIZE, 255, dtype=torch.uint8))
    parts = np.zeros(SIZE, np.uint8)
    parts[box(0, 5)], parts[box(4, 10)], parts[box(15, 18)] = 1, 2, 6
    assert torch.equal(item["human_parts"], torch.from_numpy(parts))
    assert torch.equal(item["saliency"].flatten(), (torch.arange(SIZE[0] * SIZE[1]) % 256 > 127).byte())
    assert torch.equal(item["edges"], torch.from_numpy(edges_of(label_map())).byte())
    known = torch.from_numpy(label_map() == 68)
    assert torch.equal((item["normals"] != 0).any(dim=0), known)
    assert torch.allclose(item["normals"][:, known].T, torch.tensor([0.0, 0.0, -1.0]), atol=0.01)
    # Nobody is in the second image, whose mask is that of PASCAL-Context.
    assert data[1].keys() == item.keys() - {"human_parts"}
    assert torch.equal(data[1]["segmentation"], torch.full(SIZE, 20, dtype=torch.uint8))
    assert data.files(1)["segmentation"].parent.name == "pascal-context"


def test_prepare_resumes_where_it_was_ended(tmp_path: Path) -> None:
    prepared(pascal(tmp_path))
    file = tmp_path / "prepared/edges/2008_000003.png"
    before = file.read_bytes()
    file.unlink()
    (tmp_path / "prepared/edges/.2008_000003.png.part").write_bytes(b"half")
    with pytest.raises(
        DataError, match=r"edges/2008_000003\.png: no such file; expected layout: .*`mtl data prepare` makes"
    ):
        opened("pascal_mt", tmp_path, "train")
    assert [message.rpartition(", ")[2] for message in prepared(tmp_path)] == [f"{n} were there" for n in (3, 3, 2)]
    assert file.read_bytes() == before
    assert not (tmp_path / "prepared/edges/.2008_000003.png.part").exists()


def test_what_is_not_prepared_is_refused_with_the_command(tmp_path: Path) -> None:
    pascal(tmp_path)
    message = "prepared/edges: no such folder; `mtl data prepare` makes it from pascal-context/trainval"
    with pytest.raises(DataError, match=message):
        opened("pascal_mt", tmp_path, "train", {"edges": "mask"})
    assert opened("pascal_mt", tmp_path, "train", {"saliency": "mask"})[0].keys() == {"image", "saliency"}


def test_a_label_without_its_sources_is_skipped_and_logged(tmp_path: Path) -> None:
    (pascal(tmp_path) / "human_parts").rename(tmp_path / "parts")
    messages = prepared(tmp_path)
    assert messages[0] == f"human_parts: skipped, since there is no folder human_parts in {tmp_path}"
    assert len(messages) == 3
    (tmp_path / "pascal-context").rename(tmp_path / "context")
    with pytest.raises(DataError, match="nothing to prepare labels from; expected layout: ImageSets/Context"):
        prepared(tmp_path)


def test_a_file_of_matlab_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    parts = pascal(tmp_path) / "human_parts/2008_000002.mat"
    whole = parts.read_bytes()
    for content in (b"", b"no matlab" * 30, whole[:150], whole[: len(whole) // 2]):
        parts.write_bytes(content)
        with pytest.raises(DataError, match=r"human_parts/2008_000002\.mat: "):
            prepared(tmp_path)
    parts.unlink()
    with pytest.raises(DataError, match=r"human_parts/2008_000002\.mat: No such file or directory"):
        prepared(tmp_path)
    savemat(parts, {"LabelMap": label_map()})
    with pytest.raises(DataError, match=r"2008_000002\.mat: expected PASCAL-Part's `anno`; 'anno'"):
        prepared(tmp_path)
    savemat(parts, anno([(15, {"wing": box(0, 5)})]))
    with pytest.raises(DataError, match=r"expected one of a person's 24 parts, got 'wing'"):
        prepared(tmp_path)
    savemat(parts, anno([(15, {"head": box(0, 5)})]))
    savemat(tmp_path / "pascal-context/trainval/2008_000002.mat", {"other": label_map()})
    with pytest.raises(DataError, match=r"trainval/2008_000002\.mat: expected PASCAL-Context's `LabelMap`, \"h w\""):
        prepared(tmp_path)


def test_the_libraries_that_prepare_needs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match="to prepare pascal_mt, install scipy and scikit-image"):
        prepared(pascal(tmp_path))


@pytest.mark.parametrize("seed", range(5))
def test_edges_are_the_thinned_laplacian(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 460, (4, 5)).astype(np.uint16)
    numbers = blocks.repeat(6, axis=0).repeat(7, axis=1)
    reference = thin(laplace(numbers.astype(np.float64), mode="mirror") != 0)
    assert np.array_equal(edges_of(numbers), reference)
    assert not edges_of(np.full((5, 5), 300, np.uint16)).any()


def test_every_part_of_a_person_has_a_number() -> None:
    assert len(PART_OF) == 24
    assert set(PART_OF.values()) == set(range(1, len(PARTS)))
    parts = human_parts_of([(15, [("rhand", box(0, 4)), ("neck", box(2, 3))]), (12, [("head", box(0, 9))])], SIZE)
    expected = np.zeros(SIZE, np.uint8)
    expected[box(0, 4)], expected[box(2, 3)] = 4, 2
    assert np.array_equal(parts, expected)


def test_normals_are_kept_where_nyu_knows_the_class() -> None:
    assert len(set(KNOWN_TO_NYU)) == 170
    pixels = np.full((1, 3, 3), 200, np.uint8)
    kept = known_normals(pixels, np.array([[68, 2, 427]]))  # ceiling, aeroplane, tvmonitor
    assert kept[0, :, 0].tolist() == [200, 0, 200]
