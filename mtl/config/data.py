"""The `data` component of a configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.types import Count, Seed, Strict


class AugmentConfig(Strict):
    """Random changes of training images, redrawn in every epoch, that leave all labels unchanged.

    Attributes:
        brightness: Values are multiplied by 1 plus or minus up to this.
        contrast: Distances from an image's mean are multiplied by 1 plus or minus up to this.
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
        cache_dir: Where generated data is stored; MTL_CACHE_DIR, else the user's cache directory.
        num_workers: Processes that read batches ahead of the steps; with 0, a thread of the training process does.
        on_bad_sample: What happens to a sample whose labels cannot be trained on: `raise` stops the run and names the
            sample, `skip` leaves it out.
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
