"""MoDo and SDMGrad: weights from the products of gradients of batches that are independent of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torchjd.aggregation import MoDoWeighting, SDMGradWeighting

from mtl.optim.balance.gradient_method import Combined, GradientMethod, TaskGradients
from mtl.optim.balance.subset import narrowed
from mtl.optim.balance.torchjd_state import restore_state, state_of


class IndependentBatches(GradientMethod):
    """TorchJD's `MoDoWeighting` or `SDMGradWeighting`, of J_1 J_2^T, where J_i are the rows of batch i of a step.

    Sources: Chen et al., "Three-Way Trade-Off in Multi-Objective Learning" (JMLR 2024), of whose two variants this is
    the one with two batches: the shared parameters get the weighted mean of both (equation 2.9b). Xiao et al.,
    "Direction-oriented Multi-objective Learning" (NeurIPS 2023, arXiv 2305.18409): three batches, the third of which
    gives the gradient that is weighed.

    The batches are those of an accumulated step. The last step of an epoch may have fewer: it uses the last weights.
    """

    def __init__(self, weighting: MoDoWeighting | SDMGradWeighting, num_tasks: int) -> None:
        self._weighting = weighting
        self.num_batches = 3 if isinstance(weighting, SDMGradWeighting) else 2
        # A first step of some of the tasks begins with the weights of all.
        products: Any = torch.zeros(num_tasks, num_tasks)
        weighting._ensure_state(products)
        self._last = torch.full((num_tasks,), 1 / num_tasks)

    @property
    def name(self) -> str:
        return type(self._weighting).__name__.removesuffix("Weighting")

    def _combine(self, gradients: TaskGradients) -> Combined:
        tasks, batches = gradients.tasks, gradients.batches
        if len(batches) < self.num_batches:
            weights = self._last[list(tasks.places)]
            return Combined(weights=weights / weights.sum())
        products = gradients.products_of(*batches[:2]).cpu().float()
        with narrowed(self._weighting, tasks):
            if len(products) < tasks.size:
                self._normalise()
            weights = self._weighting(products).detach()
        self._last = self._last.index_copy(0, torch.tensor(tasks.places), weights)
        if self.num_batches == 3:
            return Combined(gradient=weights.to(batches[2]) @ batches[2])
        return Combined(weights=weights)

    def _normalise(self) -> None:
        """Weights of some of the tasks have a sum of 1 as well."""
        name = "_w" if isinstance(self._weighting, SDMGradWeighting) else "_lambda"
        weights = getattr(self._weighting, name)
        total = weights.sum()
        setattr(self._weighting, name, weights / total if total > 0 else torch.full_like(weights, 1 / len(weights)))

    def state(self) -> dict[str, Any]:
        return {"weighting": state_of(self._weighting), "last": self._last}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        restore_state(self._weighting, state["weighting"])
        self._last = state["last"].cpu()
