"""How fast the readers of public data sets are: trees of made-up files at the sizes of the real ones, one process.

A line is a set: images and all its labels read in a second of this process, warm; then how long it takes to open a set
of many files. Time is that of the processor, so that others on the machine do not count.

python scripts/bench/read_sets.py                  # every set, 24 items each, and opening 100,000 files
python scripts/bench/read_sets.py --items 100 --files 0
"""

from __future__ import annotations

import argparse
import gzip
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/data/files/sets"))

from public_trees import Pixels, colours, normals, opened, put

from mtl.data.files.sets.celeba import ATTRIBUTES


def picture(height: int, width: int, seed: int) -> Pixels:
    """A smooth picture with noise of a few levels, about as large as a photograph when compressed."""
    noise = np.random.default_rng(seed).integers(0, 16, (height, width, 3))
    return (colours(height, width, seed) // 2 + noise).astype(np.uint8)


def mask(height: int, width: int, num: int, seed: int) -> Pixels:
    """Blocks of numbers below `num`."""
    blocks = np.random.default_rng(seed).integers(0, num, (height // 16 + 1, width // 16 + 1))
    return blocks.repeat(16, axis=0).repeat(16, axis=1)[:height, :width].astype(np.uint8)


def nyuv2_mtan(root: Path, num: int) -> None:
    for i in range(num):
        put(root / f"train/image/{i}.npy", picture(288, 384, i) / 255)
        put(root / f"train/label/{i}.npy", mask(288, 384, 14, i).astype(np.float64) - 1)
        put(root / f"train/depth/{i}.npy", np.random.default_rng(i).uniform(1, 10, (288, 384, 1)))
        put(root / f"train/normal/{i}.npy", normals(288, 384, i))


def cityscapes_mtan(root: Path, num: int) -> None:
    for i in range(num):
        put(root / f"train/image/{i}.npy", picture(128, 256, i) / 255)
        put(root / f"train/label_7/{i}.npy", mask(128, 256, 8, i).astype(np.float64) - 1)
        put(root / f"train/depth/{i}.npy", np.random.default_rng(i).uniform(0, 0.5, (128, 256, 1)))


def cityscapes(root: Path, num: int) -> None:
    for i in range(num):
        name = f"train/ulm/ulm_{i:06d}_000019"
        put(root / f"leftImg8bit/{name}_leftImg8bit.png", picture(1024, 2048, i))
        put(root / f"gtFine/{name}_gtFine_labelIds.png", mask(1024, 2048, 34, i))
        put(root / f"disparity/{name}_disparity.png", mask(1024, 2048, 128, i).astype(np.uint16) * 256)


def nyud_mt(root: Path, num: int) -> None:
    put(root / "gt_sets/train.txt", "\n".join(f"{i:04d}" for i in range(num)))
    for i in range(num):
        put(root / f"images/{i:04d}.jpg", picture(480, 640, i))
        put(root / f"segmentation/{i:04d}.png", mask(480, 640, 41, i))
        put(root / f"depth/{i:04d}.npy", np.random.default_rng(i).uniform(1, 10, (480, 640)).astype(np.float32))
        put(root / f"normals/{i:04d}.npy", normals(480, 640, i))
        put(root / f"edge/{i:04d}.npy", mask(480, 640, 2, i).astype(np.float32))


def pascal_mt(root: Path, num: int) -> None:
    put(root / "ImageSets/Context/train.txt", "\n".join(f"2008_{i:06d}" for i in range(num)))
    for i in range(num):
        name = f"2008_{i:06d}"
        put(root / f"JPEGImages/{name}.jpg", picture(375, 500, i))
        put(root / f"semseg/VOC12/{name}.png", mask(375, 500, 21, i))
        put(root / f"sal_distill/{name}.png", mask(375, 500, 256, i))
        put(root / f"prepared/human_parts/{name}.png", mask(375, 500, 7, i))
        put(root / f"prepared/normals/{name}.png", np.round(normals(375, 500, i) * 127 + 127).astype(np.uint8))
        put(root / f"prepared/edges/{name}.png", mask(375, 500, 2, i) * np.uint8(255))


def celeba(root: Path, num: int) -> None:
    names = [f"{i + 1:06d}.jpg" for i in range(num)]
    rows = [f"{name} {' '.join(['-1', ' 1'] * 20)}" for name in names]
    put(root / "Anno/list_attr_celeba.txt", "\n".join([str(num), " ".join(ATTRIBUTES), *rows]))
    put(root / "Eval/list_eval_partition.txt", "\n".join(f"{name} 0" for name in names))
    for i, name in enumerate(names):
        put(root / f"Img/img_align_celeba/{name}", picture(218, 178, i))


def office31(root: Path, num: int) -> None:
    for domain, side in (("amazon", 300), ("dslr", 1000), ("webcam", 420)):
        files = [f"{domain}/images/back_pack/frame_{i:04d}.jpg" for i in range(num)]
        put(root / f"lists/{domain}_train.txt", "\n".join(f"{file} 0" for file in files))
        for i, file in enumerate(files):
            put(root / file, picture(side, side, i))


def office_home(root: Path, num: int) -> None:
    for domain in ("Art", "Clipart", "Product", "Real_World"):
        files = [f"{domain}/Calendar/{i:05d}.jpg" for i in range(num)]
        put(root / f"lists/{domain}_train.txt", "\n".join(f"{file} 0" for file in files))
        for i, file in enumerate(files):
            put(root / file, picture(400, 400, i))


def taskonomy(root: Path, num: int) -> None:
    put(root / "splits_taskonomy/train_val_test_tiny.csv", "id,train,val,test\nhanson,1,0,0")
    for i in range(num):
        name = f"taskonomy/hanson/point_{i}_view_0_domain"
        depth = np.random.default_rng(i).integers(500, 5000, (512, 512)).astype(np.uint16)
        put(root / f"rgb/{name}_rgb.png", picture(512, 512, i))
        put(root / f"segment_semantic/{name}_segmentsemantic.png", mask(512, 512, 18, i))
        put(root / f"depth_zbuffer/{name}_depth_zbuffer.png", depth)
        put(root / f"depth_euclidean/{name}_depth_euclidean.png", depth)
        put(root / f"normal/{name}_normal.png", np.round(normals(512, 512, i) * 127 + 127).astype(np.uint8))


def bdd100k(root: Path, num: int) -> None:
    for i in range(num):
        for subset in ("100k", "10k"):
            put(root / f"images/{subset}/train/{subset}{i}.jpg", picture(720, 1280, i))
            put(root / f"images/{subset}/val/{subset}v{i}.jpg", picture(8, 8, i))
        put(root / f"labels/drivable/masks/train/100k{i}.png", mask(720, 1280, 3, i))
        put(root / f"labels/lane/masks/train/100k{i}.png", mask(720, 1280, 9, i))
        put(root / f"labels/sem_seg/masks/train/10k{i}.png", mask(720, 1280, 19, i))


def multimnist(root: Path, num: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (max(num, 60_000), 28, 28)).astype(np.uint8)
    for name, magic, values in (("images-idx3", 2051, images), ("labels-idx1", 2049, images[:, 0, 0] % 10)):
        content = struct.pack(f">{1 + values.ndim}i", magic, *values.shape) + values.tobytes()
        (root / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(content, compresslevel=1))


SETS: tuple[Callable[[Path, int], None], ...] = (
    *(nyuv2_mtan, cityscapes_mtan, cityscapes, nyud_mt, pascal_mt, celeba, office31, office_home, taskonomy, bdd100k),
    multimnist,
)


def reading(make: Callable[[Path, int], None], num: int) -> str:
    """Makes a tree and reads it twice; the second time counts."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), num)
        data = opened(make.__name__, Path(folder), "train")
        indices = range(min(len(data), 1000))
        _ = [data[index] for index in indices]
        start = time.process_time()
        _ = [data[index] for index in indices]
        rate = len(indices) / (time.process_time() - start)
    return f"{make.__name__:16} {rate:9,.0f} items/s"


def opening(num: int) -> str:
    """Opens NYUv2's tree with images and depth, `num` empty files in all."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("image", "depth"):
            (Path(folder) / "train" / name).mkdir(parents=True)
            for i in range(num // 2):
                (Path(folder) / f"train/{name}/{i}.npy").touch()
        start = time.process_time()
        data = opened("nyuv2_mtan", Path(folder), "train", {"depth": "depth"})
        seconds = time.process_time() - start
        assert len(data) == num // 2
    return f"opening nyuv2_mtan with {num:,} files takes {seconds:.2f} s"


def opening_celeba() -> str:
    """Opens CelebA's lists and folder, with empty files."""
    with tempfile.TemporaryDirectory() as folder:
        celeba(Path(folder), 1)
        num, root = 202_599, Path(folder)
        names = [f"{i + 1:06d}.jpg" for i in range(num)]
        rows = [f"{name} {' '.join(['-1', ' 1'] * 20)}" for name in names]
        put(root / "Anno/list_attr_celeba.txt", "\n".join([str(num), " ".join(ATTRIBUTES), *rows]))
        put(root / "Eval/list_eval_partition.txt", "\n".join(f"{name} 0" for name in names))
        for name in names:
            (root / f"Img/img_align_celeba/{name}").touch()
        start = time.process_time()
        opened("celeba", root, "train", {"attributes": "tags"})
        return f"opening celeba with {num:,} images takes {time.process_time() - start:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=24, help="items of each tree")
    parser.add_argument("--files", type=int, default=100_000, help="files of the tree that is opened; 0 opens none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for make in SETS:
        print(reading(make, arguments.items), flush=True)  # noqa: T201
    if arguments.files:
        print(opening(arguments.files))  # noqa: T201
        print(opening_celeba())  # noqa: T201


if __name__ == "__main__":
    main()
