"""The generated data: exact labels, disjoint sources, determinism, the disk cache."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl.config import GeneratedData, SettingError
from mtl.data import (
    DataError,
    cache,
    check_room,
    training_batches,
    validation_batches,
)
from mtl.data.generated import multifashion, scenes
from mtl.data.generated.generated_source import GeneratedSource
from mtl.data.generated.sprites import Sprites, load_sprites
from mtl.data.memory import MemorySplit
from mtl.data.room import stored_bytes
from mtl.runtime.fingerprint import fingerprint_of_file
from mtl.tasks import Classification, Depth, Normals, Segmentation

SCENE_TASKS = {
    "segmentation": Segmentation(13),
    "depth": Depth(),
    "normals": Normals(),
    "object": Classification(10),
}


def load_data(config: GeneratedData, tasks: dict[str, Any], quiet: bool) -> tuple[Any, Any]:
    kinds = {name: task.label_kind for name, task in tasks.items()}
    return GeneratedSource(config, kinds).load(tasks, dict(zip(tasks, tasks, strict=True)), quiet)


@pytest.fixture(scope="module")
def block() -> dict[str, np.ndarray]:
    return scenes.render_block(load_sprites("train"), 64, seed=0, block=0)


def test_the_two_splits_share_no_garment() -> None:
    train, val = load_sprites("train"), load_sprites("val")
    assert (len(train.labels), len(val.labels)) == (8000, 2000)
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in val.images}


def test_the_notice_of_the_garments_is_next_to_them() -> None:
    notice = Path(scenes.__file__).parents[1] / "assets" / "fashion-mnist-10k.LICENSE"
    assert "Copyright (c) 2017 Zalando SE" in notice.read_text()


def test_scene_labels_have_the_promised_form(block: dict[str, np.ndarray]) -> None:
    forms = {name: (array.shape[1:], str(array.dtype)) for name, array in block.items()}
    assert forms == {
        "images": ((64, 64, 3), "uint8"),
        "segmentation": ((64, 64), "uint8"),
        "depth": ((1, 64, 64), "float32"),
        "normals": ((3, 64, 64), "float16"),
        "object": ((), "int64"),
    }
    assert set(np.unique(block["segmentation"])) <= set(range(13))
    assert block["depth"].min() > 0.3 and block["depth"].max() < 30
    assert np.abs(np.linalg.norm(block["normals"].astype(np.float64), axis=1) - 1).max() < 1e-3


def test_normals_agree_with_the_slope_of_depth(block: dict[str, np.ndarray]) -> None:
    """Points in space rebuilt from depth alone give, by finite differences, the normals that are labelled."""
    room = scenes._sample_room(np.random.default_rng([0, 0]), scenes.BLOCK, 8000)
    centre = (np.arange(64) + 0.5) / 64 - 0.5
    checked = 0
    for i in range(10):
        x, y = np.meshgrid(centre / room.focal[i], -centre / room.focal[i])
        points = np.stack([x, y, np.ones_like(x)]) * block["depth"][i, 0].astype(np.float64)
        across, down = points[:, :-1, 1:] - points[:, :-1, :-1], points[:, 1:, :-1] - points[:, :-1, :-1]
        slope = np.cross(across, down, axis=0)
        slope /= np.linalg.norm(slope, axis=0)
        label = block["normals"][i, :, :-1, :-1].astype(np.float64)
        slope *= np.sign((slope * label).sum(0))
        flat = block["segmentation"][i] == scenes.FLOOR
        # Where a pixel and its neighbours all show the floor, which is flat, the agreement must be exact.
        inner = flat[:-1, :-1] & flat[1:, :-1] & flat[:-1, 1:]
        assert (slope * label).sum(0)[inner].min() > 0.9995  # float16 labels
        checked += inner.sum()
    assert checked > 1000


def test_floor_depth_follows_from_the_cameras_height_and_pitch(block: dict[str, np.ndarray]) -> None:
    room = scenes._sample_room(np.random.default_rng([0, 0]), scenes.BLOCK, 8000)
    y = -((np.arange(64) + 0.5) / 64 - 0.5)[:, None] / room.focal[0]
    down = np.cos(room.pitch[0]) * y - np.sin(room.pitch[0])
    expected = np.broadcast_to(-room.camera_height[0] / np.minimum(down, -1e-9), (64, 64))
    floor = block["segmentation"][0] == scenes.FLOOR
    np.testing.assert_allclose(block["depth"][0, 0][floor], expected[floor], rtol=1e-4)


def test_the_object_label_is_the_class_of_the_nearest_visible_garment(block: dict[str, np.ndarray]) -> None:
    agreed = 0
    for i in range(scenes.BLOCK):
        segmentation, depth = block["segmentation"][i], block["depth"][i, 0]
        shares = {c: (segmentation == c).mean() for c in range(3, 13) if (segmentation == c).any()}
        clear = {c: depth[segmentation == c].min() for c, share in shares.items() if share >= 0.005}
        if clear and min(shares[c] for c in shares) >= 0.005:  # every visible class is clearly visible
            agreed += block["object"][i] == min(clear, key=lambda c: clear[c]) - 3
            assert block["object"][i] == min(clear, key=lambda c: clear[c]) - 3
    assert agreed > 20


def test_normals_face_the_camera(block: dict[str, np.ndarray]) -> None:
    room = scenes._sample_room(np.random.default_rng([0, 0]), scenes.BLOCK, 8000)
    centre = (np.arange(64) + 0.5) / 64 - 0.5
    x = np.broadcast_to(centre[None, None, :] / room.focal[:, None, None], (scenes.BLOCK, 64, 64))
    y = np.broadcast_to(-centre[None, :, None] / room.focal[:, None, None], x.shape)
    towards = (block["normals"].astype(np.float64) * np.stack([x, y, np.ones_like(x)], axis=1)).sum(1)
    assert towards.max() < 0.01


@pytest.mark.parametrize("module", [scenes, multifashion])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(module: object) -> None:
    sprites = load_sprites("val")
    first, again, other = (module.render_block(sprites, 32, seed, 3) for seed in (5, 5, 6))  # type: ignore[attr-defined]
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)
    assert first["images"].tobytes() != other["images"].tobytes()


def test_multifashion_shows_the_brighter_garment_where_two_overlap() -> None:
    sprites = Sprites(
        np.stack([np.full((28, 28), 100, np.uint8), np.full((28, 28), 200, np.uint8)]), np.array([3, 7], np.uint8)
    )
    block = multifashion.render_block(sprites, multifashion.CANVAS, seed=0, block=0)
    pair = next(i for i in range(100) if (block["left"][i], block["right"][i]) == (3, 7))
    image = block["images"][pair, :, :, 0]
    assert image[0, 0] == 100 and image[35, 35] == 200 and image[20, 20] == 200 and image[0, 35] == 0


def test_a_smaller_data_set_is_the_beginning_of_a_larger_one() -> None:
    small = GeneratedData(name="scenes", image_size=16, num_train=30, num_val=10)
    large = GeneratedData(name="scenes", image_size=16, num_train=120, num_val=10)
    (a, _), (b, _) = load_data(small, SCENE_TASKS, quiet=True), load_data(large, SCENE_TASKS, quiet=True)
    assert (len(a), len(b)) == (30, 120)
    assert torch.equal(a.images, b.images[:30])
    assert torch.equal(a.labels["depth"], b.labels["depth"][:30])


def test_labels_that_no_task_uses_are_left_out() -> None:
    config = GeneratedData(name="scenes", image_size=16, num_train=10, num_val=10)
    train, _ = load_data(config, {"depth": Depth()}, quiet=True)
    assert list(train.labels) == ["depth"]


def test_labels_that_do_not_fit_a_task_are_an_error() -> None:
    config = GeneratedData(name="scenes", image_size=16, num_train=10, num_val=10)
    with pytest.raises(SettingError, match=r"tasks\.segmentation: .*expected classes 0 to 4 \(num_classes: 5\)"):
        load_data(config, {"segmentation": Segmentation(5)}, quiet=True)


HARMS = [
    "flip",
    "truncate",
    "empty",
    "swap",
    "card",
    "empty card",
    "list card",
    "missing",
    "file",
    "link",
    "shape",
    "name",
]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_data_cache_is_made_again_with_a_warning(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = GeneratedData(name="scenes", image_size=16, num_train=10, num_val=5, cache_dir=str(tmp_path))
    train, _ = load_data(config, SCENE_TASKS, quiet=True)
    # What was read is a view of the file that is harmed.
    sound = MemorySplit(train.images.clone(), {name: label.clone() for name, label in train.labels.items()})
    del train
    entry = next(tmp_path.glob("scenes-train-*"))
    file, card = entry / "data.safetensors", entry / "card.json"
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[-100] ^= 1
        file.write_bytes(content)
    elif harm == "truncate":
        file.write_bytes(content[:-10])
    elif harm == "swap":
        file.write_bytes((next(tmp_path.glob("scenes-val-*")) / "data.safetensors").read_bytes())
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm in ("card", "empty card", "list card"):
        card.write_text({"card": "{", "empty card": "", "list card": "[]"}[harm])
    elif harm == "missing":
        file.unlink()
    elif harm in ("file", "link"):
        shutil.rmtree(entry)
        entry.write_text("") if harm == "file" else entry.symlink_to("nowhere")
    else:
        # Whole by its own checksum, but not what belongs there.
        tensors = load_file(file)
        tensors["depth" if harm == "shape" else "dept"] = tensors.pop("depth")[:, :, :8].contiguous()
        save_file(tensors, file)
        card.write_text(json.dumps(json.loads(card.read_text()) | {"checksum": fingerprint_of_file(file)}))
    again, _ = load_data(config, SCENE_TASKS, quiet=True)
    (warned,) = [record.getMessage() for record in caplog.records]
    assert warned.startswith(f"the data cache {entry} is damaged (") and warned.endswith("): the data is made again")
    assert ("card.json" in warned) == (harm in ("card", "empty card", "list card"))
    assert torch.equal(again.images, sound.images)
    assert all(torch.equal(again.labels[name], sound.labels[name]) for name in sound.labels)
    caplog.clear()
    load_data(config, SCENE_TASKS, quiet=True)
    assert not caplog.records and not list(tmp_path.glob(".*"))


def test_a_cache_that_cannot_keep_what_is_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GeneratedData(name="scenes", image_size=16, num_train=5, num_val=5, cache_dir=str(tmp_path))
    numbers = iter(range(100))
    monkeypatch.setattr(cache, "fingerprint_of_file", lambda _: next(numbers))
    with pytest.raises(DataError, match=r"is not what was written a moment ago .*set data\.cache_dir"):
        load_data(config, SCENE_TASKS, quiet=True)


@pytest.mark.parametrize("module", [scenes, multifashion])
def test_what_a_data_set_is_said_to_take_is_what_it_takes(module: Any) -> None:
    block = module.render_block(load_sprites("val"), 16, 0, 0)
    assert module.stored(module.BLOCK, 16) == {name: (array.shape, array.itemsize) for name, array in block.items()}
    assert stored_bytes(module.stored(module.BLOCK, 16)) == sum(array.nbytes for array in block.values())


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        (
            {"image_size": 10**9},
            "data.image_size",
            r"one image of 1,000,000,000 x 1,000,000,000 pixels takes 12,000,000,000 GB",
        ),
        (
            {"image_size": 20_000},
            "data.image_size",
            r"50 images of 20,000 x 20,000 pixels with their labels take 560 GB",
        ),
        (
            {"num_train": 10**9, "memory_gb": 1e6},
            "data.num_train",
            r"1,000,000,000 images of 64 x 64 pixels with their labels take 57,352 GB",
        ),
        ({"num_val": 10**9, "memory_gb": 1e6}, "data.num_val", r"1,000,000,000 images of 64 x 64 pixels"),
    ],
)
def test_data_that_is_certain_not_to_fit_into_memory_is_refused_with_its_bytes(
    changes: dict[str, float], key: str, message: str, tmp_path: Path
) -> None:
    config = GeneratedData(name="scenes", cache_dir=str(tmp_path / "cache"), **changes)
    with pytest.raises(
        SettingError, match=rf"^{re.escape(key)}: {message}.* and this machine has [\d.]+ \wB of memory"
    ):
        check_room(config)
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_certain_not_to_fit_on_the_disk_is_refused_with_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr("mtl.data.room.shutil.disk_usage", lambda _: usage)
    folder = tmp_path / "deep/cache"
    config = GeneratedData(name="scenes", image_size=16, num_train=20, num_val=10, cache_dir=str(folder))
    message = (
        "30 images of 16 x 16 pixels with their labels take 108 kB in the data cache .*, and 100 kB are free there"
    )
    with pytest.raises(SettingError, match=rf"^data\.num_train: {message}; another disk: data\.cache_dir"):
        check_room(config)
    assert not folder.exists()
    fewer = config.model_copy(update={"num_train": 10})
    check_room(fewer)
    load_data(fewer, SCENE_TASKS, quiet=True)
    monkeypatch.setattr("mtl.data.room.shutil.disk_usage", lambda _: usage._replace(free=0))
    check_room(fewer)  # it is there already


def test_the_cache_is_read_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GeneratedData(name="multifashion", image_size=36, num_train=10, num_val=5, cache_dir=str(tmp_path))
    tasks = {"left": Classification(10), "right": Classification(10)}
    first, _ = load_data(config, tasks, quiet=True)
    monkeypatch.setattr(multifashion, "render_block", None)
    again, _ = load_data(config, tasks, quiet=True)
    assert torch.equal(first.images, again.images)
    assert not list(tmp_path.glob(".*")), "a temporary folder was left over"


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    config = GeneratedData(name="scenes", image_size=16, num_train=5, num_val=5, cache_dir=str(blocked / "cache"))
    with pytest.raises(DataError, match=r"cannot be written.*set data\.cache_dir"):
        load_data(config, SCENE_TASKS, quiet=True)


@pytest.fixture
def split() -> MemorySplit:
    return MemorySplit(
        torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1),
        {"a": torch.arange(10, dtype=torch.uint8), "b": torch.zeros(10, 1, 2, 2, dtype=torch.float16)},
    )


def test_a_training_pass_has_full_batches_of_distinct_images_in_an_order_of_seed_and_epoch(split: MemorySplit) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = list(training_batches(split, 4, seed, epoch))
        assert [len(batch) for batch in batches] == [4, 4]
        return [int(i) for batch in batches for i in batch.indices]

    assert order(0, 0) == order(0, 0)
    assert len({*order(0, 0)}) == 8
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)


def test_a_split_smaller_than_a_batch_is_one_batch(split: MemorySplit) -> None:
    assert split.order([]).num_batches(64) == 1
    assert [len(batch) for batch in training_batches(split, 64, 0, 0)] == [10]


def test_validation_sees_every_image_once_in_order(split: MemorySplit) -> None:
    batches = list(validation_batches(split, 4))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_batches_keep_images_as_bytes_and_give_labels_in_the_types_that_losses_take(split: MemorySplit) -> None:
    batch = next(iter(validation_batches(split, 4)))
    assert batch.images.dtype == torch.uint8
    assert (batch.labels["a"].dtype, batch.labels["b"].dtype) == (torch.int64, torch.float32)
    assert batch.labels["a"].tolist() == batch.images.flatten().tolist()
