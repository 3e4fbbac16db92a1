"""How long mtl takes to start: help and a plan, next to the imports below them, in turn, each in a process of its own.

python scripts/bench/start_time.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

PLAN = ["plan", "configs/scenes.yaml"]
COMMANDS = {
    "mtl --help": ["-m", "mtl", "--help"],
    "import torch": ["-c", "import torch"],
    "import torch, timm": ["-c", "import torch, timm"],
    "mtl plan configs/scenes.yaml": ["-m", "mtl", *PLAN],
    # TorchJD imports it wherever it is installed, as with the extra `balance`.
    "the same, without cvxpy": ["-c", f"import sys; sys.modules['cvxpy'] = None; import mtl.cli; mtl.cli.main({PLAN})"],
}


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Wall time and processor time of a Python."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="processes for each, after one that is not counted")
    rounds = parser.parse_args().rounds
    found = [{name: seconds(arguments) for name, arguments in COMMANDS.items()} for _ in range(rounds + 1)][1:]
    sys.stdout.write(f"{'':30}{'wall, s':>10}{'cpu, s':>10}\n")
    for name in COMMANDS:
        wall, cpu = (statistics.median(row[name][place] for row in found) for place in (0, 1))
        sys.stdout.write(f"{name:30}{wall:10.3f}{cpu:10.3f}\n")


if __name__ == "__main__":
    main()
