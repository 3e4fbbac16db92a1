"""The root of a configuration, and `load_config`.

Keys and types are declared as pydantic models, one file a component; `yaml_source` reads the files and records where
each value was written.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from mtl.config.audit import AuditConfig
from mtl.config.cache import CacheConfig, cache_word
from mtl.config.checkpoint import CheckpointConfig
from mtl.config.data import GeneratedData
from mtl.config.data_sets import AnyDataConfig
from mtl.config.distributed import DistributedConfig
from mtl.config.error_text import error_line, explain, key_of
from mtl.config.errors import ConfigError, OptionsError, SettingError
from mtl.config.evaluate import EvaluateConfig
from mtl.config.examples import file_of
from mtl.config.init_from import InitFromConfig
from mtl.config.names import Device, RunName
from mtl.config.optim import BalanceConfig, OptimConfig, word_for
from mtl.config.phase import PhaseConfig, PhaseEntry, WrittenPhase, num_unrolled, unroll
from mtl.config.tasks import TaskConfig
from mtl.config.tracking import TrackingConfig
from mtl.config.trunk import TrunkConfig
from mtl.config.types import Depthwise, Patterns, Seed, Strict, one_as_list
from mtl.config.yaml_source import ConfigSource, KeyPath, read_source, replace_below
from mtl.runtime.plugin import search_in
from mtl.runtime.text import shorten

# A phase costs at least an optimizer, a contract and a validation.
_MOST_PHASES = 1000


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
            bytes. `auto` gives every run a name of its own: that of the file and the next free number, `scenes-001`.
        runs_dir: The folder of all run directories.
        seed: Seed of initial weights and of the order of images; the same seed gives the same bits on a CPU.
        device: `auto` (`cuda` if there is a GPU, else `cpu`), `cpu`, `cuda` or `cuda:N`. `cuda:N` is refused with
            several processes, each of which has a GPU of its own.
        memory_format: Layout of images and weights in memory; `auto` times both for some steps and takes the faster
            one. `channels_last` is refused with `distributed.strategy: fsdp2`.
        precision: Number format of the forward: `bf16` and `fp16` run it under autocast. Weights and losses stay
            float32; with `fp16`, losses are scaled so that gradients do not underflow. `auto` times some steps in each
            (`fp16` on a GPU only) and takes the fastest. `fp16` is refused with `distributed.strategy: fsdp2`.
        depthwise: How the weight gradients of depthwise convolutions are computed on a CPU in `fp32`: by torch, or as
            shifted products in the layers that are named, such as `trunk.blocks.5.0.conv_dw`. `auto` times each layer
            that is trained and takes the products where they are clearly faster. Their sums round differently, so where
            two runs shall agree to the bit, name the layers, or `torch`. Elsewhere, with `compile`, with
            `distributed.strategy: fsdp2`, and in a model that has none of the layers, it is torch; where it has some of
            them, a name that it does not have is refused.
        join_heads: Whether the `linear` heads are computed as one product in steps of training, with their weights
            joined for each step: a little faster with eight of them and more, slower with two; its sums round
            differently. Refused with fewer than two such heads, and with `distributed.strategy: fsdp2`.
        compile: Whether torch.compile compiles trunk and heads, again in every phase. Refused with
            `distributed.strategy: fsdp2`, and with `distributed.sync_batchnorm`.
        cache: The kept activations of a frozen trunk, which need not be computed twice; see docs/dividend.md.
        trunk: The shared timm model.
        init_from: Parameters and buffers that another run or a file gives, after random ones and `trunk.weights`; read
            when a run begins. A list of entries, or one alone. The trunk's own weights are not loaded if it is given
            whole.
        data: The data set.
        tasks: The tasks by name, each with one head; each learns a label of the data set, by default that of its name.
        evaluate: How a trained model is measured.
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
        tracking: Where the run is shown, and how often steps are logged.
        MODEL: The classic list of frozen names.
    """

    name: RunName
    runs_dir: Annotated[str, Field(min_length=1)] = "runs"
    seed: Seed = 0
    device: Device = "auto"
    memory_format: Literal["contiguous", "channels_last", "auto"] = "contiguous"
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    depthwise: Depthwise = "torch"
    join_heads: bool = False
    compile: bool = False
    cache: Annotated[CacheConfig, BeforeValidator(cache_word)] = CacheConfig()
    trunk: TrunkConfig
    init_from: Annotated[list[InitFromConfig], BeforeValidator(one_as_list)] = []
    data: AnyDataConfig = GeneratedData()
    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], TaskConfig] = Field(min_length=1)
    evaluate: EvaluateConfig = EvaluateConfig()
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

    _source: ConfigSource = PrivateAttr(default_factory=ConfigSource)
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

    @field_validator("tasks")
    @classmethod
    def _some_task_has_labels(cls, tasks: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        if all(task.unlabelled for task in tasks.values()):
            raise PydanticCustomError("tasks", "Input should have a task that is not unlabelled")
        return tasks

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    def where(self, path: KeyPath) -> str:
        """The file and line of a value, `command line`, or `defaults`."""
        return self._source.where(path)

    @property
    def source(self) -> ConfigSource:
        """The configuration as read, with the place of every key that was written."""
        return self._source

    @property
    def command(self) -> str | None:
        """The command that trains this configuration, for a shell; None if it was not read from a file."""
        return self._command

    def key_of(self, path: KeyPath) -> str:
        """A key as it is written on the command line, phases by name."""
        return key_of(path, self._source.data)

    def mistake(self, path: KeyPath, message: str) -> ConfigError:
        """An error about a value that fails when it is used, with the place where it was written."""
        return ConfigError([error_line(path, message, self._source)])

    @cached_property
    def written_phases(self) -> list[WrittenPhase]:
        """The phases in their order, repeats written out."""
        return list(unroll(self.phases))

    def path_of(self, written: WrittenPhase, key: str) -> KeyPath:
        """The key path of a setting of `optim` that holds in a phase: in the phase itself, else in `optim`."""
        return (*written.path, key) if getattr(written.config, key) is not None else ("optim", key)

    def with_changes(self, **changes: Any) -> RunConfig:
        """A copy, from the same file, with other values under some keys."""
        changed = self.model_copy(update=changes)
        changed._source = self._source
        changed.__dict__.pop("written_phases", None)
        return changed

    def optim_of(self, phase: PhaseConfig) -> OptimConfig:
        """How a phase steps parameters: the run's `optim`, overridden by the phase's own settings."""
        keys = ("optimizer", "lr", "layer_decay", "weight_decay", "lr_schedule")
        own = {key: value for key in keys if (value := getattr(phase, key)) is not None}
        return self.optim.model_copy(update=own)


def mistake_of(config: RunConfig, error: SettingError, below: KeyPath = ()) -> ConfigError:
    """A `SettingError` with the place where the value was written; for options, each mistake with its own.

    Args:
        config: The configuration.
        error: The error.
        below: The key path below which its key is, if that is not the whole configuration.
    """
    path = (*below, *(int(part) if part.isdecimal() else part for part in error.key.split(".")))
    if isinstance(error, OptionsError):
        return ConfigError([explain(each, error.model, config.source, path) for each in error.errors.errors()])
    return config.mistake(path, error.message)


def load_config(file: Path, overrides: Sequence[str] = (), data_of: Path | None = None) -> RunConfig:
    """Reads and checks a configuration.

    Args:
        file: A YAML file; with `_base_: other.yaml`, its values override those of another file. Or the name of a
            configuration that comes with mtl, such as `scenes`.
        overrides: Dotted `key=value` pairs, such as `optim.lr_scale=0.5` or `phases.finetune.epochs=2`.
        data_of: Another file, whose data set takes the place of this one's, with the labels and sets of its tasks.

    Raises:
        ConfigError: Anything is wrong; all mistakes are reported at once, each with its file and line.
    """
    written, file = file, file_of(file)
    source = read_source(file, overrides)
    search_in(file.parent)
    if data_of is not None:
        search_in(data_of.parent)
        _take_data(source, read_source(data_of), data_of)
    return config_of(source, shlex.join(["mtl", "train", str(written), *overrides]))


def config_of(source: ConfigSource, command: str) -> RunConfig:
    """Checks a configuration that was read.

    Args:
        source: The configuration as plain data, with the place of every key.
        command: The command that trains it, for a shell.

    Raises:
        ConfigError: As `load_config`.
    """
    try:
        config = RunConfig.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError([explain(details, RunConfig, source) for details in error.errors()]) from None
    config._source = source
    config._command = command
    return config


def _take_data(source: ConfigSource, other: ConfigSource, file: Path) -> None:
    """Puts another configuration's data set, and its labels of the same tasks, into a configuration."""
    if not isinstance(other.data.get("data"), dict):
        raise ConfigError([f"{file}:1: data: expected a data set, as in a configuration, got {other.data.get('data')}"])
    before = dict(source.data.get("data") or {})
    replace_below(source, other, ("data",))
    for key in ("image_size", "batch_size"):
        if key in before:
            source.data["data"].setdefault(key, before[key])
    for task, own in (source.data.get("tasks") or {}).items():
        # The other data may have labels of what the run had none of.
        for key in ("unlabelled", "class_names"):
            own.pop(key, None)
        if task in (other.data.get("tasks") or {}):
            replace_below(source, other, ("tasks", task, "label"))
        replace_below(source, other, ("tasks", task, "data"))
