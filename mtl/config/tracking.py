"""The `tracking` component of a configuration."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.own import is_own
from mtl.config.types import Count, Strict

_BACKENDS = ("wandb", "tensorboard", "none")
# What tensorboard has no place for.
ONLY_WANDB = ("project", "group", "job_type", "tags", "notes", "system_metrics", "console", "log_model")


def _check_backend(text: str) -> str:
    if text not in _BACKENDS and not is_own(text):
        (*_, nearest) = ["wandb", *get_close_matches(text, _BACKENDS, n=1)]
        expected = "Input should be wandb, tensorboard, none or package.module:Name"
        raise PydanticCustomError("backend", expected, {"nearest": nearest})
    return text


class TrackingConfig(Strict):
    """Where a run is shown, see docs/tracking.md. `metrics.jsonl` gets the numbers in any case.

    Attributes:
        backend: `wandb`; `tensorboard`, with the extra of that name; `none`; or your own as `package.module:Name`.
        options: Passed to a backend of your own; refused with the others.
        project: The wandb project.
        mode: `auto`: as the environment variable `WANDB_MODE` says, else online if wandb knows a key, else offline. Any
            other value overrides `WANDB_MODE`. `disabled` switches every backend off.
        group: The group that wandb shows the run in, such as all seeds of one setting.
        job_type: What wandb lists the run as, such as `train` or `baseline`.
        tags: Words by which wandb finds the run.
        notes: What wandb shows as the run's description.
        system_metrics: Whether wandb samples the load of processor, memory and GPU.
        console: Whether wandb keeps what the run prints.
        log_model: Whether wandb gets the best checkpoint as an artifact when the run is finished.
        predictions_every_epochs: Every how many epochs the validation shows predictions of a few images; 0 for never.
        log_every_steps: Number of steps that are logged together, each with a row of its own in `metrics.jsonl`; wandb
            gets the last one of them.
    """

    backend: Annotated[str, AfterValidator(_check_backend)] = "wandb"
    options: dict[str, Any] = {}
    project: str = "mtl"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    group: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    job_type: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = []
    notes: str | None = None
    system_metrics: bool = False
    console: bool = False
    log_model: bool = False
    predictions_every_epochs: Annotated[int, Field(ge=0)] = 1
    log_every_steps: Count = 20

    @model_validator(mode="after")
    def _options_go_with_an_own_class(self) -> TrackingConfig:
        if self.options and not is_own(self.backend):
            raise PydanticCustomError("tracking", "Input should have options only for a backend of your own")
        return self

    @property
    def is_off(self) -> bool:
        """Whether there is no backend."""
        return self.backend == "none" or self.mode == "disabled"
