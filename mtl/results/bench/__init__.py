"""`mtl bench`: what a freeze pays, measured on this machine."""

from mtl.results.bench.bench import Row, bench, draw, in_words, to_json

__all__ = ["Row", "bench", "draw", "in_words", "to_json"]
