"""What grows with a run: the step with its tasks, memory with its data.

    python scripts/bench/growth.py tasks [--rounds N] [--steps N] [--most N] [--phases PHASE ...] [--join]
    python scripts/bench/growth.py memory [--num N] [--workers N]

`tasks`: 1, 2, 4, ... linear heads on a resnet18 at 64 pixels, batches of 64, with the trunk frozen (its features kept)
and with everything trained: milliseconds of a step of mtl's loop and of the limit of `mtl bench`, their ratio, and the
ratio of processor time; then of whole epochs. `--join`: with `join_heads`, from two tasks on.

`memory`: `mtl train` for one epoch on N images and on ten times as many, `data.memory_gb` a hundredth of what these
take; images of a table, and generated ones (multifashion). The most memory of the process with its workers: all of it,
and without pages of files.

How many tensors a trunk may have: scripts/bench/audit_cost.py --deep and --small.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from mtl.config import RunConfig
from mtl.results.bench.bench import measured_on
from mtl.results.bench.measure import BY_HAND, BenchRow, measure
from mtl.results.bench.settings import Setting

ROOT = Path(__file__).resolve().parents[2]
SIZE, NUM_CLASSES, MOST_FILES = 64, 10, 500
PHASES = ("trunk_frozen", "nothing_frozen")


@dataclass(frozen=True)
class ManyTasks(Setting):
    """A setting with linear heads of one kind, which learn from one label."""

    num_tasks: int = 1
    joined: bool = False

    def config(self, folder: Path, phase: str) -> RunConfig:
        own = {"type": "classification", "num_classes": NUM_CLASSES, "label": "left"}
        content = super().config(folder, phase).model_dump(exclude_unset=True)
        tasks = {f"task{n}": own for n in range(self.num_tasks)}
        return RunConfig.model_validate(content | {"tasks": tasks, "join_heads": self.joined})


def grow_tasks(rounds: int, num_steps: int, most: int, phases: Sequence[str], joined: bool) -> None:
    titles = ("tasks", "phase", "limit, ms", "mtl, ms", "ratio", "CPU", "epoch", "CPU")
    sys.stdout.write(f"{titles[0]:>5}  {titles[1]:16}{''.join(f'{each:>11}' for each in titles[2:])}\n")
    num_tasks = 2 if joined else 1
    while num_tasks <= most:
        setting = ManyTasks("resnet18", SIZE, 64, num_steps, dense=False, num_tasks=num_tasks, joined=joined)
        for phase in phases:
            with tempfile.TemporaryDirectory() as folder:
                write_tasks(num_tasks, measure(setting, phase, Path(folder), rounds, {"limit": BY_HAND["limit"]}))
        num_tasks *= 2


def write_tasks(num_tasks: int, row: BenchRow) -> None:
    limit, mtl = (1e3 * row.loops[name].median("train_s") / row.num_steps for name in ("limit", "mtl"))
    times = ("train_s", "train_cpu_s", "epoch_s", "epoch_cpu_s")
    ratios = "".join(f"{row.over_limit('mtl', each):11.2f}" for each in times)  # type: ignore[arg-type]
    sys.stdout.write(f"{num_tasks:5}  {row.phase:16}{limit:11.2f}{mtl:11.2f}{ratios}\n")
    sys.stdout.flush()


def grow_data(num: int, workers: int) -> None:
    sys.stdout.write(f"{'data':14}{'images':>8}{'taken, MB':>11}{'memory_gb, MB':>15}{'peak, MB':>10}{'own, MB':>9}\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_table(folder, 10 * num)
        for source in ("table", "multifashion"):
            for images in (num, 10 * num):
                taken = images * SIZE * SIZE * (3 if source == "table" else 1)
                file = write_config(folder, source, images, taken / 100, workers)
                peak, own = peaks(folder, file)
                numbers = f"{images:8}{taken / 1e6:11.1f}{taken / 1e8:15.2f}{peak / 1e6:10.0f}{own / 1e6:9.0f}"
                sys.stdout.write(f"{source:14}{numbers}\n")
                sys.stdout.flush()


def make_table(folder: Path, num: int) -> None:
    """A table of image files; beyond some hundreds, names of the same ones."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    files = [folder / f"images/{number}.jpg" for number in range(num)]
    for number, file in enumerate(files):
        if number < MOST_FILES:
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(file)
        else:
            os.link(files[number % MOST_FILES], file)
    for split, own in (("val", files[::20]), ("train", [file for at, file in enumerate(files) if at % 20])):
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            rows = [(f"images/{file.name}", number % NUM_CLASSES) for number, file in enumerate(own)]
            csv.writer(stream).writerows([("image", "left"), *rows])


def write_config(folder: Path, source: str, images: int, memory: float, workers: int) -> Path:
    data = {"name": source, "image_size": SIZE, "batch_size": 64, "memory_gb": memory / 1e9, "num_workers": workers}
    data |= {"num_train": images * 9 // 10, "num_val": images // 20}
    if source == "table":
        data |= {split: str(folder / f"{split}.csv") for split in ("train", "val")}
    else:
        data |= {"cache_dir": str(folder / "cache")}
    content = {
        "name": f"{source}-{images}",
        "runs_dir": str(folder / "runs"),
        "tracking": {"mode": "disabled"},
        "trunk": {"name": "test_resnet"},
        "memory_format": "contiguous",
        "precision": "fp32",
        "cache": "off",
        "data": data,
        "tasks": {"left": {"type": "classification", "num_classes": NUM_CLASSES}},
        "phases": [{"name": "all", "epochs": 1}],
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def peaks(folder: Path, config: Path) -> tuple[int, int]:
    """The most bytes in memory of a run with its workers: all, and all but pages of files."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mtl", "train", str(config)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        all_most = own_most = 0
        before: set[int] = set()
        while process.poll() is None:
            tree = set(tree_of(process.pid))
            # A child that is about to run a program (git) has, for a moment, all memory of its parent.
            sizes = [size_of(pid) for pid in tree & before]
            all_most = max(all_most, sum(each for each, _ in sizes))
            own_most = max(own_most, sum(each for _, each in sizes))
            before = tree
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit((folder / "log.txt").read_text())
    return all_most, own_most


def tree_of(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for each in found:
        for file in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += map(int, file.read_text().split())
            except OSError:
                continue
    return found


def size_of(pid: int) -> tuple[int, int]:
    """Resident bytes of a process, and those that are no pages of files; what several share is divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.partition(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Pss")}
    return sizes.get("Pss", 0), sizes.get("Pss_Anon", 0) + sizes.get("Pss_Shmem", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    tasks, memory = kinds.add_parser("tasks"), kinds.add_parser("memory")
    tasks.add_argument("--rounds", type=int, default=7)
    tasks.add_argument("--steps", type=int, default=5, help="steps of an epoch where everything is trained")
    tasks.add_argument("--most", type=int, default=32, help="the largest number of tasks")
    tasks.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    tasks.add_argument("--join", action="store_true", help="linear heads as one product")
    memory.add_argument("--num", type=int, default=2000, help="images in the smaller of two runs")
    memory.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    on = measured_on()
    versions = ", ".join(f"{name} {number}" for name, number in on["versions"].items())
    sys.stdout.write(f"{on['processor']}, {on['cores']} cores, {on['threads']} threads; {versions}\n")
    if options.kind == "tasks":
        grow_tasks(options.rounds, options.steps, options.most, options.phases, options.join)
    else:
        grow_data(options.num, options.workers)


if __name__ == "__main__":
    main()
