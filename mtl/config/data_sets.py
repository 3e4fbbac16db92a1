"""All data sets that `data.name` may name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Tag

from mtl.config.data import OwnData
from mtl.config.mixed import BuiltInDataConfig, MixedData
from mtl.config.own import OWN, chosen_by

AnyDataConfig = Annotated[
    BuiltInDataConfig | Annotated[MixedData, Tag("mixed")] | Annotated[OwnData, Tag(OWN)],
    chosen_by("name", stand_in="scenes", absent="scenes"),
]
