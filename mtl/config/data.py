"""The `data` component of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.transform import TransformsConfig
from mtl.config.types import Count, ImageSize, NotNegative, Seed, Side, Strict


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
    """The data set, and how it is read: the keys of every data set.

    Attributes:
        name: Which data set.
        image_size: Height and width in pixels: one number for both, or `[height, width]`.
        batch_size: Images in one batch, that of all processes together. At most `num_train`.
        num_train: Number of training images, the first ones; if not set, 6,000 of `scenes` and 20,000 of
            `multifashion`, or all of another data set.
        num_val: Number of validation images, the first ones; if not set, 500 of `scenes` and 2,000 of `multifashion`,
            or all of another data set.
        transform: Changes of images together with their labels.
        augment: Random changes of training images that leave labels as they are; if not set, there are none.
        cache_dir: Where generated data, kept features and indices of shards are. If not set: the environment variable
            `MTL_CACHE_DIR`, else the user's cache directory.
        num_workers: Worker processes that read batches ahead of the steps; with 0, a thread of the main process does.
        on_bad_sample: What happens to a sample that cannot be read, or has labels that cannot be trained on: `raise`
            ends the run and names it, `skip` leaves such samples out and logs how many there were.
    """

    name: str
    image_size: ImageSize = 64
    batch_size: Count = 32
    num_train: Count | None = None
    num_val: Count | None = None
    transform: TransformsConfig = TransformsConfig()
    augment: AugmentConfig | None = None
    cache_dir: str | None = None
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    on_bad_sample: Literal["raise", "skip"] = "raise"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        height, width = [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size
        return height, width

    @property
    def has_views(self) -> bool:
        """Whether training images are changed at random, in another way in every epoch."""
        return self.augment is not None or any(each.name != "resize" for each in self.transform.train)


class GeneratedData(DataConfig):
    """Images that are made from the embedded garments.

    Attributes:
        name: `scenes`, rooms with garments in them: `segmentation`, `depth`, `normals` and the nearest `object`; or
            `multifashion`, two garments on top of each other: `left` and `right`.
        image_size: Height and width in pixels.
        seed: Seed of what is made. The run's `seed` does not change it, so that runs with several seeds have the same
            data.
        memory_gb: A split that takes no more than this, in 10^9 bytes, is held in memory. A larger one is read from the
            data cache batch by batch.
    """

    name: Literal["scenes", "multifashion"] = "scenes"
    image_size: Side = 64
    seed: Seed = 0
    memory_gb: NotNegative = 4.0


class FileData(DataConfig):
    """The keys of every data set that is read from files.

    Attributes:
        memory_gb: Data that takes no more than this, in 10^9 bytes at `image_size`, is read once into memory when a run
            begins. More, and data with random transforms, is read batch by batch.
    """

    memory_gb: NotNegative = 4.0


class OwnData(FileData):
    """A data set of your own, see docs/own_data.md.

    Attributes:
        name: A torch `Dataset` whose items are dicts, as `package.module:Name`.
        options: Passed to the class.
    """

    options: dict[str, Any] = {}
