"""All data sets that `data.name` may name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from mtl.config.data import GeneratedData, OwnData
from mtl.config.file_data import CocoData, FolderData, TableData
from mtl.config.own import is_own
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

_OWN = "package.module:Name"


def _by_name(value: Any) -> str:
    """Which of the models below a data set is; a word that is no name is none of them."""
    name = value.get("name", "scenes") if isinstance(value, dict) else getattr(value, "name", "scenes")
    return _OWN if isinstance(name, str) and is_own(name) else str(name)


AnyDataConfig = Annotated[
    Annotated[GeneratedData, Tag("scenes")]
    | Annotated[GeneratedData, Tag("multifashion")]
    | Annotated[TableData, Tag("table")]
    | Annotated[FolderData, Tag("folder")]
    | Annotated[CocoData, Tag("coco")]
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
    | Annotated[OwnData, Tag(_OWN)],
    Discriminator(_by_name),
]
