"""`classification`: a class for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from mtl.tasks.base import Goal, LabelKind
from mtl.tasks.classes import ClassTask
from mtl.tasks.confusion import Accuracy
from mtl.tasks.loss import Loss


class Classification(ClassTask):
    """A class per image; cross-entropy.

    Losses receive logits "b c" and classes "b", int64.
    """

    output: ClassVar[Literal["dense", "vector"]] = "vector"
    label_kind: LabelKind = "class"
    goal = Goal("accuracy", perfect=1.0)

    def __init__(
        self, num_classes: int, ignore_index: int = -1, loss: Loss | None = None, class_names: Sequence[str] = ()
    ) -> None:
        super().__init__(num_classes, ignore_index, loss, class_names)

    def predict(self, output: Tensor, size: tuple[int, int]) -> Tensor:  # noqa: ARG002  one signature for all
        """The probability of each class, "b c", float64."""
        return output.double().softmax(dim=1)

    def as_label(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(dim=1)

    def as_data(self, prediction: Tensor) -> dict[str, Any]:
        """The class, by name or number, its probability, and those of all classes."""
        each = dict(zip(names_of(self.class_names, self.num_outputs), prediction.tolist(), strict=True))
        best = max(each, key=each.__getitem__)
        return {"class": best, "probability": each[best], "probabilities": each}

    def caption(self, values: Tensor, is_label: bool) -> list[str]:
        """The name of the class, or its number."""
        return caption_classes(values if is_label else values.argmax(dim=1), self.class_names)

    def metrics(self) -> Accuracy:
        return Accuracy(self.num_outputs, self.ignore_index)


def caption_classes(classes: Tensor, names: Sequence[str]) -> list[str]:
    """Classes in words.

    Args:
        classes: "b", whole numbers.
        names: Their names, if they have any.
    """
    return ["none" if each < 0 else names[each] if each < len(names) else str(each) for each in classes.tolist()]


def names_of(names: Sequence[str], num: int) -> list[str]:
    """A name for each of `num` classes: its number, if it has none."""
    return [*names, *map(str, range(len(names), num))]
