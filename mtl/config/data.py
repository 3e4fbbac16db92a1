"""The `data` component of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.types import Count, Seed, Strict


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
        name: `scenes` or `multifashion`; or your own as `package.module:Name`, see docs/own_data.md.
        options: Passed to a class of your own. Refused with a built-in data set.
        image_size: Height and width in pixels.
        batch_size: Images in one batch, that of all processes together. At most `num_train`.
        num_train: Number of training images; if not set, 6,000 of `scenes` and 20,000 of `multifashion`, or
            all of your own.
        num_val: Number of validation images; if not set, 500 of `scenes` and 2,000 of `multifashion`, or
            all of your own.
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
    options: dict[str, Any] = {}
    image_size: Annotated[int, Field(ge=8)] = 64
    batch_size: Count = 32
    num_train: Count | None = None
    num_val: Count | None = None
    augment: AugmentConfig | None = None
    seed: Seed = 0
    cache_dir: str | None = None
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    on_bad_sample: Literal["raise", "skip"] = "raise"

    @model_validator(mode="after")
    def _options_are_read(self) -> DataConfig:
        if self.options and ":" not in self.name:
            raise PydanticCustomError("data", "Input should have options only with a data set of your own")
        return self
