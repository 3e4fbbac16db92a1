"""Generated data that is larger than `data.memory_gb`: the same batches, read from the data cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import mtl
from mtl.checkpoint.tensor_file import TensorFileError
from mtl.config import GeneratedData, SettingError
from mtl.data import DataError, check_room, training_batches
from mtl.data.augment import draw_view
from mtl.data.dataset import Split
from mtl.data.generated import scenes
from mtl.data.generated.generated_source import GeneratedSource
from mtl.data.generated.rows_file import RowsFile, write_rows
from mtl.data.generated.stored_split import StoredSplit
from mtl.data.loading import Loading
from mtl.data.memory import MemorySplit
from mtl.data.split_workers import SplitWorkers
from mtl.tasks import Classification, Depth, Segmentation, Task
from runs import exact_metrics, tiny_config

TASKS: dict[str, Task] = {"segmentation": Segmentation(13), "depth": Depth(), "thing": Classification(10)}
LABEL_OF = {"segmentation": "segmentation", "depth": "depth", "thing": "object"}
FLIP = {"train": [{"name": "flip"}]}


def load(memory_gb: float, which: Any = "train", tasks: dict[str, Task] = TASKS, **changes: Any) -> Split:
    data = {"name": "scenes", "image_size": 16, "num_train": 120, "num_val": 10, "memory_gb": memory_gb, **changes}
    kinds = {LABEL_OF[name]: task.label_kind for name, task in tasks.items()}
    source = GeneratedSource(GeneratedData.model_validate(data), kinds)
    return source.load_split(which, tasks, {name: LABEL_OF[name] for name in tasks}, quiet=True)


@pytest.mark.parametrize("changes", [{}, {"transform": FLIP}], ids=["plain", "flipped"])
def test_a_split_on_disk_has_the_batches_of_one_in_memory(changes: dict[str, Any]) -> None:
    there, stored = load(4.0, **changes), load(0.0, **changes)
    assert isinstance(there, MemorySplit) and isinstance(stored, StoredSplit)
    assert (there.is_in_memory, stored.is_in_memory) == (True, False)
    assert (len(there), there.size, there.channels) == (len(stored), stored.size, stored.channels)
    assert there.identity() == stored.identity()
    for task in TASKS:
        assert there.label_identity(task) == stored.label_identity(task)
        assert torch.equal(there.labels_to_fit(task), stored.labels_to_fit(task))
    view = draw_view(GeneratedData.model_validate({"name": "scenes", **changes}), 0, 3, 120)
    for workers in (0, 2):
        loading = Loading(with_images=True, workers=SplitWorkers(workers))
        pairs = zip(*(training_batches(each, 32, 0, 1, view, loading=loading) for each in (there, stored)), strict=True)
        num = 0
        for one, other in pairs:
            num += 1
            assert torch.equal(one.images, other.images)
            assert one.lacking == other.lacking
            assert list(one.labels) == list(other.labels)
            assert all(torch.equal(one.labels[name], other.labels[name]) for name in TASKS)
        assert num == 3


@pytest.mark.slow
def test_a_run_that_reads_from_the_disk_ends_with_the_same_bits(tmp_path: Path) -> None:
    rows = []
    for memory_gb in (4.0, 0.0):
        (tmp_path / str(memory_gb)).mkdir()
        data = {"name": "scenes", "image_size": 32, "batch_size": 8, "num_train": 40, "num_val": 20}
        phases = [{"name": "all", "epochs": 1}]
        chosen = {"memory_format": "contiguous", "precision": "fp32", "phases": phases}
        config = tiny_config(tmp_path / str(memory_gb), data=data | {"memory_gb": memory_gb}, **chosen)
        result = mtl.train(config, quiet=True)
        rows.append(exact_metrics(result.run_dir))
    assert rows[0] == rows[1]


def test_samples_that_cannot_be_trained_on_are_named_or_left_out() -> None:
    # Of five classes, some scenes show others.
    few: dict[str, Task] = {"segmentation": Segmentation(5)}
    with pytest.raises(SettingError, match=r"tasks\.segmentation: .*expected classes 0 to 4"):
        load(0.0, tasks=few)
    there, stored = (load(memory_gb, tasks=few, on_bad_sample="skip") for memory_gb in (4.0, 0.0))
    assert 0 < stored.num_skipped == there.num_skipped == 120 - len(stored)
    assert there.identity() == stored.identity()
    indices = torch.tensor([0, 3, 1])
    assert torch.equal(there.batch(indices).images, stored.batch(indices).images)


def test_a_file_that_became_shorter_is_an_error_of_the_batch(tmp_path: Path) -> None:
    stored = load(0.0, cache_dir=str(tmp_path))
    (file,) = tmp_path.glob("scenes-train-*/data.safetensors")
    with file.open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(DataError, match="the data cache cannot be read: the file is shorter than it was"):
        stored.images_of(torch.tensor([5]), None)


def test_data_that_is_read_from_the_disk_need_not_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A block of scenes fits, and hardly anything else.
    monkeypatch.setattr("mtl.data.room.machine_memory", lambda: 3 * 50 * 16 * 16 * 20)
    config = GeneratedData(name="scenes", image_size=16, num_train=10_000, num_val=10, cache_dir=str(tmp_path))
    with pytest.raises(SettingError, match=r"^data\.num_train: 10,000 images .* take 35\.9 MB of memory"):
        check_room(config)
    check_room(config.model_copy(update={"memory_gb": 1e-4}))


def test_blocks_are_written_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = 0, 0
    render = scenes.render_block

    class Counted(dict[str, Any]):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def and_count(*args: Any) -> dict[str, Any]:
        nonlocal alive, most
        block = Counted(render(*args))
        alive += 1
        most = max(most, alive)
        return block

    monkeypatch.setattr(scenes, "render_block", and_count)
    load(0.0, num_train=400, cache_dir=str(tmp_path))
    assert (alive, most) == (0, 2)


@settings(max_examples=30)
@given(
    num=st.integers(1, 40),
    block=st.integers(1, 15),
    wanted=st.lists(st.integers(0, 10**6), max_size=30),
    data=st.data(),
)
def test_rows_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, num: int, block: int, wanted: list[int], data: st.DataObject
) -> None:
    kinds = {"a": np.uint8, "b": np.float32, "c": np.int64, "d": np.float16}
    axes = {name: data.draw(st.lists(st.integers(1, 3), max_size=2)) for name in kinds}
    rng = np.random.default_rng(0)
    whole = -(-num // block) * block
    arrays = {name: rng.integers(0, 200, (whole, *axes[name])).astype(kind) for name, kind in kinds.items()}
    file = tmp_path_factory.mktemp("rows") / "data.safetensors"
    write_rows(file, num, ({n: each[at : at + block] for n, each in arrays.items()} for at in range(0, whole, block)))
    read = load_file(file)
    rows = RowsFile(file)
    indices = torch.tensor([each % num for each in wanted], dtype=torch.int64)
    for name, array in arrays.items():
        expected = torch.from_numpy(array[:num])
        assert torch.equal(read[name], expected)
        assert rows.shapes[name] == tuple(expected.shape)
        assert torch.equal(rows.read(name, indices), expected[indices])


@pytest.mark.parametrize(
    ("size", "message"),
    [(-1, "its tensors are cut short"), (20, "its header is cut short"), (3, "its header is cut short"), (0, "header")],
)
def test_rows_that_were_cut_are_refused_when_their_file_is_opened(tmp_path: Path, size: int, message: str) -> None:
    file = tmp_path / "data.safetensors"
    write_rows(file, 2, [{"a": np.zeros((2, 3), np.uint8)}])
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(TensorFileError, match=message):
        RowsFile(file)


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"a": 3}', b'{"a": {"dtype": "U8", "shape": [1]}}', b"\xff{}"])
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "data.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(TensorFileError, match="its header is damaged"):
        RowsFile(file)


def test_a_reader_closes_its_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "x", 2, [{"a": np.zeros((2, 3), np.uint8)}])
    before = len(list(Path("/proc/self/fd").iterdir()))
    rows = RowsFile(tmp_path / "x")
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    del rows
    assert len(list(Path("/proc/self/fd").iterdir())) == before
