"""Analysis of the tasks' gradients on a trunk: their norms by depth group, and which tasks are in conflict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mtl.patterns.module_tree import depth_groups
from mtl.runtime.tensors import local
from mtl.runtime.text import condense

# 8 MB a task as float64.
_MOST_COLUMNS = 1 << 20


@dataclass(frozen=True)
class Pair:
    """How the gradients a and b of two tasks relate, over all analysed parameters.

    Source: Yu et al., Gradient Surgery for Multi-Task Learning, arXiv 2001.06782, Definitions 1 and 2.

    Attributes:
        tasks: The two tasks.
        cosine: a·b / (|a| |b|), -1 to 1; NaN if one of them is zero or not finite.
        magnitude_similarity: 2 |a| |b| / (|a|² + |b|²), 0 to 1: 1 if they are of one length, near 0 if one dominates;
            NaN if both are zero or one is not finite.
    """

    tasks: tuple[str, str]
    cosine: float
    magnitude_similarity: float

    @property
    def conflicts(self) -> bool:
        """Whether the cosine is below 0 (Definition 1); False if it is NaN."""
        return self.cosine < 0


@dataclass(frozen=True)
class GradientAnalysis:
    """The gradients of some tasks on some groups of parameters.

    Attributes:
        groups: The groups with a parameter that requires a gradient, in the order given.
        norms: By task and group, the gradient's Euclidean norm; 0 where a gradient is zero or the task's loss does not
            depend on the group, NaN where it is not finite.
        total_norms: By task, the norm over all groups.
        reached: By task, the groups with a parameter that its loss depends on, however small the gradient.
        pairs: Every two tasks, in order; none if there is one task only.
    """

    groups: tuple[str, ...]
    norms: dict[str, dict[str, float]]
    total_norms: dict[str, float]
    reached: dict[str, frozenset[str]]
    pairs: tuple[Pair, ...]

    @property
    def conflict_share(self) -> float:
        """The share of pairs in conflict among those that have a cosine; NaN if none has one."""
        defined = [pair for pair in self.pairs if not math.isnan(pair.cosine)]
        return sum(pair.conflicts for pair in defined) / len(defined) if defined else math.nan

    @property
    def unreached(self) -> tuple[str, ...]:
        """The groups that no task reaches."""
        return tuple(group for group in self.groups if not any(group in reached for reached in self.reached.values()))

    def to_row(self) -> dict[str, float]:
        """The numbers by metric name; without the norms of groups that a task does not reach."""
        row: dict[str, float] = {}
        for task, norms in self.norms.items():
            row[f"grad/norm/{task}"] = self.total_norms[task]
            row |= {f"grad/norm/{task}/{group}": norms[group] for group in self.groups if group in self.reached[task]}
        for pair in self.pairs:
            row["grad/cosine/{}/{}".format(*pair.tasks)] = pair.cosine
            row["grad/magnitude_similarity/{}/{}".format(*pair.tasks)] = pair.magnitude_similarity
        if self.pairs:
            row["grad/conflict_share"] = self.conflict_share
        return row | {"grad/unreached": len(self.unreached)}

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> GradientAnalysis:
        """The inverse of `to_row`, null read as NaN; groups sorted by name, without those that no task reaches."""
        total_norms: dict[str, float] = {}
        norms: dict[str, dict[str, float]] = {}
        cosines: dict[tuple[str, str], float] = {}
        similarities: dict[tuple[str, str], float] = {}
        for key, value in row.items():
            match key.split("/", 3):
                case ["grad", "norm", task]:
                    total_norms[task], norms[task] = _number(value), {}
                case ["grad", "norm", task, group]:
                    norms[task][group] = _number(value)
                case ["grad", "cosine", a, b]:
                    cosines[a, b] = _number(value)
                case ["grad", "magnitude_similarity", a, b]:
                    similarities[a, b] = _number(value)
        groups = tuple(sorted({group for each in norms.values() for group in each}))
        return GradientAnalysis(
            groups,
            {task: {group: each.get(group, 0.0) for group in groups} for task, each in norms.items()},
            total_norms,
            {task: frozenset(each) for task, each in norms.items()},
            tuple(Pair(tasks, cosine, similarities[tasks]) for tasks, cosine in cosines.items()),
        )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def trunk_groups(trunk: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of a trunk by depth group; groups without any are left out.

    Returns:
        By name: the group's number from the input on, frozen groups counted, and its first module: `03 blocks.1.0`.
    """
    parameters = dict(trunk.named_parameters())
    # Of a tensor with several names, the first.
    groups = [[name for name in group if name in parameters] for group in depth_groups(trunk)]
    width = max(2, len(str(len(groups) - 1)))
    named = {f"{n:0{width}d} {condense(group, parameters)[0]}": group for n, group in enumerate(groups)}
    trainable = {
        name: [parameters[each] for each in group if parameters[each].requires_grad] for name, group in named.items()
    }
    return {name: group for name, group in trainable.items() if group}


