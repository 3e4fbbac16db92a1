"""MGDA on gradients that were divided by norms, losses or both."""

from __future__ import annotations

import torch
from torchjd.aggregation import MGDAWeighting

from mtl.optim.balance.gradient_method import Combined, GradientMethod, TaskGradients

NORMALIZERS = ("none", "l2", "loss", "loss+")


class NormalizedMgda(GradientMethod):
    """Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization" (NeurIPS 2018, arXiv 1810.04650).

    The weights are TorchJD's MGDA, of gradients g_i that were divided: by |g_i| (`l2`), L_i (`loss`), or L_i |g_i|
    (`loss+`), the normalisations of the authors' code. They weigh the gradients as they are (`apply: raw`), or the
    divided ones (`apply: normalized`), which is what LibMTL does on parameters. Losses by which they are divided have
    to be 0 or more.
    """

    def __init__(
        self, normalize: str = "none", apply: str = "raw", epsilon: float = 0.001, max_iters: int = 100
    ) -> None:
        """Args:
        normalize: By what gradients are divided: `none`, `l2`, `loss` or `loss+`.
        apply: Which gradients are weighed: `raw` or `normalized`.
        epsilon: TorchJD's.
        max_iters: TorchJD's.

        Raises:
            ValueError: An option is none of its choices.
        """
        if normalize not in NORMALIZERS or apply not in ("raw", "normalized"):
            raise ValueError(
                f"expected normalize: {', '.join(NORMALIZERS)} and apply: raw, normalized; got {normalize} and {apply}"
            )
        self.normalize = normalize
        self.needs_positive_losses = normalize in ("loss", "loss+")
        self.apply = apply
        self._weighting = MGDAWeighting(epsilon, max_iters)

    def _combine(self, gradients: TaskGradients) -> Combined:
        products = gradients.products
        losses = gradients.losses.to(products)
        norms = products.diagonal().sqrt()
        one = torch.ones_like(norms)
        divisor = {"none": one, "l2": norms, "loss": losses, "loss+": losses * norms}[self.normalize]
        weights = self._weighting(products / (divisor[:, None] * divisor)).to(divisor)
        return Combined(weights=(weights if self.apply == "raw" else weights / divisor).float())
