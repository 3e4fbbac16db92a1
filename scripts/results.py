"""Trains all that docs/results.md compares, and writes the page: some 30 minutes on two cores.

python scripts/results.py --out FOLDER                              # train; killed, the same command continues
python scripts/results.py --out FOLDER --write docs/results.md      # and write the page
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from mtl.results.comparison.collect import Comparison, Method, collect, mean_values
from mtl.results.comparison.design import SINGLE_TASK, design
from mtl.results.comparison.statistics import paired
from mtl.results.comparison.table import columns, markdown
from mtl.runtime.machine import machine

NUM_SEEDS = 3
MACHINE = "machine.json"
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
        balanced(SCENES | {"phases": [WARM, {"name": "all", **TUNED, "epochs": 2}]}, ["sum", "uw", "imtlg", "dbmtl"]),
        ("--stl",),
    ),
    "scenes-schedules": Part(
        "Schedules on scenes in about the same training time",
        "The same data and losses (`uw`), the same rates, and five ways to freeze. Each is as long as makes it take"
        " about the time of four epochs in which everything trains; none is cut.",
        {
            "all-trained": SCENES | {"phases": [{"name": "all", **TUNED, "epochs": 4}]},
            "frozen": SCENES | {"phases": [{"name": "heads", **HEADS, "epochs": 18}]},
            "probe-then-tune": SCENES
            | {"phases": [{"name": "probe", **HEADS, "epochs": 4}, {"name": "all", **TUNED, "epochs": 3}]},
            "gradual": SCENES
            | {
                "phases": [
                    {"name": "heads", **HEADS, "epochs": 2},
                    {"name": "upper-quarter", **TUNED, "freeze": ["trunk@first:75%"], "epochs": 1},
                    {"name": "upper-half", **TUNED, "freeze": ["trunk@first:50%"], "epochs": 1},
                    {"name": "all", **TUNED, "epochs": 2},
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


def about_machine() -> str:
    """Cores and processor of this machine, in words."""
    found = machine()
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{found['cores'] or os.cpu_count()} cores of {found['processor'] or 'an unknown processor'} ({kind})"


def read(out: Path, name: str, part: Part) -> Comparison:
    files = write_configs(out / "configs" / name, part)
    plan = design(files, ["tracking.mode=disabled"], NUM_SEEDS, [], "--stl" in part.arguments, out / name)
    return collect(out / name, plan)


def seconds(method: Method) -> float:
    return sum(run.train_s for run in method.runs) / len(method.runs)


def score(method: Method) -> float:
    return sum(run.score for run in method.runs) / len(method.runs)


def on_schedules(found: Comparison) -> list[str]:
    """What freezing bought and cost, from the numbers of its table."""
    first, *others = found.methods
    ranked = sorted(found.methods, key=score, reverse=True)
    clear = [
        f"`{method.name}` ({gain.mean:+.3f})"
        for method in others
        if (gain := paired([run.score for run in method.runs], [run.score for run in first.runs])).low > 0
    ]
    base, lost = mean_values(first.runs, found.metrics), []
    for method in others:
        own = mean_values(method.runs, found.metrics)
        for metric in columns(found):
            change = own[metric.task, metric.name] - base[metric.task, metric.name]
            if change and (change < 0) == metric.is_higher:
                lost.append(f"`{method.name}` {metric.task} {metric.name} {change:+.3f}")
    times = [seconds(method) for method in found.methods]
    return [
        f"**What freezing bought.** In {min(times):.0f} to {max(times):.0f} s of training, `val/score` came to"
        f" {', '.join(f'{score(method):.3f} ({method.name})' for method in ranked)}. Better than `{first.name}`"
        f" with every seed and an interval above 0: {', '.join(clear) or 'none'}.",
        f"**What it cost.** Worse in a task's main metric than `{first.name}`, in the mean over seeds:"
        f" {'; '.join(lost) or 'none'}.",
    ]


def on_balancing(title: str, found: Comparison) -> str:
    """What balancing bought, from the numbers of its table."""
    single = next(method for method in found.methods if method.name == SINGLE_TASK)
    joint = [method for method in found.methods if method is not single]
    reference, *others = joint
    shares = [seconds(method) / seconds(single) for method in joint]
    gains = []
    for method in others:
        gain = paired([run.score for run in method.runs], [run.score for run in reference.runs])
        is_clear = gain.low > 0 or gain.high < 0
        gains.append(f"`{method.name}` {gain.mean:+.3f}{'' if is_clear else ' (the interval includes 0)'}")
    known = [method for method in joint if math.isfinite(method.delta.per_task)]
    deltas = ", ".join(f"`{method.name}` {method.delta.per_task:+.1f} %" for method in known)
    return (
        f"**{title}.** Against single-task models, the mean gain in the main metrics is {deltas}, in"
        f" {min(shares):.2f} to {max(shares):.2f} of their training time."
        f" `val/score` against `{reference.name}`: {', '.join(gains)}."
    )


def page(out: Path) -> str:
    found = {name: read(out, name, part) for name, part in PARTS.items()}
    known = json.loads((out / MACHINE).read_text())
    hours = sum(run.train_s for each in found.values() for run in each.every) / 3600
    lines = [
        "# Results",
        "",
        "What balancing and freezing bought, and what they cost, on data that comes with mtl. Written, all numbers in"
        " sentences too, by",
        "",
        "    python scripts/results.py --out FOLDER --write docs/results.md",
        "",
        f"on {known['machine']}, {known['jobs']} runs at a time with one thread each, {hours:.1f} hours of training in"
        f" all, {NUM_SEEDS} seeds. The sets and the runs are small, so that anyone can repeat them: what holds here"
        " need not hold on large ones. Nothing was tuned: all configurations of a part have the same learning rates."
        " Other work on the machine makes times uncertain, by up to a half: see their spread. Three seeds separate"
        " large differences only, and their intervals are narrower than 95 % would be.",
        "",
    ]
    reading = on_schedules(found["scenes-schedules"])
    reading += [on_balancing(part.title, found[name]) for name, part in PARTS.items() if "--stl" in part.arguments]
    for text in reading:
        lines += [text, ""]
    for name, part in PARTS.items():
        lines += [f"## {part.title}", "", part.about, "", markdown(found[name]).strip(), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where runs go")
    parser.add_argument("--only", choices=PARTS, action="append", help="train these parts; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--write", type=Path, help="the page, written if all parts are trained")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / MACHINE).exists():
        (options.out / MACHINE).write_text(json.dumps({"machine": about_machine(), "jobs": options.jobs}))
    for name in options.only or PARTS:
        train(options.out, name, PARTS[name], options.jobs)
    if options.write is not None:
        options.write.write_text(page(options.out), encoding="utf-8")


if __name__ == "__main__":
    main()
