"""`ordinal`: one of several classes that have an order, for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mtl.tasks.base import Goal, LabelKind
from mtl.tasks.binary_losses import cross_entropy
from mtl.tasks.classes import check_classes, samples_out_of_range
from mtl.tasks.classification import caption_classes, names_of
from mtl.tasks.confusion import Confusion
from mtl.tasks.entries import EntryTask
from mtl.tasks.loss import Loss


class OrdinalLoss(Loss):
    """A loss of the questions "is the class above k?", k = 0 ... K - 2, one output each."""

    @staticmethod
    def answers(label: Tensor, num_questions: int) -> tuple[Tensor, Tensor]:
        """For each image and question, "b k": whether the answer is yes, and whether CORN asks it (label >= k)."""
        numbers = torch.arange(num_questions, device=label.device)
        return label[:, None] > numbers, label[:, None] >= numbers

    def probabilities(self, output: Tensor) -> Tensor:
        """The probability of a class above k, "b k"."""
        return output.sigmoid()

    def fit(self, label: Tensor, num_questions: int) -> Tensor:
        """The best constant output "k".

        Args:
            label: "n", labelled classes.
            num_questions: k.
        """
        yes, _ = self.answers(label, num_questions)
        return _logits(yes.sum(dim=0), torch.full((num_questions,), len(label)))


class Coral(OrdinalLoss):
    """CORAL: the sum of the questions' cross-entropies (Cao et al., arXiv 1901.07884, equation 4).

    The head has one weight vector for all questions and a bias for each. At the least loss the biases fall from
    question to question, and with them the probabilities of every image (theorem 1); training begins with such biases.
    """

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        yes, _ = self.answers(label, output.shape[1])
        return cross_entropy(output, yes).sum(dim=1)

    def weights(self, label: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002  one signature for all
        return weights.any(dim=1)


class Corn(OrdinalLoss):
    """CORN: question k is asked only of images whose class is k or above; a mean over all questions that are asked.

    Shi et al., arXiv 2111.08851, equations 5 and 8. An output is the logit of "above k, given that it is k or above".
    """

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        yes, _ = self.answers(label, output.shape[1])
        return cross_entropy(output, yes)

    def weights(self, label: Tensor, weights: Tensor) -> Tensor:
        return weights & self.answers(label, weights.shape[1])[1]

    def probabilities(self, output: Tensor) -> Tensor:
        return output.sigmoid().cumprod(dim=1)

    def fit(self, label: Tensor, num_questions: int) -> Tensor:
        yes, asked = self.answers(label, num_questions)
        return _logits(yes.sum(dim=0), asked.sum(dim=0))


def _logits(yes: Tensor, num: Tensor) -> Tensor:
    """Logits of shares; as if there were half a yes or half a no where there is none at all."""
    total = num.double().clamp(min=1)
    positive = torch.minimum(yes.double().clamp(min=0.5), total - 0.5)
    return (positive / (total - positive)).log().float()


class OrdinalMetrics(Confusion):
    """Those of the confusion matrix in which the order of classes counts."""

    higher = ("accuracy", "kappa")
    lower = ("mae",)

    def __init__(self, num_classes: int, ignore_index: int, rule: OrdinalLoss) -> None:
        super().__init__(num_classes, ignore_index)
        self._rule = rule

    def predict(self, output: Tensor, label: Tensor) -> Tensor:
        """The number of questions whose answer is yes; where the output is NaN, the class that is furthest off."""
        furthest = torch.where(2 * label < self.num_classes - 1, self.num_classes - 1, 0)
        return torch.where(output.isnan().any(dim=1), furthest, classes_of(output, self._rule))

    def compute(self) -> dict[str, float]:
        """`mae` in classes; `accuracy`; `kappa`: Cohen's with quadratic weights (Cohen 1968), 0 for a constant."""
        matrix = self.matrix()
        count, place = matrix.sum(), torch.arange(self.num_classes, dtype=torch.float64)
        distance = (place[:, None] - place).abs()
        by_chance = torch.outer(matrix.sum(1), matrix.sum(0)) / count
        return {
            "mae": ((distance * matrix).sum() / count).item(),
            "accuracy": (matrix.diag().sum() / count).item(),
            "kappa": (1 - (distance.square() * matrix).sum() / (distance.square() * by_chance).sum()).item(),
        }


