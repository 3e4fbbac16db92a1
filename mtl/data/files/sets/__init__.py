"""Readers of public data sets, one file each, imported when one is asked for."""

from __future__ import annotations

from importlib import import_module

from mtl.data.files.sets.base import PublicSet

_CLASS_OF = {
    "nyuv2_mtan": "mtan:NyuV2Mtan",
    "cityscapes_mtan": "mtan:CityscapesMtan",
    "cityscapes": "cityscapes:Cityscapes",
    "nyud_mt": "nyud_mt:NyudMt",
    "pascal_mt": "pascal_mt:PascalMt",
    "celeba": "celeba:CelebA",
    "office31": "office:Office31",
    "office_home": "office:OfficeHome",
    "taskonomy": "taskonomy:Taskonomy",
    "bdd100k": "bdd100k:Bdd100k",
    "multimnist": "multimnist:MultiMnist",
}
NAMES = tuple(_CLASS_OF)


def public_set(name: str) -> type[PublicSet]:
    """The class of a public data set.

    Args:
        name: One of `NAMES`.
    """
    module, _, kind = _CLASS_OF[name].partition(":")
    found: type[PublicSet] = getattr(import_module(f"mtl.data.files.sets.{module}"), kind)
    return found
