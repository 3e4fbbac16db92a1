"""Images a second of an exported ONNX file in ONNX Runtime, against the model in torch, on one thread each.

    mtl export runs/scenes --format onnx --out exports/onnx
    python scripts/bench/export_speed.py runs/scenes exports/onnx/model.onnx --batch-size 16

Both in one process, in turns, by processor time; the medians, and the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch

import mtl


def seconds(act: Callable[[], object]) -> float:
    begin = time.process_time()
    act()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("file", type=Path, help="exported with --input uint8")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = mtl.load(options.run_dir, which="best")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(options.file, settings, providers=["CPUExecutionProvider"])
    shape = (options.batch_size, model.network.channels, *model.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)

    def in_torch() -> None:
        with torch.inference_mode():
            model(images)

    def in_onnxruntime() -> None:
        session.run(None, {"images": images.numpy()})

    for act in (in_torch, in_onnxruntime):
        act()
    rounds = [(seconds(in_torch), seconds(in_onnxruntime)) for _ in range(options.rounds)]
    names = ("torch", "onnxruntime")
    medians = {name: statistics.median(each) for name, each in zip(names, zip(*rounds, strict=True), strict=True)}
    speeds = ", ".join(f"{name} {options.batch_size / each:,.0f}" for name, each in medians.items())
    ratio = statistics.median(first / second for first, second in rounds)
    sys.stdout.write(f"images a second: {speeds}; onnxruntime / torch {ratio:.2f}\n")


if __name__ == "__main__":
    main()
