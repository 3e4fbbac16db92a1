"""The meaning of each task type's raw outputs in words, and the code that turns them into predictions in units."""

from __future__ import annotations

from functools import singledispatch

from mtl.tasks import (
    Classification,
    Depth,
    Distill,
    Edges,
    Keypoints,
    MultiLabel,
    Normals,
    Ordinal,
    Regression,
    Saliency,
    Segmentation,
    Task,
)
from mtl.tasks.keypoints import STRIDE
from mtl.tasks.ordinal import Corn


@singledispatch
def meaning_of(task: Task) -> tuple[str, str]:
    """The meaning of the numbers, and how to turn them into a prediction; of a user's own class, only its name."""
    return f"the numbers of {type(task).__name__}", f"`{type(task).__name__}.predict`"


@meaning_of.register
def _(_: Segmentation) -> tuple[str, str]:
    return "a logit per class and pixel", "argmax over axis 1 is the class"


@meaning_of.register
def _(_: Classification) -> tuple[str, str]:
    return "a logit per class", "softmax over axis 1 gives probabilities, argmax the class"


@meaning_of.register
def _(task: Depth) -> tuple[str, str]:
    ends = {"at least": task.low, "at most": task.high}
    bounds = "".join(f", {which} {end:g}" for which, end in ends.items() if end is not None)
    if task.space == "bins":
        first = f"{task.low:g}"
        centres = f"centre k = {first} * ({task.high:g} / {first}) ** ((k + 0.5) / {task.num_outputs}) m"
        return "a logit per bin of depth", f"sum of softmax over axis 1 times the bins' centres; {centres}"
    if task.space == "log":
        return "log metres along the optical axis", f"exp gives metres{bounds}"
    return "metres along the optical axis", f"they are metres{bounds}"


@meaning_of.register
def _(_: Normals) -> tuple[str, str]:
    return "a surface normal, not of length 1", "divide by the length over axis 1"


@meaning_of.register
def _(_: MultiLabel) -> tuple[str, str]:
    return "a logit per attribute", "sigmoid gives the probability of each; above 0 is yes"


@meaning_of.register
def _(task: Regression) -> tuple[str, str]:
    scale = f"{task.scale:g}"
    return f"numbers in units of {scale}", "they are in the label's unit" if scale == "1" else f"times {scale}"


@meaning_of.register
def _(task: Ordinal) -> tuple[str, str]:
    if isinstance(task.entry_loss, Corn):
        asked, made = "given that it is k or above", "the cumulative product over axis 1 of sigmoid is P(class > k)"
    else:
        asked, made = "for each k", "sigmoid is P(class > k)"
    return f"a logit of `class > k`, {asked}", f"{made}; the class is how many of them are above 0.5"


@meaning_of.register(Edges)
@meaning_of.register(Saliency)
def _(_: Task) -> tuple[str, str]:
    return "a logit per pixel", "sigmoid gives the probability of yes"


@meaning_of.register
def _(_: Keypoints) -> tuple[str, str]:
    cells = f"means of {STRIDE} x {STRIDE} pixels"
    return "a heat map per point, 1 at the point", f"the highest of the {cells} is where the point is"


@meaning_of.register
def _(_: Distill) -> tuple[str, str]:
    return "the teacher's embedding", "as it is"
