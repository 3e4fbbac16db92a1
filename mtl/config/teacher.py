"""The `teacher` of a `distill` task in a configuration."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.types import Strict

Text = Annotated[str, Field(min_length=1)]


class TeacherConfig(Strict):
    """A frozen model whose embedding of each image is learned: a timm model by its `name`, or the trunk of a `run`.

    Attributes:
        name: Any timm architecture.
        weights: As `trunk.weights`. Required with `name`, so that nobody learns from random weights by accident;
            refused with `run`.
        options: Passed to `timm.create_model`, as `trunk.options`; refused with `run`.
        run: The directory of a run: its trunk, with its best weights. In place of `name`.
    """

    name: Text | None = None
    weights: Text | None = None
    options: dict[str, Any] = {}
    run: Text | None = None

    @model_validator(mode="after")
    def _is_one_of_both(self) -> TeacherConfig:
        if self.name is None and self.run is None:
            raise PydanticCustomError("teacher", "Input should have name, a timm model, or run, a run's directory")
        if self.name is not None and self.run is not None:
            raise PydanticCustomError("teacher", "Input should have name or run, not both")
        if self.run is not None and (self.weights is not None or self.options):
            raise PydanticCustomError("teacher", "Input should have weights and options only with name: a run has both")
        if self.name is not None and self.weights is None:
            choices = "hub, packaged, the path of a checkpoint, or none for random ones"
            raise PydanticCustomError("teacher", f"Input should have weights with a name: {choices}")
        return self
