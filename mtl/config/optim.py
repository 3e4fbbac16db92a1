"""The `optim` and `balance` components: optimizer, rates, decay, and how the tasks' losses are balanced."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.types import Count, NotNegative, NotNegativeByPattern, Positive, PositiveByPattern, Strict
from mtl.runtime.best import Direction


def word_for(key: str) -> BeforeValidator:
    """`optimizer: sgd` is short for `optimizer: {name: sgd}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class BalanceConfig(Strict):
    """How the tasks' losses become one.

    Attributes:
        method: A scalarizer of TorchJD by name, such as `uw`, `dwa`, `famo`, `mean`; one of its aggregators that weigh
            the tasks' gradients on the trunk, such as `mgda`, `upgrad`, `pcgrad`, `cagrad`; or `fixed`.
        weights: For `fixed`: the weight of every active task.
        options: Passed to the scalarizer or aggregator.
    """

    method: str = "mean"
    weights: dict[str, NotNegative] | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _weights_go_with_fixed(self) -> BalanceConfig:
        if (self.method == "fixed") != (self.weights is not None):
            raise PydanticCustomError("balance", "Input should have weights exactly if the method is 'fixed'")
        if self.method == "fixed" and self.options:
            raise PydanticCustomError(
                "balance", "Input should have options only for a method of TorchJD, not for 'fixed'"
            )
        return self


class OptimizerConfig(Strict):
    """The optimizer.

    Attributes:
        name: An optimizer of torch, such as `sgd`, `adam`, `adamw`; or your own, as `package.module:Name`.
        options: Passed to it, such as `momentum`; rates and decay have keys of their own.
    """

    name: str = "adamw"
    options: dict[str, Any] = {}


class _WithWarmup(Strict):
    """Attributes:
    warmup_steps: Steps in which the rate rises linearly to its peak; the schedule proper covers the steps after them.
    """

    warmup_steps: Annotated[int, Field(ge=0)] = 0


class ConstantConfig(_WithWarmup):
    """Stays at the peak."""

    name: Literal["constant"]


class CosineConfig(_WithWarmup):
    """Falls from the peak to 0 over the phase, along half a cosine (Loshchilov and Hutter, arXiv 1608.03983)."""

    name: Literal["cosine"]


class LinearConfig(_WithWarmup):
    """Falls linearly from the peak to 0 over the phase."""

    name: Literal["linear"]


class StepConfig(_WithWarmup):
    """Falls by a factor every few epochs.

    Attributes:
        every_epochs: After how many epochs.
        factor: By which the rate is multiplied.
    """

    name: Literal["step"]
    every_epochs: Count
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1


class PlateauConfig(_WithWarmup):
    """Falls by a factor when a metric has had no new best for some epochs.

    Attributes:
        metric: The metric.
        direction: Which values are better; need not be given for `val/score` and the tasks' main metrics.
        patience: For how many epochs in a row.
        min_delta: By how much a value has to beat the best one.
        factor: By which the rate is multiplied.
    """

    name: Literal["plateau"]
    metric: str = "val/score"
    direction: Direction | None = None
    patience: Count = 2
    min_delta: NotNegative = 0.0
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1


class OneCycleConfig(Strict):
    """Up from a 25th of the peak over 30 % of the phase, then down to 0 (Smith and Topin, arXiv 1708.07120)."""

    name: Literal["one-cycle"]


LrScheduleConfig = Annotated[
    ConstantConfig | CosineConfig | LinearConfig | StepConfig | PlateauConfig | OneCycleConfig,
    Field(discriminator="name"),
    word_for("name"),
]


class OptimConfig(Strict):
    """How parameters are stepped; a phase may set its own `optimizer`, rates, decay and schedule.

    Attributes:
        optimizer: The optimizer: a name, or name and options.
        lr: Peak learning rate, or pattern -> rate.
        lr_scale: Multiplies every peak rate of every phase, including that of a balancing method's weights; not a rate
            among a method's own options (`famo`).
        layer_decay: The trunk's rates shrink by this factor from one depth group to the one below it; the topmost group
            already has the factor once (BEiT, arXiv 2106.08254).
        weight_decay: Decay of weights, or pattern -> decay. Biases, norms, other vectors, and parameters that the trunk
            itself excludes (position embeddings) are never decayed.
        lr_schedule: The learning-rate schedule of one phase: `constant`, `cosine`, `linear`, `step`, `plateau` or
            `one-cycle`.
        clip_norm: The norm over all trainable parameters to which larger gradients are scaled down.
        accumulate: Batches whose gradients are averaged into one step.
        ema_decay: If given, exponential moving averages of the trainable parameters are validated and saved in place of
            the parameters; each step keeps this share of the average.
    """

    optimizer: Annotated[OptimizerConfig, word_for("name")] = OptimizerConfig()
    lr: PositiveByPattern = 1e-3
    lr_scale: Positive = 1.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    weight_decay: NotNegativeByPattern = 0.05
    lr_schedule: LrScheduleConfig = OneCycleConfig(name="one-cycle")
    clip_norm: Positive | None = None
    accumulate: Count = 1
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
