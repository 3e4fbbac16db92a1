"""The `evaluate` component: how a trained model is measured."""

from __future__ import annotations

from typing import Literal

from mtl.config.types import Strict


class EvaluateConfig(Strict):
    """How a trained model is measured.

    Attributes:
        protocol: A published code base whose numbers are added to the metrics, computed as it does, under names such as
            `rmse@eigen`; see docs/tasks.md. `val/score` does not change.
    """

    protocol: Literal["mtan", "astmt", "invpt", "eigen"] | None = None