def classes_of(output: Tensor, rule: OrdinalLoss) -> Tensor:
    """The predicted classes "b", int64, of outputs "b k"."""
    return (rule.probabilities(output.double()) > 0.5).sum(dim=1)


class Ordinal(EntryTask):
    """One of K classes in order, by K - 1 questions: "is the class above k?".

    Losses receive logits "b k" and classes "b", int64, and give "b k".
    """

    output: ClassVar[Literal["dense", "vector"]] = "vector"
    label_kind: LabelKind = "class"
    goal = Goal("mae", perfect=0.0)
    losses: ClassVar[Mapping[str, type[Loss]]] = {"corn": Corn, "coral": Coral}

    def __init__(
        self, num_classes: int, ignore_index: int = -1, loss: Loss | None = None, class_names: Sequence[str] = ()
    ) -> None:
        self.num_classes = num_classes
        self.num_outputs = num_classes - 1
        self.ignore_index = ignore_index
        self.entry_loss = loss or Corn()
        self.class_names = class_names
        self.shares_weights = isinstance(self.entry_loss, Coral)
        # How outputs are read: those of a loss of the user's own, as CORAL's.
        self._rule = self.entry_loss if isinstance(self.entry_loss, OrdinalLoss) else Coral()

    def fit(self, label: Tensor) -> Tensor:
        """The logit of each question's share of yes."""
        return self._rule.fit(label[label != self.ignore_index].long(), self.num_outputs)

    def entry_weights(self, label: Tensor) -> Tensor:
        return (label != self.ignore_index)[:, None].expand(-1, self.num_outputs)

    def stand_in(self, label: Tensor) -> Tensor:
        return label.masked_fill(label == self.ignore_index, 0)

    def marked(self, label: Tensor) -> Tensor:
        return label.masked_fill(label == self.ignore_index, -1)

    def blank(self, num_images: int, size: tuple[int, int]) -> Tensor:  # noqa: ARG002  one signature for all
        return torch.full((num_images,), self.ignore_index)

    def metrics(self) -> OrdinalMetrics:
        return OrdinalMetrics(self.num_classes, self.ignore_index, self._rule)

    def predict(self, output: Tensor, size: tuple[int, int]) -> Tensor:  # noqa: ARG002  one signature for all
        """The probability of each question's yes, "b k", float64."""
        return self._rule.probabilities(output.double())

    def as_label(self, prediction: Tensor) -> Tensor:
        return (prediction > 0.5).sum(dim=1)

    def as_data(self, prediction: Tensor) -> dict[str, Any]:
        """The class, by name or number, and the probability of a higher one than each but the last."""
        names = names_of(self.class_names, self.num_classes)
        chosen = names[int(self.as_label(prediction[None]))]
        return {"class": chosen, "above": dict(zip(names[:-1], prediction.tolist(), strict=True))}

    def caption(self, values: Tensor, is_label: bool) -> list[str]:
        """The name of the class, or its number."""
        return caption_classes(values if is_label else classes_of(values, self._rule), self.class_names)

    def unlabelled(self, label: Tensor) -> Tensor:
        return torch.full_like(label, self.ignore_index)

    def bad_samples(self, label: Tensor) -> Tensor:
        """Samples with a class out of range."""
        return samples_out_of_range(label, self.num_classes, self.ignore_index)

    def check_labels(self, label: Tensor) -> None:
        check_classes(label, 1, self.num_classes, self.ignore_index)
