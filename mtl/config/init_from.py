"""An entry of `init_from` in a configuration: initial weights that another run, or a file of tensors, gives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.types import Count, Patterns, Strict

_Text = Annotated[str, Field(min_length=1)]
# The best or the last checkpoint of a run, or the one of a step.
Which = Annotated[
    Annotated[Literal["best", "last"], Tag("word")] | Annotated[Count, Tag("step")],
    Discriminator(lambda value: "step" if isinstance(value, int) else "word"),
]


class InitFromConfig(Strict):
    """Parameters and buffers that a run begins with, from another run or a file; see docs/add_task.md.

    Attributes:
        run: The directory of a run. Its averaged weights, if it kept averages.
        weights: The path of a checkpoint, a file or a folder, in place of `run`.
        which: The run's checkpoint: `best`, `last`, or the number of a step. If not set, the best one, or the last one
            if no validation gave a score. Refused with `weights`.
        names: Patterns of what is taken, matched against the names there. All that they match there or here has to be
            in both, in the same shape.
        rename: The name here of a module or tensor there, such as `{heads.object: heads.species}`.
    """

    run: _Text | None = None
    weights: _Text | None = None
    which: Which | None = None
    names: Annotated[Patterns, Field(min_length=1)]
    rename: dict[_Text, _Text] = {}

    @model_validator(mode="after")
    def _is_one_source(self) -> InitFromConfig:
        if (self.run is None) == (self.weights is None):
            raise PydanticCustomError("init_from", "Input should have either run, a run's directory, or weights")
        if self.run is None and self.which is not None:
            raise PydanticCustomError("init_from", "Input should have which only with run")
        return self
