"""`mtl bench`: what a freeze pays, and what the loop costs, measured on this machine."""

from mtl.results.bench.bench import Bench, bench
from mtl.results.bench.measure import BenchRow
from mtl.results.bench.table import draw, in_words

__all__ = ["Bench", "BenchRow", "bench", "draw", "in_words"]
