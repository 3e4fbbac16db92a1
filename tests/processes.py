"""Scripts that tests run in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_in_two_processes(script: str, folder: Path) -> None:
    """Runs a script under torchrun, on this machine's loopback; it is given the folder."""
    file = folder / "fsdp.py"
    file.write_text(script)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    subprocess.run(
        [sys.executable, *launch, str(file), str(folder)],
        check=True,
        timeout=240,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
