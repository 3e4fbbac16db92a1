"""Which parameters each task's output depends on."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl.model import MultiTaskModel
from mtl.model.trunk import in_eval_mode


def reached_parameters(model: MultiTaskModel) -> dict[str, frozenset[str]]:
    """Finds the parameters that a loss on each task's output would send a gradient to, if they asked for one.

    One forward of one blank image in eval mode, whose graph is read and not run backward. Works on any device, on the
    meta device without computing anything. The model is left as it was.

    Args:
        model: A model all of whose parameters that may train require a gradient.

    Returns:
        By task, the full names within the model, every alias included.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    with in_eval_mode(model), torch.enable_grad():
        outputs = model(model.example_inputs(1))
    return {
        task: frozenset(name for leaf in _leaves(output) for name in names.get(id(leaf), []))
        for task, output in outputs.items()
    }


def _leaves(output: Tensor) -> list[Tensor]:
    """The tensors that a backward from `output` would accumulate gradients in."""
    found: list[Tensor] = []
    stack, seen = [output.grad_fn], {output.grad_fn, None}
    while stack:
        node = stack.pop()
        if node is None:
            continue
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.append(variable)
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return found
