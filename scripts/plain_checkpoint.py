"""Makes a plain checkpoint of one that several processes wrote in shards (`distributed.checkpoint: dcp`).

    python scripts/plain_checkpoint.py runs/NAME/checkpoints/best FOLDER

FOLDER is new; `resume=FOLDER` continues from it, and `trunk.weights=FOLDER/model.safetensors` begins with its trunk.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mtl.checkpoint.files import CheckpointError
from mtl.checkpoint.sharded import write_plain

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a folder with state.json and shards")
    parser.add_argument("folder", type=Path, help="where the plain one goes; must not be there")
    options = parser.parse_args()
    try:
        write_plain(options.checkpoint, options.folder)
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
