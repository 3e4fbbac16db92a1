"""Trains all that docs/results.md compares, and writes the page: some 25 minutes on two cores.

python scripts/results.py --out FOLDER                              # train; killed, the same command continues
python scripts/results.py --out FOLDER --write docs/results.md      # and write the page
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from mtl.results.comparison.collect import Comparison, collect
from mtl.results.comparison.design import design
from mtl.results.comparison.table import markdown

NUM_SEEDS = 3
# By hand, of the tables of 2026-11-27: read them again when they are made again.
READING = """**What freezing bought.** At equal training time (39 s) every schedule that freezes beats training
everything from the first step: `val/score` 0.456 for all trained, 0.477 alternating, 0.493 probe then
tune, 0.509 with the trunk frozen throughout, 0.525 unfrozen step by step. The frozen trunk is computed
once, so that the heads take five times as many steps.

**What it cost.** The trunk that stays frozen loses the task that needs new features: 0.09 of accuracy in `object`
against all trained. Gradual unfreezing is the only schedule here that gains in all four tasks.

**What balancing bought.** Little. On MultiFashion all methods are 3 to 4 % below single-task models, at 60 % of
their time. `pcgrad` and `gradnorm` gain 0.006 and 0.007 of `val/score` over the plain sum; `nashmtl` and `gradnorm`
move accuracy from one task to the other; `uw` changes nothing. On scenes `imtlg` is the only one above single-task
models (+1.9 %), with an interval of its gain over the sum that includes 0. Three seeds separate large differences
only."""
SMALL_FASHION = {"num_train": 4000, "num_val": 1000}
SMALL_SCENES = {"image_size": 64, "num_train": 600, "num_val": 150}
FASHION = {
    "_base_": "multifashion",
    "trunk": {"name": "test_resnet"},
    "data": SMALL_FASHION,
    "phases": [{"name": "all", "epochs": 6, "lr": 2.0e-3}],
}
HEADS = {"freeze": ["trunk"], "lr": {"heads": 3.0e-3, "balance": 2.0e-2}}
TUNED = {"lr": {"trunk": 1.0e-3, "heads": 2.0e-3, "balance": 2.0e-2}}
TRUNK_ALONE = {"trunk": 1.0e-3, "balance": 2.0e-2}
SCENES = {"_base_": "scenes", "data": SMALL_SCENES, "depthwise": "torch", "optim": {"lr_schedule": "constant"}}
WARM = {"name": "warm-heads", **HEADS, "epochs": 2}


@dataclass(frozen=True)
class Part:
    """A comparison of the page.

    Attributes:
        title: Its heading.
        about: What is compared.
        configs: By name, what each is based on and differs in.
        arguments: Of `mtl compare`.
    """

    title: str
    about: str
    configs: dict[str, dict[str, object]]
    arguments: tuple[str, ...] = ()

    @property
    def by_time(self) -> bool:
        return "time" in self.arguments


def balanced(base: dict[str, object], methods: Sequence[str]) -> dict[str, dict[str, object]]:
    return {method: base | {"balance": method} for method in methods}


PARTS = {
    "fashion-balance": Part(
        "Balancing on MultiFashion",
        "Two tasks compete for timm's `test_resnet` from scratch (half a million parameters), all of which trains:"
        " 4,000 images, 6 epochs.",
        balanced(FASHION, ["sum", "uw", "pcgrad", "nashmtl", "gradnorm"]),
        ("--stl",),
    ),
    "scenes-balance": Part(
        "Balancing on scenes",
        "Four tasks of unlike scale and a trunk trained on ImageNet, heads first: 600 rooms of 64 pixels.",
        balanced(SCENES | {"phases": [WARM, {"name": "all", **TUNED, "epochs": 2}]}, ["sum", "uw", "imtlg"]),
        ("--stl",),
    ),
    "scenes-schedules": Part(
        "Schedules on scenes at equal training time",
        "The same data and losses (`uw`), the same rates, and five ways to freeze, each at its last validation within"
        " the shortest of their times.",
        {
            "all-trained": SCENES | {"phases": [{"name": "all", **TUNED, "epochs": 4}]},
            "frozen": SCENES | {"phases": [{"name": "heads", **HEADS, "epochs": 16}]},
            "probe-then-tune": SCENES
            | {"phases": [{"name": "probe", **HEADS, "epochs": 5}, {"name": "all", **TUNED, "epochs": 3}]},
            "gradual": SCENES
            | {
                "phases": [
                    {"name": "heads", **HEADS, "epochs": 3},
                    {"name": "upper-quarter", **TUNED, "freeze": ["trunk@first:75%"], "epochs": 2},
                    {"name": "upper-half", **TUNED, "freeze": ["trunk@first:50%"], "epochs": 2},
                    {"name": "all", **TUNED, "epochs": 1},
                ]
            },
            "alternate": SCENES
            | {
                "phases": [
                    {
                        "repeat": 3,
                        "phases": [
                            {"name": "heads", **HEADS, "epochs": 2},
                            {"name": "trunk", "freeze": ["heads"], "lr": TRUNK_ALONE, "epochs": 1},
                        ],
                    }
                ]
            },
        },
        ("--equal", "time"),
    ),
}


def write_configs(folder: Path, part: Part) -> list[Path]:
    """Files of the configurations; a file that is there already is left as it is, since runs resume by it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.yaml" for name in part.configs]
    for file, content in zip(files, part.configs.values(), strict=True):
        text = yaml.safe_dump(content, sort_keys=False)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
    return files


def train(out: Path, name: str, part: Part, jobs: int) -> None:
    files = write_configs(out / "configs" / name, part)
    command = [sys.executable, "-m", "mtl", "compare", *map(str, files), "--out", str(out / name)]
    command += ["--seeds", str(NUM_SEEDS), "--jobs", str(jobs), *part.arguments]
    subprocess.run([*command, "--set", "tracking.mode=disabled"], check=True)


def read(out: Path, name: str, part: Part) -> Comparison:
    files = write_configs(out / "configs" / name, part)
    with_single = "--stl" in part.arguments
    plan = design(files, ["tracking.mode=disabled"], NUM_SEEDS, [], with_single, out / name)
    return collect(out / name, plan, part.by_time)


def page(out: Path, jobs: int) -> str:
    found = {name: read(out, name, part) for name, part in PARTS.items()}
    hours = sum(run.train_s for each in found.values() for run in each.every) / 3600
    lines = [
        "# Results",
        "",
        "What balancing and freezing bought, and what they cost, on data that comes with mtl. Written by",
        "",
        "    python scripts/results.py --out FOLDER --write docs/results.md",
        "",
        f"on {os.cpu_count()} cores of a CPU ({torch.backends.cpu.get_cpu_capability()}), {jobs} runs at a time with"
        f" one thread each, {hours:.1f} hours of training in all, {NUM_SEEDS} seeds. The sets and the runs are small,"
        " so that anyone can repeat them: what holds here need not hold on large ones. Nothing was tuned: all"
        " configurations of a part have the same learning rates. Other work on the machine makes times uncertain by"
        " some ten percent.",
        "",
        READING,
    ]
    for name, part in PARTS.items():
        lines += ["", f"## {part.title}", "", part.about, "", markdown(found[name]).strip()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where runs go")
    parser.add_argument("--only", choices=PARTS, action="append", help="train these parts; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--write", type=Path, help="the page, written if all parts are trained")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in options.only or PARTS:
        train(options.out, name, PARTS[name], options.jobs)
    if options.write is not None:
        options.write.write_text(page(options.out, options.jobs), encoding="utf-8")


if __name__ == "__main__":
    main()
