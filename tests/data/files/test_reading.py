"""Images and labels are read from files as they are stored, and what cannot be read is named."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtl.data import DataError
from mtl.data.files.reading import inside, read_array, read_depth, read_image, read_mask, read_normals

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=2)


def saved(file: Path, pixels: Any, mode: str | None = None, **options: Any) -> Path:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (picture if mode is None else picture.convert(mode)).save(file, **options)
    return file


def npy(file: Path, array: Any) -> Path:
    np.save(file, array)
    return file


# Images


@pytest.mark.parametrize(
    ("mode", "num_channels"), [("1", 1), ("L", 1), ("P", 3), ("RGB", 3), ("RGBA", 4), ("LA", 3), ("CMYK", 4)]
)
def test_a_picture_keeps_the_channels_that_it_is_stored_with(tmp_path: Path, mode: str, num_channels: int) -> None:
    picture = Image.fromarray(COLOUR).convert(mode)
    image = read_image(saved(tmp_path / "a.tif", picture))
    assert image.shape == (num_channels, 3, 4)
    assert image.dtype == torch.uint8
    if mode in ("L", "RGB", "RGBA", "CMYK"):
        stored = np.array(picture)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), stored[..., None] if stored.ndim == 2 else stored)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_any_picture_of_8_bits_can_be_read_as_rgb(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(COLOUR).convert(mode)
    image = read_image(saved(tmp_path / "a.tif", picture), to_rgb=True)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(picture.convert("RGB")))


def test_16_bits_become_floats_from_0_to_255(tmp_path: Path) -> None:
    deep = np.array([[0, 257, 65535], [1, 25700, 300]], dtype=np.uint16)
    expected = torch.from_numpy(deep.astype(np.float32) / 257)[None]
    assert torch.equal(read_image(saved(tmp_path / "a.png", deep)), expected)
    assert torch.equal(read_image(npy(tmp_path / "a.npy", deep)), expected)
    assert expected[0].tolist()[0] == [0.0, 1.0, 255.0]


def test_more_than_16_bits_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.tif", np.array([[0, 70000]], dtype=np.int32))
    with pytest.raises(DataError, match=r"a\.tif: expected at most 16 bits, got 0 to 70000"):
        read_image(file)
    with pytest.raises(DataError, match="expected whole numbers, got a picture of floats"):
        read_image(saved(tmp_path / "b.tif", np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    turn = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.T,
        6: lambda x: x.T[:, ::-1],
        7: lambda x: x[::-1, ::-1].T,
        8: lambda x: x.T[::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(saved(tmp_path / "a.png", GREY, exif=exif))
    assert np.array_equal(image[0].numpy(), turn[orientation](GREY))


def test_a_large_jpeg_is_decoded_no_larger_than_needed(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    file = saved(tmp_path / "a.jpg", noise, quality=90)
    assert read_image(file).shape == (3, 64, 96)
    assert read_image(file, enough=(16, 24)).shape == (3, 16, 24)
    assert read_image(file, enough=(17, 24)).shape == (3, 32, 48)
    assert read_image(file, enough=(640, 960)).shape == (3, 64, 96)


def test_an_array_is_an_image(tmp_path: Path) -> None:
    assert torch.equal(read_image(npy(tmp_path / "a.npy", GREY)), torch.from_numpy(GREY)[None])
    assert torch.equal(read_image(npy(tmp_path / "b.npy", COLOUR)), torch.from_numpy(COLOUR).permute(2, 0, 1))
    assert torch.equal(
        read_image(npy(tmp_path / "c.npy", (COLOUR / 255).astype(np.float32))),
        torch.from_numpy((COLOUR / 255).astype(np.float32) * 255).permute(2, 0, 1),
    )
    assert read_image(npy(tmp_path / "d.npy", np.full((2, 2, 3), 0.5))).dtype == torch.float32


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (COLOUR.astype(np.float32), "expected floats from 0 to 1, got 0 to 255; store 0 to 255 as whole numbers of 8"),
        (np.array([[np.nan, 0.5]]), "expected floats from 0 to 1, got nan to nan"),
        (np.array([[-2.1, 2.6]]), "expected floats from 0 to 1, got -2.1 to 2.6"),
        (np.zeros((2, 2), np.int64), "expected 8 or 16 bits without sign, or floats, got int64"),
        (np.zeros(3, np.uint8), r'expected an image "h w" or "h w c", got shape \(3,\)'),
        (np.zeros((2, 2), complex), "expected an array of numbers"),
    ],
)
def test_an_array_that_is_no_image_is_refused(tmp_path: Path, array: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.npy: {message}"):
        read_image(npy(tmp_path / "a.npy", array))


def test_floats_that_resizing_left_a_little_beyond_1_are_read(tmp_path: Path) -> None:
    image = read_image(npy(tmp_path / "a.npy", np.array([[-0.05, 1.05]], dtype=np.float32)))
    assert torch.allclose(image, torch.tensor([[[-0.05, 1.05]]]) * 255)


# Files that cannot be read


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_half_a_picture_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = saved(tmp_path / f"a.{suffix}", noise).read_bytes()
    for length in (len(whole) // 2, 20, 0):
        (tmp_path / f"a.{suffix}").write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"a\.{suffix}: "):
            read_image(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("read", [read_image, read_mask, read_depth, read_normals])
@pytest.mark.parametrize("suffix", ["jpg", "npy"])
def test_text_with_the_name_of_an_image_is_refused(tmp_path: Path, read: Any, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}: ")
    assert str(error.value).count(str(file)) == 1


@pytest.mark.parametrize("read", [read_image, read_mask, read_depth, read_normals])
@pytest.mark.parametrize("name", ["a.png", "a.npy"])
def test_a_missing_file_is_named(tmp_path: Path, read: Any, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: No such file or directory$"):
        read(tmp_path / name)


class _Planted:
    def __reduce__(self) -> Any:
        return os.mkdir, ("planted",)


def test_pickled_objects_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.npy"
    np.save(file, np.array([_Planted()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"a\.npy: Object arrays cannot be loaded"):
        read_array(file)
    assert not (tmp_path / "planted").exists()


def test_an_archive_of_arrays_is_refused_and_closed(tmp_path: Path) -> None:
    archive = BytesIO()
    np.savez(archive, a=GREY)
    (tmp_path / "a.npy").write_bytes(archive.getvalue())
    with pytest.raises(DataError, match=r"a\.npy: "):
        read_array(tmp_path / "a.npy")


# Labels


def test_a_mask_of_any_kind_gives_its_numbers(tmp_path: Path) -> None:
    numbers = np.array([[0, 1, 255], [7, 0, 3]], dtype=np.uint8)
    palette = Image.fromarray(numbers, mode=None)
    palette.putpalette(list(range(256)) * 3)
    assert palette.mode == "P"
    for file in (
        saved(tmp_path / "grey.png", numbers),
        saved(tmp_path / "palette.png", palette),
        npy(tmp_path / "a.npy", numbers),
        npy(tmp_path / "b.npy", numbers[..., None]),
    ):
        assert torch.equal(read_mask(file), torch.from_numpy(numbers))
    deep = numbers.astype(np.uint16) + 300
    assert torch.equal(read_mask(saved(tmp_path / "deep.png", deep)), torch.from_numpy(deep.astype(np.int32)))
    floats = np.array([[-1.0, 2.0]])
    assert torch.equal(read_mask(npy(tmp_path / "c.npy", floats)), torch.tensor([[-1, 2]], dtype=torch.int32))
    bits = Image.fromarray(numbers > 0)
    assert torch.equal(read_mask(saved(tmp_path / "bits.png", bits)), torch.from_numpy(numbers > 0).to(torch.uint8))


def test_what_has_no_one_whole_number_a_pixel_is_no_mask(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png: expected one number a pixel, got shape \(3, 4, 3\)"):
        read_mask(saved(tmp_path / "a.png", COLOUR))
    with pytest.raises(DataError, match=r"a\.npy: expected whole numbers"):
        read_mask(npy(tmp_path / "a.npy", np.array([[0.5]])))
    with pytest.raises(DataError, match=r"b\.npy: expected whole numbers"):
        read_mask(npy(tmp_path / "b.npy", np.array([[np.nan]])))


def test_depth_is_what_the_file_holds_times_the_unit(tmp_path: Path) -> None:
    deep = np.array([[0, 512, 65535]], dtype=np.uint16)
    assert read_depth(saved(tmp_path / "a.png", deep), 1 / 512).tolist() == [[[0.0, 1.0, 65535 / 512]]]
    assert read_depth(npy(tmp_path / "a.npy", deep)).tolist() == [[[0.0, 512.0, 65535.0]]]
    metres = np.array([[[0.0], [2.5]]], dtype=np.float64)
    depth = read_depth(npy(tmp_path / "b.npy", metres))
    assert depth.tolist() == [[[0.0, 2.5]]]
    assert depth.dtype == torch.float32
    with pytest.raises(DataError, match=r"c\.png: expected one number a pixel"):
        read_depth(saved(tmp_path / "c.png", COLOUR))


def test_normals_are_unit_vectors_or_zero(tmp_path: Path) -> None:
    vectors = np.array([[[0, 0, -2], [0.6, 0.8, 0], [0, 0, 0], [0.1, 0.1, 0.1], [np.nan, 0, 1], [np.inf, 0, 0]]])
    normals = read_normals(npy(tmp_path / "a.npy", vectors))
    expected = torch.tensor([[0.0, 0, -1], [0.6, 0.8, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert normals.shape == (3, 1, 6)
    assert torch.allclose(normals[:, 0].T, expected)


def test_grey_and_black_in_a_picture_of_normals_are_none(tmp_path: Path) -> None:
    pixels = np.array([[[127, 127, 127], [128, 128, 128], [0, 0, 0], [255, 128, 128], [128, 128, 0]]], dtype=np.uint8)
    normals = read_normals(saved(tmp_path / "a.png", pixels))[:, 0].T
    assert torch.equal(normals[:3], torch.zeros(3, 3))
    assert torch.allclose(normals[3:], torch.tensor([[1.0, 0, 0], [0, 0, -1]]), atol=0.01)
    assert torch.allclose(normals[3:].square().sum(dim=1), torch.ones(2))


def test_what_has_not_three_numbers_a_pixel_is_no_normals(tmp_path: Path) -> None:
    for file in (saved(tmp_path / "a.png", COLOUR, "RGBA"), npy(tmp_path / "a.npy", GREY)):
        with pytest.raises(DataError, match=r"a\.(png|npy): expected three numbers a pixel, got shape"):
            read_normals(file)
    with pytest.raises(DataError, match="three numbers a pixel"):
        read_normals(saved(tmp_path / "b.png", GREY))


# Paths


def test_a_name_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "root2").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    (root / "within").symlink_to(root / "a")
    for name in ("../secret", "a/../../secret", str(tmp_path / "secret"), "../root2/x", ".."):
        for follow_links in (False, True):
            with pytest.raises(DataError, match="leads out of"):
                inside(root, name, follow_links)
    for name in ("link", "folder/secret"):
        with pytest.raises(DataError, match=f"{name}: leads out of"):
            inside(root, name)
        assert inside(root, name, follow_links=True).read_text() == "x"
    assert inside(root, "a/../b") == root.resolve() / "b"
    assert inside(root, "within/x") == root.resolve() / "a" / "x"
    with pytest.raises(DataError, match="null character"):
        inside(root, "a\0b")


def test_a_folder_that_is_a_link_itself_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert inside(tmp_path / "root", "a") == (tmp_path / "real" / "a").resolve()


def test_a_relative_folder_is_looked_for_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root").mkdir()
    for root in (Path("root"), Path(), Path("root/..")):
        assert inside(root, "a") == (tmp_path / root / "a").resolve()
        with pytest.raises(DataError):
            inside(root, "../a")
