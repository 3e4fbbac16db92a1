"""`segmentation`: a class for each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mtl.tasks.base import Goal, LabelKind
from mtl.tasks.classes import ClassTask
from mtl.tasks.confusion import MeanIou
from mtl.tasks.loss import Loss
from mtl.tasks.maps import highest

_NUM_COLOURS = 20


class Segmentation(ClassTask):
    """A class per pixel; cross-entropy weighted by class, since backgrounds cover most pixels.

    Losses receive logits "b c h w" and classes "b h w", int64.
    """

    output: ClassVar[Literal["dense", "vector"]] = "dense"
    label_kind: LabelKind = "mask"
    goal = Goal("miou", perfect=1.0)

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        balance_power: float = 0.5,
        loss: Loss | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        """Args:
        num_classes: Number of classes.
        ignore_index: Label of pixels that do not count.
        balance_power: Classes weigh frequency ** -balance_power, scaled so that the mean pixel weighs 1.
            0 weighs all pixels alike, 1 all classes alike.
        loss: What a pixel costs; its `class_weights` come before `balance_power`.
        class_names: Names of the classes.
        """
        super().__init__(num_classes, ignore_index, loss, class_names, balance_power)

    def predict(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """The class of each pixel, "b h w", int64."""
        return highest(output, size)

    def draw(self, values: Tensor, is_label: bool) -> Tensor:
        """A colour for each class, from the 21st on the same again; black where there is no label."""
        classes = values if is_label else values.argmax(dim=1)
        colours = torch.tensor([self.colour(each) for each in range(_NUM_COLOURS)])
        return colours[classes % _NUM_COLOURS] * (classes != self.ignore_index)[..., None]

    def legend(self) -> list[tuple[str, tuple[float, float, float]]]:
        return [(name, self.colour(number)) for number, name in enumerate(self.class_names)]

    @staticmethod
    def colour(number: int) -> tuple[float, float, float]:
        """The colour of a class in pictures: red, green, blue, from 0 to 1."""
        from matplotlib import colormaps

        red, green, blue, _ = colormaps["tab20"](number % _NUM_COLOURS)
        return red, green, blue

    def metrics(self) -> MeanIou:
        return MeanIou(self.num_outputs, self.ignore_index)
