"""Several data sets as one: `data.name: mixed`."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, Tag, field_serializer, model_validator
from pydantic_core import PydanticCustomError

from mtl.config.data import DataConfig, GeneratedData, OwnData
from mtl.config.file_data import CocoData, FolderData, TableData
from mtl.config.hub_data import HuggingFaceData, WebDatasetData
from mtl.config.optim import word_for
from mtl.config.own import OWN, chosen_by
from mtl.config.public_data import (
    Bdd100kConfig,
    CelebAConfig,
    CityscapesConfig,
    CityscapesMtanConfig,
    MultiMnistConfig,
    NyudMtConfig,
    NyuV2MtanConfig,
    OfficeConfig,
    PascalMtConfig,
    TaskonomyConfig,
)
from mtl.config.types import Count, Positive, Strict

BuiltInDataConfig = (
    Annotated[GeneratedData, Tag("scenes")]
    | Annotated[GeneratedData, Tag("multifashion")]
    | Annotated[TableData, Tag("table")]
    | Annotated[FolderData, Tag("folder")]
    | Annotated[CocoData, Tag("coco")]
    | Annotated[HuggingFaceData, Tag("huggingface")]
    | Annotated[WebDatasetData, Tag("webdataset")]
    | Annotated[NyuV2MtanConfig, Tag("nyuv2_mtan")]
    | Annotated[CityscapesMtanConfig, Tag("cityscapes_mtan")]
    | Annotated[CityscapesConfig, Tag("cityscapes")]
    | Annotated[NyudMtConfig, Tag("nyud_mt")]
    | Annotated[PascalMtConfig, Tag("pascal_mt")]
    | Annotated[CelebAConfig, Tag("celeba")]
    | Annotated[OfficeConfig, Tag("office31")]
    | Annotated[OfficeConfig, Tag("office_home")]
    | Annotated[TaskonomyConfig, Tag("taskonomy")]
    | Annotated[Bdd100kConfig, Tag("bdd100k")]
    | Annotated[MultiMnistConfig, Tag("multimnist")]
)
OneDataConfig = BuiltInDataConfig | Annotated[OwnData, Tag(OWN)]

# What all sets have in common is set once.
SHARED = ("image_size", "batch_size", "augment", "cache_dir", "num_workers", "on_bad_sample")


class MixConfig(Strict):
    """How often images of each data set are drawn; a word alone is short for `{by: ...}`.

    Attributes:
        by: The share of each set: `proportional` to its number of images; `uniform`, the same for all; `temperature`,
            proportional to that number to the power of 1 / `temperature`; `weights`, as written; `round_robin`, the
            same for all, a batch of each in turn.
        temperature: 1 is `proportional`, and the higher it is, the nearer to `uniform`. Required by `temperature`.
        weights: A number for each set. Required by `weights`.
        batches: `mixed` draws each batch from all sets by their shares; `single` draws it from one set, in an order of
            its own in every epoch. If not set, `single` with `round_robin`, else `mixed`.
        epoch: How long an epoch is, at these shares: `longest`, until each image of every set was drawn once, others
            again; `shortest`, until the first set is through; `sum`, as many images as all sets have; or `steps`.
        steps: The batches of an epoch. Required by `epoch: steps`.
    """

    by: Literal["proportional", "uniform", "temperature", "round_robin", "weights"] = "proportional"
    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    weights: dict[str, Positive] | None = None
    batches: Literal["mixed", "single"] | None = None
    epoch: Literal["longest", "shortest", "sum", "steps"] = "longest"
    steps: Count | None = None

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> MixConfig:
        for key, value, word in (
            ("temperature", self.temperature, self.by == "temperature"),
            ("weights", self.weights, self.by == "weights"),
            ("steps", self.steps, self.epoch == "steps"),
        ):
            own = "epoch" if key == "steps" else "by"
            if word and value is None:
                raise PydanticCustomError("mix", f"Input should have {key}, which {own}: {key} needs")
            if not word and value is not None:
                raise PydanticCustomError("mix", f"Input should have {key} only with {own}: {key}")
        if self.by == "round_robin" and self.batches == "mixed":
            raise PydanticCustomError("mix", "Input should have batches: single, if any, with round_robin")
        return self

    @property
    def is_single(self) -> bool:
        """Whether each batch is of one set."""
        return self.by == "round_robin" or self.batches == "single"

    def shares(self, sizes: Mapping[str, int]) -> dict[str, Fraction]:
        """The share of each set, exactly; they add up to 1.

        Args:
            sizes: The images of each set.
        """
        match self.by:
            case "proportional":
                parts = {name: Fraction(size) for name, size in sizes.items()}
            case "temperature":
                assert self.temperature is not None
                parts = {name: Fraction(size ** (1 / self.temperature)) for name, size in sizes.items()}
            case "weights":
                assert self.weights is not None
                parts = {name: Fraction(str(self.weights[name])) for name in sizes}
            case _:
                parts = dict.fromkeys(sizes, Fraction(1))
        total = sum(parts.values())
        return {name: part / total for name, part in parts.items()}


class MixedData(DataConfig):
    """Several data sets, mixed; see docs/mixed_data.md. A task learns from every set that has its label.

    Attributes:
        name: The data set's name.
        sets: The data sets by a name of your own. Each has the keys of its kind, but those that all share are set in
            `data`: `image_size`, `batch_size`, `augment`, `cache_dir`, `num_workers` and `on_bad_sample`.
        mix: How often images of each are drawn.
        num_train: Refused here; each set has its own.
        num_val: Refused here; each set has its own.
        transform: That of every set that has none of its own.
    """

    name: Literal["mixed"]
    sets: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")],
        Annotated[OneDataConfig, chosen_by("name", stand_in="scenes")],
    ] = Field(min_length=1)
    mix: Annotated[MixConfig, word_for("by")] = MixConfig()

    @model_validator(mode="after")
    def _sets_what_is_read(self) -> MixedData:
        for key in ("num_train", "num_val"):
            if getattr(self, key) is not None:
                raise PydanticCustomError("data", f"Input should have {key} in each of the sets, not next to them")
        for name, own in self.sets.items():
            if twice := [key for key in SHARED if key in own.model_fields_set]:
                raise PydanticCustomError("data", f"Input should have {twice[0]} next to the sets, not in {name!r}")
            if isinstance(own, GeneratedData) and not isinstance(self.image_size, int):
                raise PydanticCustomError("data", f"Input should have one number as image_size, for {own.name}")
        weights = self.mix.weights
        if weights is not None and set(weights) != set(self.sets):
            there, got = ", ".join(self.sets), ", ".join(weights)
            raise PydanticCustomError("data", f"Input should have mix.weights for each of {there}, not for {got}")
        return self

    @field_serializer("sets", mode="wrap")
    def _without_what_is_shared(self, sets: dict[str, Any], write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, dict[str, Any]] = write(sets)
        for name, own in written.items():
            for key in (*SHARED, *({"transform"} - self.sets[name].model_fields_set)):
                own.pop(key, None)
        return written

    @property
    def each(self) -> dict[str, DataConfig]:
        """The data sets with what they share."""
        shared: dict[str, Any] = {key: getattr(self, key) for key in SHARED}
        return {
            name: own.model_copy(
                update=shared | ({} if "transform" in own.model_fields_set else {"transform": self.transform})
            )
            for name, own in self.sets.items()
        }

    @property
    def has_views(self) -> bool:
        return any(own.has_views for own in self.each.values())
