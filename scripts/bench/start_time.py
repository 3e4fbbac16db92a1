"""How long mtl takes to start: help, a plan and training up to its first step, next to the imports below them.

    python scripts/bench/start_time.py [--rounds 7] [--config configs/scenes.yaml]

In turn, each in a process of its own; medians. The data of the configuration has to be in the data cache; kept
features are computed in the first step itself, which is not in it.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time

# Ends the process where the first step would begin.
UNTIL_FIRST_STEP = """
import os, sys
from importlib.machinery import PathFinder
class Watch:
    def find_spec(self, name, path, target=None):
        if name != "mtl.training.loop":
            return None
        spec = PathFinder.find_spec(name, path, target)
        own = spec.loader.exec_module
        def load(module):
            own(module)
            module.Trainer.train_step = lambda *_: os._exit(0)
        spec.loader.exec_module = load
        return spec
sys.meta_path.insert(0, Watch())
from mtl.cli import main
main(sys.argv[1:])
"""


def commands(config: str, folder: str) -> dict[str, list[str]]:
    """The processes by name."""
    train = ["-c", UNTIL_FIRST_STEP, "train", config, "--quiet", f"runs_dir={folder}"]
    return {
        "mtl --help": ["-m", "mtl", "--help"],
        "import torch": ["-c", "import torch"],
        "import torch, timm": ["-c", "import torch, timm"],
        "import mtl.model": ["-c", "import mtl.model"],
        "import mtl.phases.plan": ["-c", "import mtl.phases.plan"],
        f"mtl plan {config}": ["-m", "mtl", "plan", config],
        "mtl train, to the first step": train,
        "the same, without wandb": [*train, "tracking.backend=none"],
    }


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Wall time and processor time of a Python."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="processes for each, after one that is not counted")
    parser.add_argument("--config", default="configs/scenes.yaml", help="what is planned and trained")
    options = parser.parse_args()
    found: list[dict[str, tuple[float, float]]] = []
    for _ in range(options.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            every = commands(options.config, folder)
            row = {}
            for number, (name, arguments) in enumerate(every.items()):
                more = [f"name=start-{number}"] if "train" in arguments else []
                row[name] = seconds([*arguments, *more])
            found.append(row)
    sys.stdout.write(f"{'':34}{'wall, s':>10}{'cpu, s':>10}\n")
    for name in found[0]:
        wall, cpu = (statistics.median(row[name][place] for row in found[1:] or found) for place in (0, 1))
        sys.stdout.write(f"{name:34}{wall:10.3f}{cpu:10.3f}\n")


if __name__ == "__main__":
    main()
