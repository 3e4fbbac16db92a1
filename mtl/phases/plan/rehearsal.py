"""The cost of a step of a phase: rehearsed on a model without weights, counted by torch itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtl.config.own import is_own
from mtl.freeze import plan_freeze
from mtl.optim.optimizers import build_optimizer, parameters_of
from mtl.phases.enter import entered
from mtl.phases.resolve import Phase
from mtl.phases.setup import ModelSetup
from mtl.runtime.console import first_line

# BatchNorm cannot train on one image.
_NUM_IMAGES = 2


@dataclass(frozen=True)
class Cost:
    """The cost of one step.

    Attributes:
        forward_flops: Floating-point operations of the forward, on one image.
        backward_flops: Of the backward.
        optimizer_state: Bytes that the optimizer keeps once it has stepped; None if it does not step such tensors.
    """

    forward_flops: int
    backward_flops: int
    optimizer_state: int | None


def rehearse(model_setup: ModelSetup, phase: Phase | None) -> Cost:
    """Runs one step of a phase on blank images.

    On the meta device, where the model should be, nothing is computed.

    Args:
        model_setup: A model and its phases.
        phase: The phase; if None, nothing is frozen, all tasks are active, and nothing is stepped.
    """
    root = model_setup.root
    with entered(root, plan_freeze(root, model_setup.fixed) if phase is None else phase.freeze.plan):
        return _rehearse(model_setup, phase)


def _rehearse(model_setup: ModelSetup, phase: Phase | None) -> Cost:
    model = model_setup.model
    evaluates = phase is not None and phase.config.evaluate_only
    # On a CPU, torch counts no attention that is computed in one piece.
    with _counter() as forward, torch.set_grad_enabled(not evaluates), sdpa_kernel(SDPBackend.MATH):
        try:
            images = model.example_inputs(_NUM_IMAGES)
            outputs = model(images, None if phase is None else phase.tasks)
            # Embeddings of images that are the same in every epoch are computed before training.
            for task in outputs if model_setup.config.data.has_views and not evaluates else ():
                if task in model_setup.teachers:
                    model_setup.teachers[task](images)
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            # It was run in eval mode before: this is what its options do in training.
            key = ("trunk", "options") if model_setup.config.trunk.options else ("trunk", "name")
            raise model_setup.config.mistake(
                key, f"the model cannot be run in train mode: {first_line(error)}"
            ) from error
    with _counter() as backward:
        if not evaluates:
            # A frozen head on a frozen trunk has an output that no gradient leaves.
            sums = [output.sum() for output in outputs.values() if output.requires_grad]
            apart = phase is not None and phase.backward_by_task
            for each in [[one] for one in sums] if apart else [sums]:
                torch.autograd.backward(each, retain_graph=apart)
    state = None if phase is None else 0 if evaluates else _optimizer_state(model_setup, phase)
    return Cost(forward.get_total_flops() // _NUM_IMAGES, backward.get_total_flops() // _NUM_IMAGES, state)


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(
    output_shape: Sequence[int],
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *settings: Any,
    **_: Any,
) -> int:
    """The gradients of input and weight each cost as much as the forward.

    torch's own formula takes a grouped convolution's weight for a full one, which makes a depthwise one dear.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = settings[:8]
    positions = prod((input_shape if transposed else output_shape)[2:])
    flops = 2 * output_shape[0] * positions * prod(weight_shape)
    return flops * (int(wanted[0]) + int(wanted[1]))


def _optimizer_state(model_setup: ModelSetup, phase: Phase) -> int | None:
    """The bytes of an optimizer's state after a step; one of torch's keeps the same for parameters of one shape."""
    unreached = {id(model_setup.root.get_parameter(name)) for name in phase.freeze.unreached}
    alike: dict[tuple[object, ...], list[nn.Parameter]] = {}
    for number, group in enumerate(phase.groups):
        for parameter in group["params"]:
            own = id(parameter) if is_own(phase.optim.optimizer.name) else (parameter.shape, parameter.dtype)
            alike.setdefault((number, own, id(parameter) in unreached), []).append(parameter)
    first = [[same[0] for key, same in alike.items() if key[0] == number] for number in range(len(phase.groups))]
    groups = [group | {"params": params} for group, params in zip(phase.groups, first, strict=True)]
    optimizer = build_optimizer(phase.optim.optimizer, groups)
    for parameter in parameters_of(optimizer):
        parameter.grad = None if id(parameter) in unreached else torch.zeros_like(parameter)
    try:
        optimizer.step()
    except Exception:  # noqa: BLE001 - an optimizer that looks at values has none to look at here, whatever it raises
        return None
    return sum(
        len(same) * value.nbytes
        for same in alike.values()
        for value in optimizer.state.get(same[0], {}).values()
        if isinstance(value, Tensor)
    )
