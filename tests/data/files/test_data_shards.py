"""Shards of webdataset: what the library writes is read in any order, and mistakes are named with shard and key."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from mtl.config import SettingError
from mtl.config.hub_data import WebDatasetData
from mtl.data.cache import DataError
from mtl.data.files.problems import problems
from mtl.data.files.shards import ShardSet, open_shards
from mtl.data.workers import ahead, read_by_workers
from mtl.tasks.base import LabelKind

KINDS: Mapping[str, LabelKind] = {"cls": "class"}


def png(value: Any = 7, mode: str = "L", size: tuple[int, int] = (4, 3)) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, value).save(stream, "PNG")
    return stream.getvalue()


def shard(file: Path, samples: Sequence[Mapping[str, Any]]) -> Path:
    """Writes a shard; samples without a key are numbered."""
    with webdataset.TarWriter(str(file)) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:04d}", **sample})
    return file


def tar(file: Path, members: Sequence[tuple[str, bytes]], mode: Any = "w") -> Path:
    """Writes a shard member by member, as other programs may."""
    with tarfile.open(file, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def opened(train: Path | str, kinds: Mapping[str, LabelKind] = KINDS, **settings: Any) -> dict[str, ShardSet]:
    data = {"name": "webdataset", "train": str(train), "image": "png"} | settings
    if "val" not in data and "split" not in data:
        data["val"] = str(train)
    return open_shards(WebDatasetData.model_validate(data), kinds, ("train", "val"))


def whats_wrong(train: Path, kinds: Mapping[str, LabelKind] = KINDS, **settings: Any) -> list[str]:
    with pytest.raises(DataError) as error:
        opened(train, kinds, **settings)
    return str(error.value).replace(f"{train.parent}/", "").splitlines()


def column(data: ShardSet, name: str) -> list[Any]:
    found = data.column(name)
    assert found is not None
    return [None if value != value else value for value in found.tolist()]


# What is read


def test_every_kind_of_label_is_read_as_its_task_takes_it(tmp_path: Path) -> None:
    depth, normals = io.BytesIO(), np.tile(np.float32([0, 0, -2]), (3, 4, 1))
    Image.fromarray(np.full((3, 4), 1500, np.uint16)).save(depth, "PNG")
    fields = {"age": 1.5, "size": [1, -20.0], "words": ["b", "a"], "flags": [True, False, None], "name": "x"}
    first = {
        "png": png((1, 2, 3), "RGB"),
        "cls": 1,
        "txt": "lynx\n",
        "json": fields | {"points": [[1, 2, 2], [0.5, 0, 1]]},
        "seg.png": png(5),
        "depth.png": depth.getvalue(),
        "normals.npy": normals,
        "more.cls": "3",
    }
    second = {
        "png": png(),
        "cls": 0,
        "txt": "cat",
        "json": {"words": [], "flags": None, "points": None, "size": [1, 2]},
    }
    kinds: dict[str, LabelKind] = {
        "cls": "class",
        "species": "class",
        "age": "numbers",
        "size": "numbers",
        "words": "tags",
        "flags": "tags",
        "points": "points",
        "seg.png": "mask",
        "depth": "depth",
        "up": "normals",
        "more.cls": "class",
    }
    labels = {"species": "txt", "depth": "depth.png", "up": "normals.npy;normals.png"}
    file = shard(tmp_path / "a.tar", [first, second])
    data = opened(file, kinds, labels=labels, scale={"depth": 0.001})["train"]
    item = data[0]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in item.items()} == {
        "image": (torch.uint8, (3, 3, 4)),
        "cls": (torch.int64, ()),
        "species": (torch.int64, ()),
        "age": (torch.float32, ()),
        "size": (torch.float32, (2,)),
        "words": (torch.float32, (2,)),
        "flags": (torch.float32, (3,)),
        "points": (torch.float32, (2, 3)),
        "seg.png": (torch.uint8, (3, 4)),
        "depth": (torch.float32, (1, 3, 4)),
        "up": (torch.float32, (3, 3, 4)),
        "more.cls": (torch.int64, ()),
    }
    assert item["image"][:, 0, 0].tolist() == [1, 2, 3] and item["species"] == 1 and item["more.cls"] == 3
    assert item["size"].tolist() == [1, -20] and item["points"].tolist() == [[1, 2, 2], [0.5, 0, 1]]
    assert (item["seg.png"] == 5).all() and torch.allclose(item["depth"], torch.tensor(1.5))
    assert item["up"][:, 0, 0].tolist() == [0, 0, -1]
    other = data[1]
    assert set(other) == {"image", "cls", "species", "size", "words"} and other["words"].tolist() == [0, 0]
    assert data.classes == {
        "cls": ("0", "1"),
        "species": ("cat", "lynx"),
        "words": ("a", "b"),
        "flags": ("0", "1", "2"),
        "more.cls": ("0", "1", "2", "3"),
    }
    assert list(problems(data, kinds)) == []


def test_shards_are_joined_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"a-{number:03d}.tar", [{"png": png(10 * number + n), "cls": n} for n in range(number + 1)])
    data = opened(f"{tmp_path}/a-{{001..002}}.tar::{tmp_path}/a-000.tar")["train"]
    assert [int(data[n]["image"][0, 0, 0]) for n in range(6)] == [10, 11, 20, 21, 22, 0]
    assert [data.where(n).removeprefix(f"{tmp_path}/") for n in (1, 2, 5)] == [
        "a-001.tar, 0001",
        "a-002.tar, 0000",
        "a-000.tar, 0000",
    ]
    assert column(data, "cls") == [0, 1, 0, 1, 2, 0]


def test_what_is_read_is_what_the_library_itself_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = [
        {
            "__key__": f"d.{n // 4}/x{n}",
            "png": rng.integers(0, 256, (5, 6, 3), np.uint8),
            "cls": n % 3,
            "b.c.TXT": str(n),
        }
        for n in range(12)
    ]
    file = shard(tmp_path / "a.tar", samples)
    data = opened(file, {"cls": "class", "b.c.txt": "numbers"})["train"]
    with file.open("rb") as stream:
        members = tar_file_expander([{"url": str(file), "stream": stream}])
        expected = list(webdataset.decode("rgb8")(group_by_keys(members)))
    assert len(data) == len(expected) == 12
    for number in (7, 0, 11, 3):
        item, other = data[number], expected[number]
        assert data.where(number) == f"{file}, {other['__key__']}"
        assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), other["png"])
        assert (item["cls"], item["b.c.txt"]) == (other["cls"], float(other["b.c.txt"]))


def test_members_of_any_way_to_write_a_tar_are_found(tmp_path: Path) -> None:
    long = "x" * 150
    members = [("./d/1.png", png(1)), ("./d/1.CLS", b" 1\n"), (f"{long}/2.png", png(2)), (f"{long}/2.cls", b"0")]
    others = [("README", b"no"), (".hidden", b"no"), ("__meta__/x.cls", b"no"), ("__index__", b"no")]
    for number, format_ in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        file = tmp_path / f"{number}.tar"
        with tarfile.open(file, "w", format=format_) as archive:
            folder = tarfile.TarInfo("d")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for name, content in others + (members if number else members[:2]):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(content), 1.5
                archive.addfile(info, io.BytesIO(content))
        data = opened(file)["train"]
        assert [int(data[n]["image"][0, 0, 0]) for n in range(len(data))] == ([1, 2] if number else [1])


def test_the_first_extension_that_a_sample_has_is_its_image(tmp_path: Path) -> None:
    file = shard(tmp_path / "a.tar", [{"png": png(1), "cls": 0}, {"jpeg": png(2), "png": png(3), "cls": 1}])
    data = opened(file, image="jpeg;png")["train"]
    assert [int(data[n]["image"][0, 0, 0]) for n in range(2)] == [1, 2]


def test_a_missing_member_is_no_label(tmp_path: Path) -> None:
    file = shard(tmp_path / "a.tar", [{"png": png(), "cls": 1}, {"png": png()}, {"png": png(), "cls": -1}])
    data = opened(file)["train"]
    assert column(data, "cls") == [1, None, None] and "cls" not in data[1]


def test_keys_divide_shards_whatever_shard_they_are_in(tmp_path: Path) -> None:
    def division(shards: Sequence[Sequence[int]]) -> dict[str, set[str]]:
        for number, keys in enumerate(shards):
            samples = [{"__key__": f"k{key}", "png": png(), "cls": 0} for key in keys]
            shard(tmp_path / f"{number}.tar", samples)
        names = "::".join(str(tmp_path / f"{number}.tar") for number in range(len(shards)))
        data = opened(names, split={"by": "hash", "val": 0.25})
        return {split: {own.where(n).rpartition(", ")[2] for n in range(len(own))} for split, own in data.items()}

    one = division([range(200)])
    assert one == division([range(100, 200), range(100)])
    assert len(one["val"]) == pytest.approx(50, abs=15) and len(one["train"] | one["val"]) == 200


class _Items(torch.utils.data.Dataset[Any]):
    def __init__(self, data: ShardSet) -> None:
        self._data = data

    def __getitems__(self, indices: list[int]) -> list[int]:
        return [int(self._data[index]["image"][0, 0, 0]) for index in indices]


def test_worker_processes_read_the_same(tmp_path: Path) -> None:
    for number in range(2):
        samples = [{"png": png(20 * number + n), "cls": 0} for n in range(20)]
        shard(tmp_path / f"{number}.tar", samples)
    data = opened(f"{tmp_path}/{{0..1}}.tar")["train"]
    order = torch.randperm(40).view(10, 4).tolist()
    # In a thread, as everywhere: torch leaves a handler of SIGCHLD in the main thread of whoever reads there.
    assert list(ahead(read_by_workers(_Items(data), order, 2))) == order


# Whether it is the same


def test_edited_shards_are_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"

    def digests() -> list[str | None]:
        data = opened(file, {"cls": "class", "seg.png": "mask"})["train"]
        return [data.identity(range(len(data)), name) for name in ("image", "cls", "seg.png")]

    shard(file, [{"png": png(n), "cls": n, "seg.png": png()} for n in range(2)])
    before = digests()
    assert before == digests() and None not in before and len(set(before)) == 3
    shard(file, [{"png": png(n + 1), "cls": n, "seg.png": png()} for n in range(2)])
    after = digests()
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, False]
    data = opened(file)["train"]
    assert data.identity([0]) != data.identity([1])


def test_headers_are_read_once_for_as_long_as_a_shard_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [shard(tmp_path / f"{n}.tar", [{"png": png(10 * n + m), "cls": m} for m in range(3)]) for n in range(2)]
    names = f"{tmp_path}/{{0..1}}.tar"
    first = opened(names)["train"]
    ends: list[str] = []

    class Recording(tarfile.TarFile):
        def next(self) -> tarfile.TarInfo | None:
            if (found := super().next()) is None:
                ends.append(Path(str(self.name)).name)
            return found

    monkeypatch.setattr(tarfile, "open", Recording.open)
    again = opened(names)["train"]
    assert ends == []
    for number in range(6):
        assert again.where(number) == first.where(number) and torch.equal(
            again[number]["image"], first[number]["image"]
        )
    assert again.identity(range(6)) == first.identity(range(6))
    shard(files[1], [{"png": png(1), "cls": 0}])
    assert len(opened(names)["train"]) == 4 and ends == ["1.tar"]


def test_a_kept_index_that_was_cut_is_a_warning_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, cache = shard(tmp_path / "a.tar", [{"png": png(), "cls": 0}]), str(tmp_path / "cache")
    first = opened(file, cache_dir=cache)["train"].identity([0])
    (kept,) = (tmp_path / "cache" / "shards").iterdir()
    for text in (kept.read_text()[:-3], ""):
        kept.write_text(text)
        assert opened(file, cache_dir=cache)["train"].identity([0]) == first
        assert caplog.messages == [f"{kept} is damaged: the index of {file} is made again"]
        caplog.clear()
    opened(file, cache_dir=cache)
    assert caplog.messages == []


def test_shards_that_are_wrong_are_reported_again(tmp_path: Path) -> None:
    file = tar(tmp_path / "a.tar", [("1.png", png()), ("1.PNG", png()), ("1.cls", b"0")])
    assert whats_wrong(file) == whats_wrong(file) == ["a.tar, 1: has two members png"]


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2):
        shard(tmp_path / f"{number}.tar", [{"png": png(), "cls": 0}])
    (tmp_path / "file").write_text("")
    assert len(opened(f"{tmp_path}/{{0..1}}.tar", cache_dir=str(tmp_path / "file"))["train"]) == 2
    (message,) = caplog.messages
    assert message.startswith(
        f"the index of {tmp_path}/0.tar cannot be kept in {tmp_path}/file/shards: Not a directory"
    )


# Mistakes


def test_all_shards_that_are_missing_or_damaged_are_reported_at_once(tmp_path: Path) -> None:
    members = [(f"{n}.{name}", content) for n in range(3) for name, content in (("png", png(n)), ("cls", b"%d" % n))]
    whole = tar(tmp_path / "0.tar", members).read_bytes()
    size = 512 * 2 * 3 * 2  # a header and a block for each member
    (tmp_path / "1.tar").write_bytes(whole[: size - 100])
    (tmp_path / "2.tar").write_bytes(whole[:size])
    (tmp_path / "3.tar").write_bytes(whole[:1024] + b"?" * 512 + whole[1536:])
    (tmp_path / "5.tar").write_bytes(b"no tar" * 200)
    tar(tmp_path / "6.tar", [("1.png", png()), ("1.cls", b"0")], "w:gz")
    tar(tmp_path / "7.tar", [("README", b"")])
    (tmp_path / "8.tar").write_bytes(b"")
    (tmp_path / "9.tar").mkdir()
    lines = whats_wrong(tmp_path / "{0..9}.tar")
    start = "expected a whole tar file, not compressed; "
    for line, (number, what) in zip(
        lines,
        [
            (1, f"{start}unexpected end of data"),
            (2, f"{start}it has been cut off: there is no mark of its end"),
            (3, f"{start}the header at byte 1024 is damaged"),
            (4, "No such file or directory"),
            (5, start),
            (6, start),
            (7, "expected samples, got no member with a key and an extension"),
            (8, f"{start}empty file"),
            (9, "Is a directory"),
        ],
        strict=True,
    ):
        assert line.startswith(f"{number}.tar: {what}")


def test_members_that_are_no_files_of_the_shard_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as archive:
        for name in ("../1.png", "/etc/2.png", "a/../../3.png"):
            archive.addfile(tarfile.TarInfo(name))
        for name, kind in (("4.png", tarfile.SYMTYPE), ("5.png", tarfile.LNKTYPE), ("6.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("7.png"))
    assert whats_wrong(file) == [
        *(
            f"a.tar: member {name!r} has a path that leaves the shard"
            for name in ("../1.png", "/etc/2.png", "a/../../3.png")
        ),
        *(f"a.tar: member '{n}.png' is no file: links and devices are refused" for n in (4, 5, 6)),
    ]


def test_samples_that_are_not_in_one_piece_are_reported(tmp_path: Path) -> None:
    file = tar(tmp_path / "a.tar", [(name, b"1") for name in ("1.png", "2.png", "2.PNG", "1.cls", "2.cls")])
    what = "expected the members of a sample next to each other, as tar --sort=name puts them; "
    assert whats_wrong(file) == [
        "a.tar, 2: has two members png",
        f"a.tar, 1: {what}1.cls comes later",
        f"a.tar, 2: {what}2.cls comes later",
    ]


@pytest.mark.parametrize(
    ("kinds", "settings", "lines"),
    [
        (
            {"age": "class"},
            {},
            [
                "a.tar, 0002: 0002.json: expected a JSON object, with a field for each label, got list",
                "a.tar, 0003: 0003.json: expected JSON, got an error: Expecting value: line 1 column 1 (char 0)",
                "a.tar: no json has the field 'age'; nearest: aged",
            ],
        ),
        (
            {"sge.png": "mask", "cls": "class"},
            {},
            ["no sample of a.tar has a member sge.png; there are cls, json, png, seg.png, txt; nearest: seg.png"],
        ),
        (
            {"x": "mask", "y": "class"},
            {"labels": {"x": "sge.png", "y": "clss;klass"}},
            [
                "data.labels.x: no sample of a.tar has a member sge.png; there are cls, json, png, seg.png, txt;"
                " nearest: seg.png",
                "data.labels.y: no sample of a.tar has a member clss or klass; there are cls, json, png, seg.png, txt;"
                " nearest: cls",
            ],
        ),
        (
            {"x": "mask", "seg.png": "class"},
            {"labels": {"x": "cls"}},
            [
                "data.labels.x: the task learns a mask; expected a picture or npy, got cls",
                "seg.png: the task learns a class; expected cls, txt or json, got seg.png",
            ],
        ),
        ({"image": "class"}, {}, ["'image' is the name of the images, and of no label"]),
        (
            {"cls": "class"},
            {"image": "jpg;jpgg"},
            [
                "data.image: no sample from a.tar on has a member jpg or jpgg; there are cls, json, png, seg.png, txt;"
                " nearest: png"
            ],
        ),
        ({"txt": "numbers"}, {}, ["a.tar, 0001: txt: expected a number, got 'one'"]),
        (
            {"aged": "numbers"},
            {},
            [
                "a.tar, 0002: 0002.json: expected a JSON object, with a field for each label, got list",
                "a.tar, 0003: 0003.json: expected JSON, got an error: Expecting value: line 1 column 1 (char 0)",
                "a.tar, 0004: aged: expected text, a number or a list of them, got dict",
            ],
        ),
    ],
)
def test_a_mistake_is_reported_with_its_place(
    tmp_path: Path, kinds: Mapping[str, LabelKind], settings: dict[str, Any], lines: list[str]
) -> None:
    samples: list[dict[str, Any]] = [
        {"png": png(), "cls": 0, "seg.png": png(), "txt": "1", "json": {"aged": 1}},
        {"png": png(), "txt": "one"},
        {"png": png(), "json": [1]},
        {"png": png(), "json": b"no"},
        {"png": png(), "json": {"aged": {"years": 1}}},
    ]
    assert whats_wrong(shard(tmp_path / "a.tar", samples), kinds, **settings) == lines


def test_samples_without_an_image_and_labels_of_no_class_are_reported(tmp_path: Path) -> None:
    file = shard(tmp_path / "a.tar", [{"png": png(), "cls": 0}, {"cls": 1}, {"jpg": png(), "cls": 1}])
    other = shard(tmp_path / "b.tar", [{"png": png(), "cls": "2"}, {"png": png(), "cls": b"\xff"}])
    image = "expected a member png, the image, got"
    assert whats_wrong(file) == [f"a.tar, 0001: {image} cls", f"a.tar, 0002: {image} cls, jpg"]
    assert whats_wrong(file, val=str(other)) == ["b.tar, 0001: 0001.cls: expected text in UTF-8"]
    shard(file, [{"png": png(), "cls": n} for n in range(2)])
    shard(other, [{"png": png(), "cls": "2"}, {"png": png(), "cls": "x"}])
    assert whats_wrong(file, val=str(other)) == [
        "b.tar, 0000: cls: class 2 is never seen in training",
        "b.tar, 0001: cls: expected a class number as in training, got 'x'",
    ]


def test_members_that_cannot_be_read_are_reported_by_the_check(tmp_path: Path) -> None:
    samples = [{"png": png()[:40], "seg.png": png(1)}, {"png": png(), "seg.png": png(size=(5, 3))}]
    data = opened(shard(tmp_path / "a.tar", samples), {"seg.png": "mask"})["train"]
    found = [line.replace(f"{tmp_path}/", "") for line in problems(data, {"seg.png": "mask"}, {"seg.png": range(2)})]
    assert found[0].startswith("a.tar, 0000: image: 0000.png: ") and "BytesIO" not in found[0]
    assert found[1:] == [
        "a.tar, 0001: seg.png: expected the image's size, 4 x 3 pixels, got 5 x 3",
        "a.tar, 0001: seg.png: the task has no class 7",
    ]
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1000])
    with pytest.raises(
        DataError, match=r"a\.tar, 0001: image: 0001\.png: the shard is shorter than when it was indexed"
    ):
        data.read(1, ["image"])
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match=r"a\.tar, 0001: image: 0001\.png: No such file or directory"):
        data.read(1, ["image"])


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}], object))
    file = shard(tmp_path / "a.tar", [{"png": png(), "pyd": [1], "npy": objects.getvalue()}])
    message = "pyd: the task learns a class; expected cls, txt or json, got pyd"
    assert whats_wrong(file, {"pyd": "class"}) == [message]
    data = opened(file, {"npy": "mask", "pyd": "mask"})["train"]
    for name in ("npy", "pyd"):
        with pytest.raises(DataError, match=rf"a\.tar, 0000: {name}: 0000\.{name}: "):
            data.read(0, [name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train": "https://example.com/{0..3}.tar"},
            r"^data\.train: expected local files, .* got https://",
        ),
        ({"val": "pipe:touch x"}, r"^data\.val: expected local files, .* got pipe:touch x"),
        (
            {"train": "a-{0..3.tar"},
            r"^data\.train: expected braces as in train-\{000\.\.003\}\.tar, got a-\{0",
        ),
        ({"train": "a.tar::a.tar"}, r"^data\.train: expected each shard once, got a\.tar several times"),
        ({"train": "{0..999999999}.tar"}, r"^data\.train: expected at most 100,000 shards, got more"),
        ({"scale": {"cls": 2.0}}, r"^data\.scale\.cls: no task learns a depth"),
    ],
)
def test_what_cannot_be_had_is_blamed_on_its_key(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    file = shard(tmp_path / "a.tar", [{"png": png(), "cls": 0}])
    with pytest.raises(SettingError, match=message):
        opened(settings.pop("train", file), **settings)
    assert not (tmp_path / "x").exists()


def test_a_split_that_is_not_named_is_required(tmp_path: Path) -> None:
    file = str(shard(tmp_path / "a.tar", [{"png": png(), "cls": 0}]))
    settings = WebDatasetData(name="webdataset", train=file, val=file)
    with pytest.raises(SettingError, match=r"^data\.test: this split is required here$"):
        open_shards(settings, KINDS, ["test"])


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)  # as if it were not installed
    with pytest.raises(SettingError, match=r"^data\.name: .* pip install 'mtl-freeze\[webdataset\]'"):
        opened(tmp_path / "a.tar")
