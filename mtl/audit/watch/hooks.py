"""The hooks of one open phase: on steps, on backwards, and on every registration in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtl.audit.watch.liveness import StepCounts
from mtl.audit.watch.optimizers import HoldsParameters, fires_hooks
from mtl.audit.watch.phase import PhaseWatch
from mtl.audit.watch.places import is_uninitialized


class Hooks:
    """Registers the hooks of a phase; `remove` leaves none of them."""

    def __init__(
        self,
        watch: PhaseWatch,
        attached: Sequence[Optimizer],
        before_step: Callable[[], None],
        after_step: Callable[[bool, Optimizer], None],
    ) -> None:
        """Args:
        watch: The phase.
        attached: The optimizers whose hooks replace the calls in the loop.
        before_step: Called before each step of one of these.
        after_step: Called after each step of any optimizer: whether it is attached, and which it is.
        """
        self._watch = watch
        self._attached = attached
        self._before_step = before_step
        self._after_step = after_step
        self._of_optimizer: dict[int, list[RemovableHandle]] = {}
        # An inserted layer is observed when it is inserted, and costs nothing until then.
        self._of_torch: list[RemovableHandle] = [
            torch_module.register_module_module_registration_hook(partial(_on_registration, watch, "_modules")),
            torch_module.register_module_parameter_registration_hook(partial(_on_registration, watch, "_parameters")),
            torch_module.register_module_buffer_registration_hook(partial(_on_registration, watch, "_buffers")),
        ]
        self._of_backward: RemovableHandle | None = None

    def register_all(self, optimizers: Sequence[HoldsParameters]) -> None:
        """Hooks the steps of all optimizers; with any, backwards too: a loop that never steps is known by these."""
        for optimizer in optimizers:
            self.register(optimizer)
        if optimizers and (tensors := self._watch.requiring_grad()):
            self._of_backward = register_multi_grad_hook(tensors, lambda _: self._record_backward(), mode="any")

    def register(self, optimizer: HoldsParameters) -> None:
        """Hooks the steps of an optimizer, if it calls hooks."""
        if not fires_hooks(optimizer) or id(optimizer) in self._of_optimizer:
            return
        handles = self._of_optimizer.setdefault(id(optimizer), [])
        is_attached = any(each is optimizer for each in self._attached)
        if is_attached:
            handles.append(optimizer.register_step_pre_hook(lambda *_: self._before_step()))
        handles.append(optimizer.register_step_post_hook(partial(self._record_step, is_attached)))
        held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.is_leaf]
        if probes := [each for each in held if not is_uninitialized(each)]:
            # One parameter stands for all: a hook on each would cost more than the rest of the audit.
            handles += _DroppedGradients(self._watch.steps, optimizer, min(probes, key=Tensor.numel)).register()

    @contextmanager
    def suspended(self, optimizers: Sequence[HoldsParameters]) -> Iterator[None]:
        """Inside the block no step and no backward calls a hook."""
        self.unregister(list(self._of_optimizer))
        try:
            yield
        finally:
            for optimizer in optimizers:
                self.register(optimizer)

    def unregister(self, optimizers: Iterable[int]) -> None:
        """Removes the hooks of some optimizers, by identity."""
        for handle in [handle for each in optimizers for handle in self._of_optimizer.pop(each, [])]:
            handle.remove()

    def stop_counting_backwards(self) -> None:
        """Once a step was taken, backwards need not be counted, unless an optimizer is attached."""
        if self._of_backward is not None and not self._attached:
            self._of_backward.remove()
            self._of_backward = None

    def remove(self) -> None:
        """Removes all hooks."""
        self.unregister(list(self._of_optimizer))
        for handle in [*self._of_torch, *([self._of_backward] if self._of_backward is not None else [])]:
            handle.remove()

    def _record_backward(self) -> None:
        self._watch.steps.num_backwards += 1
        if self._attached:
            # A change for the forward that is undone before the step can only be observed now.
            self._watch.check_writes()

    def _record_step(self, is_attached: bool, optimizer: Optimizer, *_: Any) -> None:
        self._after_step(is_attached, optimizer)
        self.stop_counting_backwards()


class _DroppedGradients:
    """Counts the gradients of one parameter that were cleared before its optimizer stepped.

    Not counted are those inside a step (a closure), those before the first step (an analysis), and those of a loop that
    computes `grad` itself, such as one that projects the gradients of its tasks.
    """

    def __init__(self, steps: StepCounts, optimizer: Optimizer, probe: Tensor) -> None:
        self._steps = steps
        self._optimizer = optimizer
        self._probe = probe
        self._is_stepping = False
        # The gradient after the last backward, its version counter, and the optimizer's steps at that time.
        self._last: tuple[Tensor, int, int] | None = None

    def register(self) -> list[RemovableHandle]:
        probe: Any = self._probe
        return [
            probe.register_hook(self._before_accumulation),
            probe.register_post_accumulate_grad_hook(self._after_accumulation),
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def _before_accumulation(self, _: Tensor) -> None:
        num_steps = self._steps.taken[id(self._optimizer)]
        if self._is_stepping or self._last is None or not num_steps:
            return
        left, version, then = self._last
        if then != num_steps:
            return
        # On a device, a look at the zeros would be a sync.
        is_zeroed = self._probe.grad is left and left._version != version and left.device.type == "cpu"
        if self._probe.grad is None or (is_zeroed and not bool(left.any())):
            self._steps.dropped[id(self._optimizer)] += 1

    def _after_accumulation(self, probe: Tensor) -> None:
        if probe.grad is not None:
            self._last = probe.grad, probe.grad._version, self._steps.taken[id(self._optimizer)]

    def _before_step(self, *_: Any) -> None:
        self._is_stepping = True
        if self._last is not None and self._probe.grad is not None and self._probe.grad is not self._last[0]:
            # The loop computed this gradient itself, from the ones before.
            self._steps.dropped[id(self._optimizer)] = 0

    def _after_step(self, *_: Any) -> None:
        self._is_stepping = False


def _on_registration(watch: PhaseWatch, registry: str, module: nn.Module, name: str, value: object) -> None:
    """Called by torch at every registration; a buffer that is assigned again is found by its place."""
    held = vars(module).get(registry) or {}
    if name not in held or (registry != "_buffers" and held[name] is not value):
        watch.record_registration(module)
