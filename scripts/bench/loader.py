"""Images a second of a table of JPEGs, next to decoding alone: both by two processes of torch's DataLoader, in turn.

python scripts/bench/loader.py                       # 178 x 218 pixels, as CelebA's, resized to 64
python scripts/bench/loader.py --num 4000 --workers 2 --rounds 7
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mtl.config import load_config
from mtl.data import Loading, Split, SplitWorkers, training_batches
from mtl.data.generated import scenes
from mtl.data.generated.sprites import load_sprites
from mtl.training.setup import assemble

BATCH = 64


class Decoded(Dataset[int]):
    """JPEGs decoded by torchvision and dropped: what no reader of images can do without."""

    def __init__(self, folder: Path, num: int) -> None:
        self._files = [str(folder / f"{number}.jpg") for number in range(num)]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> int:
        from torchvision.io import decode_jpeg, read_file

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(decode_jpeg(read_file(self._files[index])).shape[1])


def write_table(folder: Path, num: int) -> None:
    """Rendered rooms as JPEGs of 178 x 218 pixels, each of them in many files, and a table of them."""
    rooms = scenes.render_block(load_sprites("train"), 224, 0, 0)["images"]
    rows = [["image", "kind"]]
    for number in range(num):
        Image.fromarray(rooms[number % len(rooms)][:218, :178]).save(folder / f"{number}.jpg", quality=90)
        rows.append([f"{number}.jpg", f"class {number % 10}"])
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def split_of(folder: Path) -> Split:
    """The table as a run has it, read batch by batch."""
    config = {
        "name": "loader",
        "trunk": {"name": "test_resnet"},
        "data": {
            "name": "table",
            "train": str(folder / "table.csv"),
            "val": str(folder / "table.csv"),
            "batch_size": BATCH,
            "memory_gb": 0.0,
            "num_val": BATCH,
        },
        "tasks": {"kind": {"type": "classification"}},
        "phases": [{"name": "a", "epochs": 1}],
    }
    (folder / "loader.yaml").write_text(yaml.safe_dump(config))
    return assemble(load_config(folder / "loader.yaml"), quiet=True).train


def ours(split: Split, workers: SplitWorkers) -> Iterator[int]:
    """An epoch of batches, as training gets them."""
    for batch in training_batches(split, BATCH, 0, 0, loading=Loading(True, workers=workers)):
        yield len(batch.images)


def decoding(folder: Path, num: int, workers: int) -> Iterator[int]:
    """The same number of images, decoded alone."""
    for batch in DataLoader(Decoded(folder, num), BATCH, num_workers=workers, multiprocessing_context="fork"):
        yield len(batch)


def rate(make: Callable[[], Iterator[int]]) -> float:
    """Images a second, with the start of processes that do not stay."""
    started = time.perf_counter()
    return sum(make()) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=3000, help="images of an epoch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table(folder, options.num)
        split = split_of(folder)
        workers = SplitWorkers(options.workers, [split])
        rates = []
        with workers.stay():
            rate(lambda: ours(split, workers))
            for _ in range(options.rounds):
                staying = rate(lambda: ours(split, workers))
                again = rate(lambda: ours(split, SplitWorkers(options.workers)))
                rates.append((staying, again, rate(lambda: decoding(folder, options.num, options.workers))))
    staying, again, alone = (statistics.median(column) for column in zip(*rates, strict=True))
    print(f"table of JPEGs, processes that stay: {staying:,.0f} images/s; started every epoch: {again:,.0f}")  # noqa: T201
    ratio = statistics.median(own / other for own, _, other in rates)
    print(f"decode_jpeg alone, started every epoch: {alone:,.0f} images/s; ratio {ratio:.2f}")  # noqa: T201


if __name__ == "__main__":
    main()
