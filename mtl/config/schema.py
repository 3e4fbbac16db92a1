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
from mtl.config.data import DataConfig
from mtl.config.distributed import DistributedConfig
from mtl.config.error_text import error_line, explain, key_of
from mtl.config.errors import ConfigError, SettingError
from mtl.config.names import Device, RunName
from mtl.config.optim import BalanceConfig, OptimConfig, word_for
from mtl.config.phase import PhaseConfig, PhaseEntry, WrittenPhase, num_unrolled, unroll
from mtl.config.tasks import TaskConfig
from mtl.config.tracking import TrackingConfig
from mtl.config.trunk import TrunkConfig
from mtl.config.types import Patterns, Seed, Strict, one_as_list
from mtl.config.yaml_source import KeyPath, Source, read_source
from mtl.runtime.text import shorten

# A phase costs at least an optimizer, a contract and a validation.
_MOST_PHASES = 1000


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
        memory_format: Layout of images and weights; `auto` times some steps with each and uses the faster one.
        precision: `bf16` and `fp16` run the model's forward under autocast; weights and losses stay float32, and a
            gradient scaler is used for `fp16`. `auto` times some steps with each and uses the fastest one.
        compile: Whether trunk and heads are compiled by torch.compile, again in every phase.
        cache: Which activations of a frozen trunk are stored, so that they are computed once.
        trunk: The shared timm model.
        data: The data set.
        tasks: The tasks by name; each is trained on the label of that name.
        balance: How the tasks' losses become one; a phase may set its own.
        optim: How parameters are stepped.
        freeze_always: Patterns of what is frozen in every phase; no phase can thaw it.
        phases: The phases in order; `{repeat: N, phases: [...]}` in place of one repeats some.
        unreached: What happens to trainable parameters that no active task's loss depends on: `freeze` them for the
            phase, only `warn`, or `error`.
        not_finite: What happens if a loss or gradient is NaN or infinite: `raise` ends the run at the next logged step
            and names the images; `skip` leaves the step out; `stop` saves the state before the step and ends the run.
            The latter two sync with the device once a step.
        checkpoint: When the state of the run is saved inside an epoch, and which checkpoints are kept permanently.
        distributed: How several processes, started by torchrun, train together.
        resume: `auto` resumes in this run's directory if there is anything in it; the directory of another run, or one
            of its checkpoints, starts from there.
        resume_override: Whether to resume although the configuration differs from the one that the run began with.
        audit: What is measured besides the losses.
        tracking: wandb.
        MODEL: The classic way to freeze.
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


def mistake_of(config: RunConfig, error: SettingError) -> ConfigError:
    """A `SettingError` with the place where the value was written."""
    return config.mistake(tuple(error.key.split(".")), error.message)


def load_config(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads and checks a configuration.

    Args:
        file: A YAML file; with `_base_: other.yaml`, its values override those of another file.
        overrides: Dotted `key=value` pairs, such as `optim.lr_scale=0.5` or `phases.finetune.epochs=2`.

    Raises:
        ConfigError: Anything is wrong; all mistakes are reported at once, each with its file and line.
    """
    source = read_source(file, overrides)
    try:
        config = RunConfig.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError([explain(details, RunConfig, source) for details in error.errors()]) from None
    config._source = source
    config._command = shlex.join(["mtl", "train", str(file), *overrides])
    return config
