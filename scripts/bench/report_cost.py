"""Seconds that the report of a finished run takes beyond imports and set-up, and its bytes.

    python scripts/bench/report_cost.py runs/scenes

The page is written into a temporary folder; the run stays as it is.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from mtl.config import load_config
from mtl.results.report.write import write_report
from mtl.training.data_record import search_as_the_run_did
from mtl.training.setup import assemble


def main() -> None:
    run_dir = Path(sys.argv[1])
    search_as_the_run_did(run_dir)
    config = load_config(run_dir / "config.yaml", ["trunk.weights=none", "device=auto"])
    setup = assemble(config, quiet=True, teachers_from=run_dir / "checkpoints/last")
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            started = time.perf_counter()
            page = write_report(setup, run_dir, file=Path(folder) / "report.html")
            seconds = time.perf_counter() - started
            sys.stdout.write(f"{seconds:.2f} s, {page.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