def analyse(losses: Mapping[str, Tensor], groups: Mapping[str, Sequence[nn.Parameter]]) -> GradientAnalysis | None:
    """Compares the gradients of losses on groups of parameters, before the backward of a training step.

    One backward per task. It leaves every `.grad` unchanged and keeps the graph, so that the training backward gives
    the same bits; hooks registered on a parameter are called as in any backward. Memory: one gradient of all groups per
    task, and for one parameter at a time the gradients of all tasks in float64. Sums are float64, in which squares of
    float32 and bfloat16 gradients neither overflow nor vanish. One sync with the device.

    Args:
        losses: By task, a scalar. Not slices of one stacked tensor: through it every task would seem to reach the
            parameters of all. One without a graph reaches nothing.
        groups: By name, parameters. Frozen ones, and groups of frozen ones only, are left out. No parameter may be in
            two groups.

    Returns:
        The analysis; None if there is no loss, or no trainable parameter.
    """
    trainable = {name: [each for each in group if each.requires_grad] for name, group in groups.items()}
    trainable = {name: group for name, group in trainable.items() if group}
    if not losses or not trainable:
        return None
    parameters = [parameter for group in trainable.values() for parameter in group]
    # By task and parameter; None where the loss does not depend on the parameter, which is not the same as zero.
    gradients = [loss_gradients(loss, parameters) for loss in losses.values()]
    reached: dict[str, frozenset[str]] = {}
    for task, own in zip(losses, gradients, strict=True):
        left = iter(own)
        has = {name: [next(left) is not None for _ in group] for name, group in trainable.items()}
        reached[task] = frozenset(name for name, each in has.items() if any(each))
    by_parameter = zip(parameters, zip(*gradients, strict=True), strict=True)
    products = [torch.stack([_products(*next(by_parameter)) for _ in group]).sum(dim=0) for group in trainable.values()]
    return _analysis(tuple(losses), tuple(trainable), torch.stack(products).tolist(), reached)


def loss_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradients of a loss on parameters, None where it does not depend on them; `.grad` and graph are unchanged.

    DDP does not average them: they are this rank's own. Other tensors of the graph may be given as well.
    """
    if not loss.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)


def sharded_gradients(
    outputs: Sequence[Tensor], tensors: Sequence[Tensor], given: Sequence[Tensor] | None = None
) -> list[Tensor | None]:
    """As `torch.autograd.grad` where parameters are sharded (FSDP): averaged over ranks, this rank's shards of them.

    FSDP gathers parameters, and spreads their gradients, in hooks that only a whole backward calls. Every rank has to
    call this, in the same order, for outputs whose graphs have the same parameters on each. No `.grad` is set before
    or after it. The graph is kept.

    Args:
        outputs: Scalars, or tensors with a gradient of each in `given`.
        tensors: All leaves of the graph: sharded parameters, and others.
        given: The gradients of the outputs.

    Returns:
        For each of the tensors its gradient; None where no output depends on it.
    """
    if not any(output.requires_grad for output in outputs):
        return [None] * len(tensors)
    torch.autograd.backward(outputs, given, retain_graph=True)
    found = [None if each.grad is None else local(each.grad) for each in tensors]
    for each in tensors:
        each.grad = None
    return found


def inner_products(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """The products of rows "t n" with each other, or with others: "t t", float64, where squares do not vanish.

    Columns are converted in parts, since float64 takes twice the memory.
    """
    total = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    parts = [torch.split(each, _MOST_COLUMNS, dim=1) for each in (rows, rows if others is None else others)]
    for part, other in zip(*parts, strict=True):
        exact = part.double()
        total += exact @ (exact if others is None else other.double()).T
    return total


def row_squares(rows: Tensor) -> Tensor:
    """The squares of the Euclidean norms of rows "t n": "t", float64."""
    total = rows.new_zeros(len(rows), dtype=torch.float64)
    for part in torch.split(rows, _MOST_COLUMNS, dim=1):
        total += part.double().square().sum(dim=1)
    return total


def _products(parameter: nn.Parameter, gradients: Sequence[Tensor | None]) -> Tensor:
    """The inner products of the tasks' gradients on one parameter, "t t", float64."""
    same_shape = [torch.zeros_like(parameter) if gradient is None else gradient for gradient in gradients]
    return inner_products(rearrange(torch.stack(same_shape), "t ... -> t (...)").detach())


def _analysis(
    tasks: tuple[str, ...],
    groups: tuple[str, ...],
    products: list[list[list[float]]],
    reached: dict[str, frozenset[str]],
) -> GradientAnalysis:
    """Args: `products` are inner products of the tasks' gradients by group, "g t t"."""
    numbers = range(len(tasks))
    norms = {
        task: {name: _root(own[t][t]) for name, own in zip(groups, products, strict=True)}
        for t, task in enumerate(tasks)
    }
    total = [_root(sum(own[t][t] for own in products)) for t in numbers]
    pairs = [
        Pair(
            (tasks[a], tasks[b]),
            _cosine(sum(own[a][b] for own in products), total[a], total[b]),
            _magnitude_similarity(total[a], total[b]),
        )
        for a, b in combinations(numbers, 2)
    ]
    return GradientAnalysis(groups, norms, dict(zip(tasks, total, strict=True)), reached, tuple(pairs))


def _root(square: float) -> float:
    return math.sqrt(square) if math.isfinite(square) else math.nan


def _cosine(product: float, norm_a: float, norm_b: float) -> float:
    if not norm_a or not norm_b or math.isnan(norm_a + norm_b):
        return math.nan
    # Rounding may leave it a little above 1.
    return max(-1.0, min(1.0, product / norm_a / norm_b))


def _magnitude_similarity(norm_a: float, norm_b: float) -> float:
    squares = norm_a * norm_a + norm_b * norm_b
    return 2 * norm_a * norm_b / squares if squares else math.nan
