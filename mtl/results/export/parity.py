"""Parity: how far an exported file's outputs are from the model's on the same images, and how far they may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl.model import MultiTaskModel
from mtl.results.export.errors import ExportError
from mtl.results.export.parts import Input
from mtl.runtime.text import count

LIMIT = 1e-4
DEFINITION = "largest |exported - model| of an output, divided by max(1, largest |model|), in float32"

# From images "b c h w" in the form of the exported input to outputs by name.
Run = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        num_images: Images in the batch.
        size: Their height and width in pixels.
        differences: By output, as in `DEFINITION`.
    """

    num_images: int
    size: tuple[int, int]
    differences: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.differences.values())

    def __str__(self) -> str:
        return f"{count(self.num_images, 'image')} of {self.size[0]} x {self.size[1]}"


def as_input(images: Tensor, form: Input) -> Tensor:
    """Images "b c h w", uint8, in the form of the exported input."""
    return images.float() / 255 if form == "float" else images


def reference_outputs(network: MultiTaskModel, images: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
    """The model's own outputs for images "b c h w", uint8."""
    with torch.no_grad():
        outputs = network(images.permute(0, 2, 3, 1), tasks)
    return {name: output.float() for name, output in outputs.items()}


def difference(got: Tensor, expected: Tensor) -> float:
    """As in `DEFINITION`; infinite where one is not finite and the other is another value, or shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    got, expected = got.double(), expected.double()
    same = (got == expected) | (got.isnan() & expected.isnan())
    distance = (got - expected).abs().masked_fill(same, 0).nan_to_num(torch.inf, torch.inf)
    scale = expected.abs().nan_to_num(0, 0, 0).amax().clamp(min=1)
    return float(distance.amax() / scale)


def check_parity(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], size: tuple[int, int]) -> Check:
    """Compares outputs by name."""
    num = len(next(iter(expected.values())))
    return Check(num, size, {name: difference(got[name], each) for name, each in expected.items()})


def enforce_parity(checks: Sequence[Check], limit: float) -> None:
    """Raises `ExportError` if a difference is above the limit."""
    for check in checks:
        name, worst = max(check.differences.items(), key=lambda each: each[1])
        if not worst <= limit:
            raise ExportError(
                f"the exported file does not compute what the model does: {name} differs by {worst:.2g} on {check};"
                f" expected {limit:g} at most ({DEFINITION}); nothing was written"
            )
