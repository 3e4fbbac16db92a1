"""The learning-rate schedule of one phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypedDict

from torch.optim import Optimizer

from mtl.config import SettingError
from mtl.config.optim import (
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    LrScheduleConfig,
    OneCycleConfig,
    OwnLrScheduleConfig,
    PlateauConfig,
    SlantedTriangleConfig,
    StepConfig,
)
from mtl.config.own import make_own, own_class
from mtl.runtime.best import Best, BestState, Direction
from mtl.runtime.plugin import where_it_failed

_BuiltIn = (
    ConstantConfig | CosineConfig | LinearConfig | StepConfig | PlateauConfig | OneCycleConfig | SlantedTriangleConfig
)

# One-cycle (Smith and Topin, arXiv 1708.07120): up from a 25th of the peak, then down to 0, each along half a cosine.
_WARM_UP_SHARE, _START_FACTOR = 0.3, 0.04


class LrScheduleState(TypedDict):
    """An `LrSchedule` as plain data: steps done, factor of all plateaus so far, best value of the plateau's metric."""

    step: int
    scale: float
    best: BestState


class LrSchedule:
    """Sets the rate of each of an optimizer's groups before each step: the group's peak times one factor for all.

    Call `step` after each of the optimizer's, and `epoch_done` after each validation.
    """

    def __init__(
        self,
        config: LrScheduleConfig,
        optimizer: Optimizer,
        num_steps: int,
        steps_per_epoch: int,
        direction: Direction = "higher",
    ) -> None:
        """Args:
        config: Which schedule.
        optimizer: The optimizer, its groups at their peak rates.
        num_steps: The most steps of the phase; a schedule that falls to 0 is at 0 after them.
        steps_per_epoch: Steps in one pass over the data.
        direction: Which values of the metric of `plateau` are better.
        """
        self._config = config
        self._share = share_of(config)
        self._optimizer = optimizer
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._num_steps = num_steps
        self._steps_per_epoch = steps_per_epoch
        self._step = 0
        self._scale = 1.0
        self._best = Best(direction, config.min_delta if isinstance(config, PlateauConfig) else 0.0)
        self._set()

    def step(self) -> None:
        """Counts one optimizer step and sets the rates of the next."""
        self._step += 1
        self._set()

    def epoch_done(self, metrics: Mapping[str, float]) -> None:
        """Counts one pass over the training data, with the metrics of its validation; may lower the rates (plateau)."""
        config = self._config
        if not isinstance(config, PlateauConfig) or self._best.update(metrics[config.metric]):
            return
        if self._best.num_since >= config.patience:
            self._scale *= config.factor
            self._best.num_since = 0
            self._set()

    @property
    def rates(self) -> list[float]:
        """The rate of each of the optimizer's groups in the next step."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def state_dict(self) -> LrScheduleState:
        return LrScheduleState(step=self._step, scale=self._scale, best=self._best.state_dict())

    def load_state_dict(self, state: LrScheduleState) -> None:
        self._step, self._scale = state["step"], state["scale"]
        self._best.load_state_dict(state["best"])
        self._set()

    def _set(self) -> None:
        factor = self._scale * self._share(self._step, self._num_steps, self._steps_per_epoch)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor


# Step, from 0, length of the phase in steps, and steps in one pass over the data -> share of the peak rate.
Share = Callable[[int, int, int], float]


def share_of(config: LrScheduleConfig) -> Share:
    """A schedule as a function of the step.

    Raises:
        SettingError: A class of the user's own cannot be had, or does not take its options.
    """
    if isinstance(config, OwnLrScheduleConfig):
        kind = own_class(config.name, "lr_schedule.name")
        own: Share = make_own(kind, config.options, "lr_schedule.options", config.name)
        return own
    return partial(factor_at, config)


def try_out_schedule(config: LrScheduleConfig, num_steps: int, steps_per_epoch: int) -> None:
    """Asks a schedule of the user's own for its first and its last share.

    Raises:
        SettingError: It cannot be made or called, or gives no share: a finite number that is not negative.
    """
    share = share_of(config)
    if not isinstance(config, OwnLrScheduleConfig):
        return
    for step in (0, num_steps - 1):
        try:
            found = float(share(step, num_steps, steps_per_epoch))
        except Exception as error:  # the user's code may raise anything
            raise SettingError("lr_schedule.name", f"{config.name}, step {step}: {where_it_failed(error)}") from error
        if not 0 <= found < math.inf:
            message = f"{config.name} gave {found} at step {step}; expected the share of the peak rate, 0 or more"
            raise SettingError("lr_schedule.name", message)


def factor_at(config: _BuiltIn, step: int, num_steps: int, steps_per_epoch: int) -> float:
    """The share of the peak rate that a step uses.

    Args:
        config: Which schedule; the factor of a `plateau` is not included.
        step: The step, from 0.
        num_steps: Length of the phase in steps.
        steps_per_epoch: Steps in one pass over the data.
    """
    if isinstance(config, OneCycleConfig):
        return _one_cycle(step, num_steps)
    if isinstance(config, SlantedTriangleConfig):
        return _slanted_triangle(step, num_steps, config.cut_frac, config.ratio)
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    share = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    match config:
        case CosineConfig():
            return _half_cosine(1.0, 0.0, share)
        case LinearConfig():
            return 1.0 - share
        case StepConfig():
            return config.factor ** (step // steps_per_epoch // config.every_epochs)
        case ConstantConfig() | PlateauConfig():
            return 1.0


def _one_cycle(step: int, num_steps: int) -> float:
    if step >= num_steps:
        return 0.0
    peak = max(1, round(_WARM_UP_SHARE * num_steps))
    if step < peak:
        return _half_cosine(_START_FACTOR, 1.0, step / peak)
    return _half_cosine(1.0, 0.0, (step - peak) / max(1, num_steps - peak))


def _slanted_triangle(step: int, num_steps: int, cut_frac: float, ratio: float) -> float:
    """ULMFiT's equation 3 (arXiv 1801.06146).

    Where `cut_frac` of the steps is no whole number, the paper's line, whose slope follows from a rounded `cut`, falls
    too early to its lowest rate, and then below 0: here it falls until the end of the phase. At least one step rises.
    """
    if step >= num_steps:
        return 1 / ratio
    cut = max(1, math.floor(num_steps * cut_frac))
    height = step / cut if step < cut else 1 - (step - cut) / (num_steps - cut)
    return (1 + height * (ratio - 1)) / ratio


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, share))) / 2
