"""Small finished runs that tests of trained models share; they must not be written to."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from mtl.training.run import train
from runs import tiny_parts

SIZE = (24, 40)  # height and width of the images in the table
NUM = 27
CLASSES, TAGS = ("ant", "bee", "cat"), ("big", "red")

EVERY_TYPE: dict[str, Any] = {
    "kind": {"type": "classification"},
    "stage": {"type": "ordinal", "num_classes": 4},
    "tags": {"type": "multilabel"},
    "age": {"type": "regression", "scale": 10.0},
    "pose": {"type": "regression", "num_outputs": 2},
    "parts": {"type": "segmentation", "num_classes": 5},
    "depth": {"type": "depth"},
    "bins": {"type": "depth", "label": "depth", "space": "bins", "min": 0.5, "max": 9.0, "num_bins": 8},
    "normals": {"type": "normals"},
    "edges": {"type": "edges"},
    "joints": {"type": "keypoints", "num_points": 2},
    "teacher": {"type": "distill", "teacher": {"name": "test_vit", "weights": "none"}},
}


def tiny_run(folder: Path) -> Path:
    """A run on rooms: segmentation, depth, normals, object."""
    return train(tiny_parts(folder), quiet=True).run_dir


def write_table(folder: Path, num: int = NUM) -> Path:
    """Writes pictures with random labels of all kinds, and returns the table."""
    random = np.random.default_rng(0)
    for name in ("image", "parts", "depth", "normals", "edges"):
        (folder / name).mkdir(parents=True)
    rows = []
    for number in range(num):
        files = {
            "image": random.integers(0, 256, (*SIZE, 3), np.uint8),
            "parts": random.integers(0, 5, SIZE, np.uint8),
            "depth": random.integers(500, 9000, SIZE).astype(np.uint16),
            "normals": random.integers(0, 256, (*SIZE, 3), np.uint8),
            "edges": random.integers(0, 2, SIZE, np.uint8),
        }
        for name, pixels in files.items():
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
        points = random.uniform(0, SIZE[0], (2, 2)).round(2)
        rows.append(
            {name: f"{name}/{number}.png" for name in files}
            | {
                "kind": CLASSES[number % 3],
                "stage": number % 4,
                "tags": ";".join(tag for place, tag in enumerate(TAGS) if number >> place & 1) or ";",
                "age": number / 2,
                "pose": f"{number};{-number}",
                "joints": ";".join(f"{x},{y},2" for x, y in points),
                "split": ("train", "val", "test")[number // 3 % 3],
            }
        )
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "table.csv"


def table_settings(table: Path) -> dict[str, Any]:
    """The `data` of a configuration that reads such a table."""
    return {
        "name": "table",
        "train": str(table),
        "split": {"by": "column"},
        "scale": {"depth": 0.001},
        "image_size": [32, 48],
        "batch_size": 4,
    }


def every_type_config(folder: Path) -> Path:
    """The configuration of a run with every task type, next to its data."""
    table = write_table(folder / "data")
    config = {
        "name": "every",
        "runs_dir": str(folder / "runs"),
        "trunk": {"name": "test_resnet"},
        "data": table_settings(table),
        "tasks": EVERY_TYPE,
        "tracking": {"mode": "disabled"},
        "phases": [{"name": "all", "steps": 2, "lr": 1e-3}],
    }
    file = folder / "every.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file
