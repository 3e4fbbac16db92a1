"""ConFIG: the direction in which all tasks' gradients have the same share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.optim.balance.gradient_method import Combined, GradientMethod, TaskGradients
from mtl.optim.balance.subset import entry_for_each

# That of the gradients, which are float32.
EPS = float(torch.finfo(torch.float32).eps)


class ConFig(GradientMethod):
    """Liu et al., "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks" (arXiv 2408.11104).

    With u_i = g_i / |g_i|, the rows of U, and preferences p_i: the direction is d = U^+ p / |U^+ p|, and the shared
    parameters get (sum_i g_i . d) d (equation 2). As U^+ p = U^T (U U^T)^+ p, that is a sum of the g_i with weights
    which the Gramian gives; so it is computed here, in float64.

    TorchJD's `ConFIG` and the authors' own code take the pseudo-inverse of U itself, whose small singular values torch
    drops: those below max(t, n) eps of the largest, for t tasks and n entries. In float32 that bound grows beyond 1 at
    8.4 million entries, from where on the gradient is zero; before, directions that gradients do not share are lost.
    Here the bound is t eps.
    """

    def __init__(self, num_tasks: int, pref_vector: Sequence[float] | None = None) -> None:
        """Args:
        num_tasks: The number of tasks.
        pref_vector: How large a share of each task's gradient is, up to a common factor; equal shares if not given.

        Raises:
            ValueError: It does not have an entry for each task.
        """
        shares = [1.0] * num_tasks if pref_vector is None else pref_vector
        self._shares = entry_for_each("pref_vector", shares, num_tasks).double()

    def _combine(self, gradients: TaskGradients) -> Combined:
        products = gradients.products
        direction = weights_of_shares(products, self._shares[list(gradients.tasks.places)])
        return Combined(weights=((products @ direction).sum() * direction).float())


def weights_of_shares(products: Tensor, shares: Tensor) -> Tensor:
    """Weights of gradients whose sum is of length 1, and has products with the unit gradients in given proportions.

    Args:
        products: The Gramian of the gradients, "t t", float64; none of them is zero.
        shares: The proportions, "t", float64.

    Returns:
        "t", float64; zeros where no direction has these shares.
    """
    norms = products.diagonal().sqrt()
    cosines = products / (norms[:, None] * norms)
    # Its eigenvalues are the squares of the singular values of the unit gradients.
    smallest = (len(norms) * EPS) ** 2
    found = torch.linalg.pinv(cosines, rtol=smallest, hermitian=True) @ shares
    length = (found @ cosines @ found).clamp(min=0).sqrt()
    # What rounding leaves where nothing has these shares is no direction.
    least = len(norms) * EPS * shares.norm()
    return torch.where(length > least, found / length, 0.0) / norms
