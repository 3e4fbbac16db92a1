"""What of a frozen trunk need not be computed again: found by tracing, cut off, replayed from what was kept."""

from mtl.model.prefix.prefix import Prefix, PrefixError

__all__ = ["Prefix", "PrefixError"]
