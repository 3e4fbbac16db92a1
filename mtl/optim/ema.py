"""An exponential moving average of the trainable parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mtl.runtime.tensors import by_sharding


class Ema:
    """Averages the trainable parameters of one phase.

    Frozen parameters are not averaged: their bits stay those that the audit has fingerprinted. The average of a
    parameter that stays trainable continues in the next phase; that of a thawed one starts from its current value.
    """

    def __init__(self, decay: float) -> None:
        """Args:
        decay: The share of the old average in the new one, per step.
        """
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._parameters: dict[str, nn.Parameter] = {}
        self._averages: dict[str, Tensor] = {}

    def follow(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Averages these parameters from now on, by name, and no others.

        A parameter that is averaged no longer is set to its average: the value that was validated, which is now frozen.
        """
        for name in self._parameters.keys() - parameters.keys():
            with torch.no_grad():
                self._parameters[name].copy_(self._averages[name])
        known = self._averages
        self._parameters = dict(parameters)
        self._averages = {n: known[n] if n in known else p.detach().clone() for n, p in parameters.items()}

    def update(self) -> None:
        """Updates the averages after one optimizer step."""
        averages, parameters = [self._averages[name] for name in self._parameters], list(self._parameters.values())
        for places in by_sharding(parameters):
            self._average([averages[place] for place in places], [parameters[place] for place in places], 0)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Swaps the averages into the parameters, for validation or a checkpoint, and back afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def averages(self) -> dict[str, Tensor]:
        """The averages by name; while they are swapped in, the trained values."""
        return dict(self._averages)

    def load(self, parameters: Mapping[str, nn.Parameter], averages: Mapping[str, Tensor]) -> None:
        """Averages these parameters, by name, starting from saved averages."""
        self._parameters = dict(parameters)
        self._averages = {name: averages[name].clone() for name in parameters}

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            value = parameter.detach().clone()
            parameter.copy_(self._averages[name])
            self._averages[name].copy_(value)
