"""An exponential moving average of the parameters that train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mtl.runtime.tensors import by_sharding


class Ema:
    """Follows the parameters of one phase.

    What is frozen is no longer averaged: its bits stay those that the audit has seen. The average of a parameter that
    goes on training goes on with it; that of one that is thawed begins with its value then.
    """

    def __init__(self, decay: float) -> None:
        """Args:
        decay: The share of the average that one step leaves as it is.
        """
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._parameters: dict[str, nn.Parameter] = {}
        self._averages: dict[str, Tensor] = {}

    def follow(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Follows these parameters from now on, by name, and no others.

        One that is followed no longer takes its average: that is what was judged, and is from now on frozen.
        """
        for name in self._parameters.keys() - parameters.keys():
            with torch.no_grad():
                self._parameters[name].copy_(self._averages[name])
        known = self._averages
        self._parameters = dict(parameters)
        self._averages = {n: known[n] if n in known else p.detach().clone() for n, p in parameters.items()}

    def update(self) -> None:
        """Takes note of one optimizer step."""
        averages, parameters = [self._averages[name] for name in self._parameters], list(self._parameters.values())
        for places in by_sharding(parameters):
            self._average([averages[place] for place in places], [parameters[place] for place in places], 0)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Puts the averages in the parameters' place, to be judged or kept, and the parameters back afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def averages(self) -> dict[str, Tensor]:
        """The averages by name; while they are swapped in, the parameters as they train."""
        return dict(self._averages)

    def load(self, parameters: Mapping[str, nn.Parameter], averages: Mapping[str, Tensor]) -> None:
        """Follows these parameters, by name, with saved averages of them."""
        self._parameters = dict(parameters)
        self._averages = {name: averages[name].clone() for name in parameters}

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            value = parameter.detach().clone()
            parameter.copy_(self._averages[name])
            self._averages[name].copy_(value)
