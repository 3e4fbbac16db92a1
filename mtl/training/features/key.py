"""The key of kept activations: everything that they depend on."""

from __future__ import annotations

from typing import Any

import timm
import torch

from mtl.audit import PhaseRecord, fingerprint
from mtl.model.prefix import Prefix
from mtl.runtime.fingerprint import root
from mtl.training.setup import RunSetup


def feature_key(
    setup: RunSetup, prefix: Prefix, record: PhaseRecord, num_views: int, batch_size: int
) -> dict[str, Any]:
    """All that kept activations depend on but the images, as JSON.

    Args:
        setup: The run.
        prefix: The part of the trunk that is computed once.
        record: The audit's record of the phase, with the fingerprints of its frozen tensors.
        num_views: Views of each training image that are kept.
        batch_size: Images in one batch; in another batch size, a kernel may add up in another order.
    """
    config, augment = setup.config, setup.config.data.augment
    frozen = {name: digest for name, digest in record.fingerprints.items() if name.startswith("trunk.")}
    return {
        "frozen": root(frozen),
        "trunk": config.trunk.model_dump(exclude={"weights", "checkpointing"}),
        "modules": prefix.modules,
        "kept": [[list(shape), str(dtype)] for shape, dtype in zip(prefix.shapes, prefix.dtypes, strict=True)],
        "levels": setup.model.levels,
        "normalize": [fingerprint(buffer) for buffer in setup.model.normalize.buffers()],
        "computed": [setup.device.type, config.precision, config.memory_format, batch_size],
        "stored": config.cache.dtype,
        "views": [augment and augment.model_dump(), config.seed, num_views] if config.data.has_views else None,
        # On a CPU, kernels and their sums depend on these.
        "kernels": [torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()],
        "versions": [torch.__version__, timm.__version__],
    }
