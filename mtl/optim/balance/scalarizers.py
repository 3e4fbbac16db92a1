"""TorchJD's scalarizers, imported without its aggregators and the solvers that those import: cvxpy, qpsolvers."""

from __future__ import annotations

from mtl.runtime.deferred import deferred, nothing

with deferred({"torchjd": nothing}):
    # Not `from torchjd import scalarization`, which asks the package itself.
    import torchjd.scalarization as scalarization
    from torchjd.scalarization import DWA, FAMO, IMTLL, STCH, UW, Constant, Mean, Random, Scalarizer, Sum

__all__ = ["DWA", "FAMO", "IMTLL", "STCH", "UW", "Constant", "Mean", "Random", "Scalarizer", "Sum", "scalarization"]
