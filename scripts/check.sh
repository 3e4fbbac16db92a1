#!/usr/bin/env bash
# Formatting, lint and types: what CI runs. `--fix` formats and mends what can be mended by itself.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment weights,dev torch timm torchjd wandb ruff mypy

cd "$PROJECT"
if [ "${1:-}" = "--fix" ]; then
    "$PYTHON" -m ruff check --fix mtl tests scripts
    "$PYTHON" -m ruff format mtl tests scripts
else
    "$PYTHON" -m ruff check mtl tests scripts
    "$PYTHON" -m ruff format --check mtl tests scripts
fi
"$PYTHON" -m mypy
