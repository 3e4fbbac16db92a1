"""The `data` component of a configuration for public data sets: what each set needs besides the common keys."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtl.config.data import FileData

_Path = Annotated[str, Field(min_length=1)]


class PublicDataConfig(FileData):
    """A public data set, in the layout in which it is published; see docs/data_sets.md.

    Attributes:
        name: The data set.
        root: Its folder.
        follow_links: Whether links in the folder may lead out of it.
    """

    name: str
    root: _Path
    follow_links: bool = False


class NyuV2MtanConfig(PublicDataConfig):
    """NYUv2 as arrays, as MTAN, LibMTL and the papers on balancing use it; see docs/data_sets.md.

    Attributes:
        name: The data set.
    """

    name: Literal["nyuv2_mtan"]


class CityscapesMtanConfig(PublicDataConfig):
    """Cityscapes as arrays, as MTAN, LibMTL and the papers on balancing use it; see docs/data_sets.md.

    Attributes:
        name: The data set.
        num_classes: Which of its segmentations is read, by the number of its classes: the folder `label_7`, or another.
            With 7, the folder `label` is read if there is no `label_7`.
    """

    name: Literal["cityscapes_mtan"]
    num_classes: Literal[2, 7, 19] = 7


class CityscapesConfig(PublicDataConfig):
    """Cityscapes as it is published; see docs/data_sets.md.

    Attributes:
        name: The data set.
    """

    name: Literal["cityscapes"]


class NyudMtConfig(PublicDataConfig):
    """NYUD-MT: NYUv2 with 40 classes, in one of its two trees; see docs/data_sets.md.

    Attributes:
        name: The data set.
    """

    name: Literal["nyud_mt"]


class PascalMtConfig(PublicDataConfig):
    """PASCAL-MT: PASCAL-Context with five tasks; see docs/data_sets.md.

    Attributes:
        name: The data set.
    """

    name: Literal["pascal_mt"]


class CelebAConfig(PublicDataConfig):
    """CelebA: faces with 40 attributes; see docs/data_sets.md.

    Attributes:
        name: The data set.
    """

    name: Literal["celeba"]


class OfficeConfig(PublicDataConfig):
    """Office-31 or Office-Home: one classification task for each domain; see docs/data_sets.md.

    Attributes:
        name: The data set.
        lists: The folder in `root` with the lists of images, `<domain>_<split>.txt`.
    """

    name: Literal["office31", "office_home"]
    lists: _Path = "lists"


class TaskonomyConfig(PublicDataConfig):
    """Taskonomy, any subset of it; see docs/data_sets.md.

    Attributes:
        name: The data set.
        buildings: The table in `root` that says which buildings belong to which split.
    """

    name: Literal["taskonomy"]
    buildings: _Path = "splits_taskonomy/train_val_test_tiny.csv"


class Bdd100kConfig(PublicDataConfig):
    """BDD100K: roads with drivable area, lane marking and, on other images, segmentation; see docs/data_sets.md.

    Attributes:
        name: The data set.
    """

    name: Literal["bdd100k"]


class MultiMnistConfig(PublicDataConfig):
    """Two images of MNIST, or of a set in its format, on one canvas; see docs/data_sets.md.

    Attributes:
        name: The data set.
    """

    name: Literal["multimnist"]
