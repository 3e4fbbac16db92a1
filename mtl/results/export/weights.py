"""`timm` and `safetensors`: the weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mtl.checkpoint.tensor_file import TensorFileError, read_safetensors
from mtl.model.build import trunk_options
from mtl.model.trunk import in_eval_mode, read_features
from mtl.results.export.errors import ExportError
from mtl.results.export.parity import Check, check_parity, reference_outputs
from mtl.results.export.parts import exportable, feature_names
from mtl.results.export.subject import ExportedForm, Subject
from mtl.runtime.files import sync

TRUNK_FILE, WEIGHTS_FILE = "trunk.safetensors", "model.safetensors"


def export_timm(subject: Subject, folder: Path) -> ExportedForm:
    """Writes the trunk's weights under timm's own names, as `timm.create_model(..., checkpoint_path=...)` loads them.

    Raises:
        ExportError: timm does not load them, or what it loads gives other features than the run's trunk.
    """
    network, file = subject.network, folder / TRUNK_FILE
    _save(network.trunk.state_dict(), file, subject.metadata())
    trunk = subject.model.config.trunk
    channels = {} if network.channels == 3 else {"in_chans": network.channels}
    options = {"num_classes": 0, **channels, **trunk_options(trunk, network.image_size)}
    try:
        loaded: nn.Module = timm.create_model(trunk.name, checkpoint_path=str(file), **options)
    except RuntimeError as error:
        raise ExportError(f"timm does not load the weights of {trunk.name}: {error}") from error
    loaded.to(memory_format=network.memory_format)
    written = "".join(f"{key}={value!r}, " for key, value in options.items())
    call = f"timm.create_model({trunk.name!r}, {written}checkpoint_path={TRUNK_FILE!r})"
    images = subject.images.images
    checks = [_same_features(subject, loaded, images[:num]) for num in (len(images), 1)]
    return ExportedForm(checks, call=call)


def _same_features(subject: Subject, loaded: nn.Module, images: Tensor) -> Check:
    """Compares all features that heads can read: maps, tokens and the pooled vector."""
    network, size = subject.network, subject.size
    features = []
    with torch.no_grad():
        prepared = network.prepare(images.permute(0, 2, 3, 1))
        for trunk in (loaded, network.trunk):
            with in_eval_mode(trunk):
                found = read_features(trunk, prepared, network.levels, pooled=True, tokens=True)
            features.append(dict(zip(feature_names(found), found.tensors(), strict=True)))
    return check_parity(features[0], features[1], size)


def export_safetensors(subject: Subject, folder: Path) -> ExportedForm:
    """Writes all parameters and buffers of the trunk and of the chosen heads under mtl's names.

    Raises:
        ExportError: The file cannot be read back, or a model that is filled from it gives other outputs.
    """
    own, file = exportable(subject.network, subject.tasks), folder / WEIGHTS_FILE
    _save(own.state_dict(), file, subject.metadata())
    # Nothing of what it had may be left in the copy that is filled from the file.
    blank = {name: torch.zeros_like(tensor) for name, tensor in own.state_dict().items()}
    own.load_state_dict(blank)
    try:
        written, _ = read_safetensors(file)
    except TensorFileError as error:
        raise ExportError(f"{file.name}, which was just written, cannot be read: {error}") from error
    own.load_state_dict(written)
    own.memory_format = subject.network.memory_format
    own.to(memory_format=own.memory_format)
    images = subject.images.images
    checks = [
        check_parity(reference_outputs(own, some, subject.tasks), subject.reference(some), subject.size)
        for some in (images, images[:1])
    ]
    return ExportedForm(checks)


def _save(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Each tensor by itself: the format has no tied ones."""
    apart = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(apart, file, {"format": "pt", **metadata})
    sync(file)
