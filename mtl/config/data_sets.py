"""All data sets that `data.name` may name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Tag

from mtl.config.data import GeneratedData, OwnData
from mtl.config.file_data import CocoData, FolderData, TableData
from mtl.config.hub_data import HuggingFaceData, WebDatasetData
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

AnyDataConfig = Annotated[
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
    | Annotated[OwnData, Tag(OWN)],
    chosen_by("name", stand_in="scenes", absent="scenes"),
]
