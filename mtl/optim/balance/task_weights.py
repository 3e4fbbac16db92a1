"""The base of a balancing method of one's own that weighs the tasks by their losses and gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtl.optim.balance.gradient_method import Combined, GradientMethod, TaskGradients


class TaskWeights(GradientMethod):
    """A balancing method of one's own: one function from losses and gradients to weights.

    Its plain attributes are its state, which checkpoints hold. It is not called where fewer than two tasks have a
    gradient; in a step of which some tasks have none, it is called for the others.

    Attributes:
        weighs_heads: Whether the weights apply to the gradients of the heads too, as factors of the losses do.
    """

    weighs_heads: bool = False
    needs_whole_rows = True

    @abstractmethod
    def weights(self, losses: Tensor, rows: Tensor) -> Tensor:
        """The tasks' weights.

        Args:
            losses: "t", float32, in the order of the configuration.
            rows: "t p", float32, on the device: the tasks' gradients on what they share; `rows @ rows.T` is their
                Gramian.

        Returns:
            "t".
        """

    def _combine(self, gradients: TaskGradients) -> Combined:
        weights = self.weights(gradients.losses, gradients.rows).detach()
        if weights.shape != gradients.losses.shape:
            raise ValueError(f"gave weights of shape {tuple(weights.shape)} for {len(gradients.losses)} tasks")
        return Combined(weights=weights, head_weights=weights if self.weighs_heads else None)

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        vars(self).update(state)
