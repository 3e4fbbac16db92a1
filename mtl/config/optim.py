"""The `optim` and `balance` components: optimizer, rates, decay, and how the tasks' losses are balanced."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.own import OWN, chosen_by
from mtl.config.types import Count, NotNegative, NotNegativeByPattern, Positive, PositiveByPattern, Strict
from mtl.runtime.best import Direction


def word_for(key: str) -> BeforeValidator:
    """`optimizer: sgd` is short for `optimizer: {name: sgd}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class LayerConfig(Strict):
    """Where a balancing method looks at the tasks' gradients: at some parameters of the trunk.

    Attributes:
        layer: A pattern, such as `trunk.blocks.6`, of parameters that the phase trains.
    """

    layer: str


BalanceOn = Annotated[
    Annotated[Literal["parameters", "features"], Tag("word")] | Annotated[LayerConfig, Tag("layer")],
    Discriminator(lambda value: "layer" if isinstance(value, dict | LayerConfig) else "word"),
]


class BalanceConfig(Strict):
    """How the tasks' losses become one.

    Attributes:
        method: A scalarizer of TorchJD by name, such as `uw`, `dwa`, `famo`, `mean`; or `si`, the sum of the losses'
            logarithms; or a method that looks at the tasks' gradients, such as `mgda`, `upgrad`, `pcgrad`, `nashmtl`,
            `gradnorm`; or `fixed`; or your own as `package.module:Name`, see docs/own_balancing.md. All of them, and
            where each works: docs/balancing.md.
        weights: The weight of every active task, one of them above 0. Required by `fixed`, refused by other methods.
        options: Passed to the method. Refused with `fixed`.
        preset: Options of the `paper`, of `libmtl`, `torchjd` or `samsung` where they differ; `options` go before them.
        on: The gradients that a method looks at: those of all `parameters` of the trunk that train; of the trunk's
            `features`, for one backward through the trunk in place of one a task; or of a layer, as `{layer: PATTERN}`.
        per_sample: Whether gradients of features are compared image by image, as one long vector; if not, they are
            summed over the images of a batch first. Read with `on: features` only.
    """

    method: str = "mean"
    weights: dict[str, NotNegative] | None = None
    options: dict[str, Any] = {}
    preset: Literal["paper", "libmtl", "torchjd", "samsung"] | None = None
    on: BalanceOn = "parameters"
    per_sample: bool = False

    @model_validator(mode="after")
    def _settings_go_together(self) -> BalanceConfig:
        if (self.method == "fixed") != (self.weights is not None):
            raise PydanticCustomError("balance", "Input should have weights exactly if the method is 'fixed'")
        if self.method == "fixed" and (self.options or self.preset):
            raise PydanticCustomError(
                "balance", "Input should have options or a preset only for other methods than 'fixed'"
            )
        if self.per_sample and self.on != "features":
            raise PydanticCustomError("balance", "Input should have per_sample only with on: features")
        return self


class OptimizerConfig(Strict):
    """An optimizer and its options.

    Attributes:
        name: An optimizer of torch, such as `sgd`, `adam`, `adamw`; or your own, as `package.module:Name`.
        options: Passed to the optimizer, such as `{momentum: 0.9}`. `lr`, `weight_decay` and `params` are refused here:
            learning rate and decay have keys of their own.
    """

    name: str = "adamw"
    options: dict[str, Any] = {}


class _WithWarmup(Strict):
    """A learning-rate schedule that may begin with a warm-up.

    Attributes:
        name: The schedule.
        warmup_steps: Steps in which the rate rises linearly to its peak, before the rest of the schedule.
    """

    warmup_steps: Annotated[int, Field(ge=0)] = 0


class ConstantConfig(_WithWarmup):
    """The rate stays at its peak."""

    name: Literal["constant"]


class CosineConfig(_WithWarmup):
    """The rate falls from its peak to 0 over the phase on half a cosine (Loshchilov and Hutter, arXiv 1608.03983)."""

    name: Literal["cosine"]


class LinearConfig(_WithWarmup):
    """The rate falls from its peak to 0 over the phase, linearly."""

    name: Literal["linear"]


class StepConfig(_WithWarmup):
    """The rate is multiplied by a factor every few epochs.

    Attributes:
        every_epochs: After how many epochs each time.
        factor: The factor.
    """

    name: Literal["step"]
    every_epochs: Count
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1


class PlateauConfig(_WithWarmup):
    """The rate is multiplied by a factor whenever a metric has had no new best for some epochs.

    Attributes:
        metric: The metric, by its path in docs/metrics.md.
        direction: Which values are better. Required only for a metric of your own whose class does not say so.
        patience: Epochs in a row without a new best.
        min_delta: The margin by which a value has to beat the best one.
        factor: The factor.
    """

    name: Literal["plateau"]
    metric: str = "val/score"
    direction: Direction | None = None
    patience: Count = 2
    min_delta: NotNegative = 0.0
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1


class OneCycleConfig(Strict):
    """The rate rises from a 25th of its peak for 30 % of the phase, then falls to 0 (Smith, Topin, arXiv 1708.07120).

    Attributes:
        name: The schedule. It takes no `warmup_steps`: it has a warm-up of its own.
    """

    name: Literal["one-cycle"]


class SlantedTriangleConfig(Strict):
    """The rate rises linearly from a fraction of its peak, then falls back to it over the rest of the phase.

    Source: ULMFiT (Howard and Ruder, arXiv 1801.06146, equation 3), with the paper's numbers.

    Attributes:
        name: The schedule. It takes no `warmup_steps`: it has a warm-up of its own.
        cut_frac: The share of the phase's steps in which the rate rises; in whole steps, one at least.
        ratio: How many times the lowest rate the peak is.
    """

    name: Literal["slanted-triangle"]
    cut_frac: Annotated[float, Field(gt=0, lt=1)] = 0.1
    ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 32.0


class OwnLrScheduleConfig(Strict):
    """A schedule of your own; see docs/own_lr_schedule.md.

    Attributes:
        name: Its class, as `package.module:Name`.
        options: Passed to the class.
    """

    name: str
    options: dict[str, Any] = {}


LrScheduleConfig = Annotated[
    Annotated[ConstantConfig, Tag("constant")]
    | Annotated[CosineConfig, Tag("cosine")]
    | Annotated[LinearConfig, Tag("linear")]
    | Annotated[StepConfig, Tag("step")]
    | Annotated[PlateauConfig, Tag("plateau")]
    | Annotated[OneCycleConfig, Tag("one-cycle")]
    | Annotated[SlantedTriangleConfig, Tag("slanted-triangle")]
    | Annotated[OwnLrScheduleConfig, Tag(OWN)],
    chosen_by("name", stand_in="constant"),
    word_for("name"),
]


class OptimConfig(Strict):
    """How parameters are stepped.

    A phase may set its own `optimizer`, `lr`, `layer_decay`, `weight_decay` and `lr_schedule`.

    Attributes:
        optimizer: The optimizer, by name or with options.
        lr: Peak learning rate: one for all trainable parameters, or by pattern. The last pattern that matches a
            parameter decides, and every trainable parameter has to be matched.
        lr_scale: A factor for every peak learning rate of every phase, that of a balancing method's weights too; not
            for a rate among a method's own options (`famo`).
        layer_decay: The trunk's learning rates are multiplied by this factor once per depth group from the output to
            the input; the topmost group already has the factor once (BEiT, arXiv 2106.08254).
        weight_decay: Weight decay, one for all or by pattern. Never applied to biases, norms, other vectors, and the
            parameters that the trunk excludes (position embeddings).
        lr_schedule: How the learning rate changes over each phase.
        clip_norm: If set, the gradients of all trainable parameters together are scaled down to this norm.
        accumulate: Number of batches whose gradients are averaged into one step; at most the batches of an epoch.
        ema_decay: If set, validation and checkpoints use exponential moving averages of the trainable parameters; each
            step keeps this share of the average.
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
