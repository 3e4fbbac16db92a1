"""Options by which a balancing method is known, where papers and libraries differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl.config import SettingError

# By method and preset. `paper`: what the paper's own experiments or code have; `libmtl`, `torchjd`, `samsung`: the
# defaults there. What a library leaves to the user, or takes from the model's optimizer or the data, is left out.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "cagrad": {
        # arXiv 2110.14048, NYUv2; the authors' code divides by 1 + c^2.
        "paper": {"c": 0.4, "rescale": True},
        "libmtl": {"c": 0.5, "rescale": True},
        # TorchJD has no default for c.
        "torchjd": {"rescale": False},
    },
    # arXiv 2308.12029.
    "dbmtl": {"libmtl": {"beta": 0.9, "sigma": 0.0}},
    "excessmtl": {
        # Appendix C.1 warms up for three epochs, whose length depends on the data: `n_warmup_steps`.
        "libmtl": {"robust_step_size": 0.01, "n_warmup_steps": 1},
        "torchjd": {"robust_step_size": 1.0, "n_warmup_steps": 0},
    },
    "famo": {
        # The authors' code on NYUv2 and CelebA, where gamma is the weight decay; on Cityscapes it is 0.01.
        "paper": {"lr": 0.025, "weight_decay": 0.001},
        "libmtl": {"lr": 0.025, "weight_decay": 0.001},
        "torchjd": {"lr": 0.025, "weight_decay": 0.001},
    },
    "gradnorm": {
        # The first losses are the mean of a whole pass: `warmup_steps`; weights have the model's learning rate: `lr`.
        "libmtl": {"alpha": 1.5},
        # SamsungLabs' MTL: the first losses are those of the first batch; the learning rate is the model's.
        "samsung": {"alpha": 2.0, "warmup_steps": 1},
    },
    # LibMTL's own run on NYUv2 has beta 0.99 and 0 for both sigmas.
    "moco": {"libmtl": {"beta": 0.5, "beta_sigma": 0.5, "gamma": 0.1, "gamma_sigma": 0.5, "rho": 0.0}},
    "modo": {"libmtl": {"gamma": 0.001, "rho": 0.1}, "torchjd": {"gamma": 0.1, "rho": 0.1}},
    "mgda": {
        "libmtl": {"normalize": "none", "apply": "normalized"},
        "torchjd": {},
    },
    "stch": {
        "libmtl": {"log": True, "mu": 1.0, "warmup_epochs": 4},
        # TorchJD has no default for mu.
        "torchjd": {"log": False},
    },
}


def with_preset(method: str, preset: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options, those of a preset where they are not given.

    Raises:
        SettingError: The method has no such preset.
    """
    if preset is None:
        return dict(options)
    known = PRESETS.get(method, {})
    if preset not in known:
        there = f"{method} has the presets {', '.join(known)}" if known else f"{method} has none"
        raise SettingError("balance.preset", f"{there}; got {preset}")
    return {**known[preset], **options}
