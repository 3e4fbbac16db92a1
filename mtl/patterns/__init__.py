"""The pattern language: which names a pattern selects, and how a list of patterns partitions them."""

from mtl.patterns.language import (
    Counted,
    Partition,
    PatternLike,
    Selection,
    as_list,
    partition,
    select,
    text_of,
)
from mtl.patterns.matching import NO_TREE, ModuleTree, PatternError, matcher

__all__ = [
    "Counted",
    "ModuleTree",
    "NO_TREE",
    "Partition",
    "PatternError",
    "PatternLike",
    "Selection",
    "as_list",
    "matcher",
    "partition",
    "select",
    "text_of",
]
