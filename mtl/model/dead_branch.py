"""Parameters that cannot train, since a frozen tensor of zeros stands between them and every loss.

timm's ResNets begin with zeros in the last norm of each block: whoever freezes the norms of such a model without
trained weights keeps every branch at zero, and its convolutions permanently get a gradient of exactly zero. The same
holds for a layer scale or a convolution that begins at zero. One that trains as well is no obstacle: it moves with the
first step.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mtl.model import MultiTaskModel
from mtl.model.trunk import in_eval_mode

_NUM_IMAGES = 2


@dataclass(frozen=True)
class DeadBranch:
    """Parameters that cannot train in a phase, and the zeros that stop them.

    Attributes:
        parameters: Trainable parameters whose gradient is zero.
        zeros: Frozen tensors, zero in every element, that stand in their way.
    """

    parameters: tuple[str, ...]
    zeros: tuple[str, ...]


def find_dead_branch(
    model: MultiTaskModel,
    tasks: Collection[str],
    trainable: Collection[str],
    moved: Collection[str] = (),
) -> DeadBranch | None:
    """Looks for parameters whose gradient is zero as long as frozen tensors are.

    Backwards through two random images in eval mode: one with the model as it is, and, if frozen zeros are found to
    stop the gradient of something there, others with those filled. What has a gradient then was dead because of them.
    All of it is done with a copy of the model, and only if there are frozen zeros at all; biases, which are added, do
    not count.

    Args:
        model: A model with its weights, not sharded, with no freeze enforced yet.
        tasks: The tasks whose losses are active.
        trainable: Names of the parameters that train.
        moved: Names of those that have trained by then, and are no longer what they are now.

    Returns:
        What was found; None if nothing is dead.
    """
    at_zero = [name for name, p in model.named_parameters() if p.is_floating_point() and p.numel() and not p.any()]
    # Trainable parameters do not stay at zero, and a frozen zero that has trained before has left it.
    moves = [name for name in at_zero if name in trainable or name in moved]
    frozen = [name for name in at_zero if name not in moves and "bias" not in name.rpartition(".")[2]]
    if not frozen or not trainable:
        return None
    probe = copy.deepcopy(model)
    parameters = {name: p for name, p in probe.named_parameters() if p.is_floating_point()}
    _fill(parameters[name] for name in moves)
    trained = {name: p for name, p in parameters.items() if name in trainable}
    return _search(probe, tasks, trained, {name: parameters[name] for name in frozen})


def _search(
    model: MultiTaskModel,
    tasks: Collection[str],
    trained: Mapping[str, nn.Parameter],
    zeros: Mapping[str, nn.Parameter],
) -> DeadBranch | None:
    """Fills the zeros that stop a gradient until none does; what has a gradient then, and had none before, was dead."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in [*trained.values(), *zeros.values()]:
        parameter.requires_grad_(True)
    left = dict(zeros)
    history = [_stopped(model, tasks, trained, left)]
    while filled := {zero for each in history[-1].values() for zero in each}:
        _fill(left.pop(name) for name in zeros if name in filled)
        history.append(_stopped(model, tasks, trained, left))
    revived = [name for name in history[0] if name not in history[-1]]
    found = {zero for stopped in history for name in revived for zero in stopped.get(name, ())}
    return DeadBranch(tuple(revived), tuple(name for name in zeros if name in found)) if revived else None


def _fill(tensors: Iterable[Tensor]) -> None:
    """Gives tensors small values above zero, always the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(0.05 + 0.1 * torch.rand(tensor.shape, generator=generator))


def _stopped(
    model: MultiTaskModel,
    tasks: Collection[str],
    trained: Mapping[str, nn.Parameter],
    zeros: Mapping[str, nn.Parameter],
) -> dict[str, set[str]]:
    """The parameters with a gradient of zero, each with those of the zeros that stop it."""
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    images = model.example_inputs(_NUM_IMAGES, "cpu").random_(0, 256, generator=generator).to(device)
    with in_eval_mode(model), torch.enable_grad():
        outputs = [output for output in model(images, tasks).values() if output.requires_grad]
        if not outputs:
            return {}
        graph = _Graph.of(outputs)
        stops = graph.watch({id(parameter): name for name, parameter in zeros.items()})
        noise = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, list(trained.values()), noise, allow_unused=True)
    return {
        name: graph.names_above(parameter, stops)
        for (name, parameter), gradient in zip(trained.items(), gradients, strict=True)
        if gradient is not None and not gradient.any()
    }


# A node of autograd's graph, and one of its inputs by number.
_Edge = tuple[Any, int]


@dataclass
class _Stop:
    """A node at which a tensor of zeros meets another tensor.

    Attributes:
        zeros: The names of such tensors, by the number of the input by which they come in.
        closed: The numbers of its other inputs towards which only zeros left it, although a gradient came.
    """

    zeros: dict[int, str] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)

    def record(self, left: tuple[Tensor | None, ...], came: tuple[Tensor | None, ...]) -> None:
        """Records the gradients by input and by output: a hook of the node."""
        if any(each is not None and bool(each.any()) for each in came):
            zero = {number for number, each in enumerate(left) if each is not None and not each.any()}
            self.closed |= zero - self.zeros.keys()


@dataclass(frozen=True)
class _Graph:
    """The graph of a backward.

    Attributes:
        leaves: The nodes that stand for parameters, by identity.
        users: By node, the edges by which it goes into others.
    """

    leaves: dict[int, Any]
    users: dict[Any, list[_Edge]]

    @classmethod
    def of(cls, outputs: Collection[Tensor]) -> _Graph:
        leaves: dict[int, Any] = {}
        users: dict[Any, list[_Edge]] = {}
        stack: list[Any] = [output.grad_fn for output in outputs]
        seen = set(stack)
        while stack:
            node = stack.pop()
            if (variable := getattr(node, "variable", None)) is not None:
                leaves[id(variable)] = node
            for number, (following, _) in enumerate(node.next_functions):
                if following is None:
                    continue
                users.setdefault(following, []).append((node, number))
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
        return cls(leaves, users)

    def watch(self, names: Mapping[int, str]) -> dict[Any, _Stop]:
        """Hooks each node at which one of some tensors meets another one: it records whether it stops the backward."""
        stops: dict[Any, _Stop] = {}
        stack = [(self.leaves[each], name) for each, name in names.items() if each in self.leaves]
        while stack:
            node, name = stack.pop()
            for user, number in self.users.get(node, ()):
                if sum(following is not None for following, _ in user.next_functions) > 1:
                    stops.setdefault(user, _Stop()).zeros[number] = name
                else:
                    # A view, a cast: still the tensor alone.
                    stack.append((user, name))
        for node, stop in stops.items():
            node.register_hook(stop.record)
        return stops

    def names_above(self, parameter: nn.Parameter, stops: Mapping[Any, _Stop]) -> set[str]:
        """The zeros at which a gradient ends on its ways to a parameter."""
        stack = [self.leaves[id(parameter)]]
        seen, found = set(stack), set[str]()
        while stack:
            for user, number in self.users.get(stack.pop(), ()):
                stop = stops.get(user)
                if stop is not None and number in stop.closed:
                    found.update(stop.zeros.values())
                elif user not in seen:
                    seen.add(user)
                    stack.append(user)
        return found
