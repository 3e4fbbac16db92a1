"""`Balance`: the tasks' losses combined to the scalar that is minimised, as the training loop uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.config import SettingError
from mtl.optim.balance.dwa import PartialDwa
from mtl.optim.balance.scalarizers import DWA, FAMO, IMTLL, UW, Constant, Mean, Random, Scalarizer, Sum
from mtl.optim.balance.state import check_same_method
from mtl.optim.balance.stch import LogStch
from mtl.optim.balance.subset import Subset, combine, plain_attributes, update_famo

if TYPE_CHECKING:
    from mtl.optim.balance.gradient_method import GradientMethod

# Linear in the losses: combining micro-batches one by one gives the same sum as combining them at once.
_LINEAR = (Constant, DWA, IMTLL, Mean, Random, Sum, UW)


class Balance(nn.Module):
    """A balancing method as the training loop uses it.

    A task without a label in a step leaves it, as if the method had been made for the others; see docs/mixed_data.md.

    Attributes:
        scalarizer: TorchJD's method; its learned parameters are named `balance.scalarizer.*`.
        param_groups: Parameters that the method steps itself (FAMO), in the form of an optimizer's; the run's optimizer
            must not hold them.
        by_gradients: If given, it makes one gradient of those of what the tasks share, and the scalarizer only computes
            the value of the loss.
        on: Where that method looks: at the gradients of `parameters`, all of the trunk that train; of its `features`;
            or of the trunk's parameters that match a pattern.
        per_sample: Whether gradients of features are compared image by image, or summed over the batch first.
    """

    def __init__(
        self,
        scalarizer: Scalarizer,
        by_gradients: GradientMethod | None = None,
        on: str = "parameters",
        per_sample: bool = False,
    ) -> None:
        super().__init__()
        self.scalarizer = scalarizer
        self.by_gradients = by_gradients
        self.on = on
        self.per_sample = per_sample
        # TorchJD has weights and reference points as plain attributes, which `.to(device)` would not move.
        for name, value in list(vars(scalarizer).items()):
            if isinstance(value, Tensor):
                delattr(scalarizer, name)
                scalarizer.register_buffer(name, value)
        own = list(scalarizer.parameters()) if hasattr(scalarizer, "update") else []
        self.param_groups: list[dict[str, Any]] = [{"params": own}] if own else []

    @property
    def follows_steps(self) -> bool:
        """Whether the method learns from the losses after a step (FAMO)."""
        return hasattr(self.scalarizer, "update")

    @property
    def may_draw(self) -> bool:
        """Whether the method may draw random numbers, as for weights or for the order of tasks."""
        if self.by_gradients is not None or isinstance(self.scalarizer, Random):
            return True
        return type(self.scalarizer).__module__.partition(".")[0] not in ("torchjd", "mtl")

    @property
    def adds_up(self) -> bool:
        """Whether combining several batches' losses one by one gives the step of one large batch."""
        return self.by_gradients is None and isinstance(self.scalarizer, _LINEAR)

    def forward(self, losses: Tensor, subset: Subset | None = None) -> Tensor:
        """Args:
            losses: "t", the tasks' losses in the order of the configuration.
            subset: The tasks whose losses they are, if not all have labels: the others leave the step, and what the
                method has learned of them stays.

        Returns:
            The loss to minimise, a scalar.

        Raises:
            SettingError: TorchJD's method is not defined for these losses.
        """
        try:
            if subset is None:
                total: Tensor = self.scalarizer(losses)
                return total
            if isinstance(self.scalarizer, PartialDwa | LogStch):
                return self.scalarizer.combine(losses, subset)
            return combine(self.scalarizer, losses, subset)
        except ValueError as error:
            # TorchJD says which losses its methods are defined for.
            if not type(self.scalarizer).__module__.startswith("torchjd."):
                raise
            raise SettingError("balance.method", str(error)) from error

    def after_step(self, losses: Tensor, subset: Subset | None = None) -> None:
        """Passes the losses after a step to a method that follows steps.

        Only FAMO takes those of some tasks; a method of the user's own is left as it was.

        As in FAMO's own code, they come from another forward in train mode, in which running statistics of trainable
        BatchNorm layers move once more.

        Args:
            losses: "t", of the same batch, without a graph.
            subset: As for `forward`.
        """
        scalarizer: Any = self.scalarizer
        if subset is None:
            scalarizer.update(losses)
        elif isinstance(scalarizer, FAMO):
            update_famo(scalarizer, losses, subset)

    def after_epoch(self) -> None:
        """Ends a pass over the data (DWA compares passes)."""
        step: Any = getattr(self.scalarizer, "step", None)
        if step is not None:
            step()

    def state(self) -> dict[str, Any]:
        """The method's state outside its parameters and buffers, which its `state_dict` lacks: losses of earlier passes
        (DWA), its own optimizer (FAMO).
        """
        # A freeze replaces `train` by an instance attribute.
        own = {name: value for name, value in plain_attributes(self.scalarizer).items() if name != "train"}
        weighting = {} if self.by_gradients is None else {"weighting": self.by_gradients.state()}
        return weighting | {
            name: {"optimizer": type(value).__name__, "state": value.state_dict()}
            if isinstance(value, Optimizer)
            else value
            for name, value in own.items()
        }

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores the state of the same method.

        Args:
            state: From `state`.
            device: The device of the losses.

        Raises:
            ValueError: It is the state of another method.
        """
        check_same_method(self.state(), state)
        for name, value in state.items():
            if name == "weighting" and self.by_gradients is not None:
                self.by_gradients.load_state(value)
            elif isinstance(value, Mapping) and "optimizer" in value:
                # The method creates its optimizer at its first step; the settings are part of the optimizer's state.
                kind: Any = getattr(torch.optim, value["optimizer"])
                optimizer = kind(list(self.scalarizer.parameters()))
                optimizer.load_state_dict(dict(value["state"]))
                setattr(self.scalarizer, name, optimizer)
            else:
                setattr(self.scalarizer, name, _on(device, value))

    def after_phase(self) -> None:
        """Ends a phase: an unfinished pass does not count in the next phase (DWA)."""
        if isinstance(self.scalarizer, LogStch):
            self.scalarizer.drop_pass()
        # TorchJD's `reset` would drop the earlier passes as well.
        dwa: Any = self.scalarizer
        if getattr(dwa, "_loss_sum", None) is not None:
            dwa._loss_sum, dwa._n_batches = None, 0


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [_on(device, each) for each in value] if isinstance(value, list | tuple) else value
