"""Predictions a second from JPEG files, against the network alone on images that are in memory already.

    python scripts/bench/predictions.py runs/scenes --size 178 218 --num 256

Both in one process, in turns; the median of the ratios of neighbours. Written maps are not part of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mtl


def seconds(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=(178, 218), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--num", type=int, default=256, help="images")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    loaded = seconds(lambda: mtl.load(options.run_dir, device=options.device))
    again = seconds(lambda: mtl.load(options.run_dir, device=options.device))
    sys.stdout.write(f"mtl.load: {loaded:.2f} s with imports, {again:.2f} s without\n")
    model = mtl.load(options.run_dir, device=options.device)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.jpg" for number in range(options.num)]
        for file in files:
            small = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
            small.resize((options.size[1], options.size[0]), Image.Resampling.BICUBIC).save(file, quality=90)
        shape = (options.batch_size, *model.image_size, model.channels)
        batch = torch.randint(0, 256, shape, dtype=torch.uint8, device=options.device)

        def bare() -> None:
            with torch.inference_mode(), model.autocast:
                for _ in range(-(-options.num // options.batch_size)):
                    outputs = model.network(batch)
                next(iter(outputs.values())).sum().item()

        def whole() -> None:
            model.predict(files, batch_size=options.batch_size)

        bare(), whole()
        pairs = [(seconds(bare), seconds(whole)) for _ in range(options.rounds)]
    alone, both = (options.num / statistics.median(each) for each in zip(*pairs, strict=True))
    ratio = statistics.median(first / second for first, second in pairs)
    sys.stdout.write(f"network alone {alone:.0f} img/s, files to predictions {both:.0f} img/s, ratio {ratio:.2f}\n")


if __name__ == "__main__":
    main()
