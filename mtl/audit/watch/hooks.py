"""The hooks of one open phase: on steps, on backwards, and on what torch registers anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtl.audit.watch.liveness import Steps
from mtl.audit.watch.membership import HoldsParameters, fires_hooks
from mtl.audit.watch.phase import PhaseWatch
from mtl.audit.watch.places import is_unmade


class Hooks:
    """Hears what happens in a phase; `remove` leaves no hook behind."""

    def __init__(
        self,
        watch: PhaseWatch,
        attached: Sequence[Optimizer],
        before_step: Callable[[], None],
        after_step: Callable[[bool, Optimizer], None],
    ) -> None:
        """Args:
        watch: The phase.
        attached: The optimizers whose steps take the place of calls in the loop.
        before_step: Called before each step of one of these.
        after_step: Called after each step of any optimizer: whether it is attached, and which it is.
        """
        self._watch = watch
        self._attached = attached
        self._before_step = before_step
        self._after_step = after_step
        self._of_optimizer: dict[int, list[RemovableHandle]] = {}
        # A layer that is put in is seen when it is, and costs nothing until then.
        self._of_torch: list[RemovableHandle] = [
            torch_module.register_module_module_registration_hook(partial(_note_new, watch, "_modules")),
            torch_module.register_module_parameter_registration_hook(partial(_note_new, watch, "_parameters")),
            torch_module.register_module_buffer_registration_hook(partial(_note_new, watch, "_buffers")),
        ]
        self._of_backward: RemovableHandle | None = None

    def listen(self, optimizer: HoldsParameters) -> None:
        """Hears the steps of an optimizer, if it tells of them."""
        if not fires_hooks(optimizer) or id(optimizer) in self._of_optimizer:
            return
        handles = self._of_optimizer.setdefault(id(optimizer), [])
        is_attached = any(each is optimizer for each in self._attached)
        if is_attached:
            handles.append(optimizer.register_step_pre_hook(lambda *_: self._before_step()))
        handles.append(optimizer.register_step_post_hook(partial(self._note_step, is_attached)))
        held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.is_leaf]
        if probes := [each for each in held if not is_unmade(each)]:
            # One stands for all: a hook on each would cost more than the rest of the audit.
            handles += _Dropped(self._watch.steps, optimizer, min(probes, key=Tensor.numel)).listen()

    def listen_to_backwards(self) -> None:
        """Counts backwards: a loop that never steps is seen by these alone."""
        if trained := self._watch.trained():
            self._of_backward = register_multi_grad_hook(trained, lambda _: self._note_backward(), mode="any")

    def drop(self, optimizers: Iterable[int]) -> None:
        """Hears nothing more of some optimizers, by identity."""
        for handle in [handle for each in optimizers for handle in self._of_optimizer.pop(each, [])]:
            handle.remove()

    def note_step(self) -> None:
        """Once there was a step, backwards need not be counted; with an attached optimizer, each is looked at."""
        if self._of_backward is not None and not self._attached:
            self._of_backward.remove()
            self._of_backward = None

    def remove(self) -> None:
        """Takes all hooks away."""
        self.drop(list(self._of_optimizer))
        for handle in [*self._of_torch, *([self._of_backward] if self._of_backward is not None else [])]:
            handle.remove()

    def _note_backward(self) -> None:
        self._watch.steps.num_backwards += 1
        if self._attached:
            # What was changed for the forward and is put back before the step can only be seen now.
            self._watch.note_writes()

    def _note_step(self, is_attached: bool, optimizer: Optimizer, *_: Any) -> None:
        self._after_step(is_attached, optimizer)
        self.note_step()


class _Dropped:
    """Counts the gradients of one parameter that were cleared before its optimizer stepped.

    Not counted are those inside a step (a closure), those before the first step (an analysis), and those of a loop that
    puts gradients together itself, such as one that projects those of its tasks.
    """

    def __init__(self, steps: Steps, optimizer: Optimizer, probe: Tensor) -> None:
        self._steps = steps
        self._optimizer = optimizer
        self._probe = probe
        self._is_stepping = False
        # The gradient as the last backward left it, how often it had been written to, and the steps taken by then.
        self._last: tuple[Tensor, int, int] | None = None

    def listen(self) -> list[RemovableHandle]:
        probe: Any = self._probe
        return [
            probe.register_hook(self._before_it_is_added),
            probe.register_post_accumulate_grad_hook(self._after_it_is_added),
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def _before_it_is_added(self, _: Tensor) -> None:
        num_steps = self._steps.taken[id(self._optimizer)]
        if self._is_stepping or self._last is None or not num_steps:
            return
        left, version, then = self._last
        if then != num_steps:
            return
        # On a device, nobody waits to know whether it was set to zero.
        is_zeroed = self._probe.grad is left and left._version != version and left.device.type == "cpu"
        if self._probe.grad is None or (is_zeroed and not bool(left.any())):
            self._steps.dropped[id(self._optimizer)] += 1

    def _after_it_is_added(self, probe: Tensor) -> None:
        if probe.grad is not None:
            self._last = probe.grad, probe.grad._version, self._steps.taken[id(self._optimizer)]

    def _before_step(self, *_: Any) -> None:
        self._is_stepping = True
        if self._last is not None and self._probe.grad is not None and self._probe.grad is not self._last[0]:
            # Put there by the loop: the ones before it were made use of.
            self._steps.dropped[id(self._optimizer)] = 0

    def _after_step(self, *_: Any) -> None:
        self._is_stepping = False


def _note_new(watch: PhaseWatch, registry: str, module: nn.Module, name: str, value: object) -> None:
    """What torch calls when something is registered anywhere; a buffer that is assigned anew is found by its place."""
    held = vars(module).get(registry) or {}
    if name not in held or (registry != "_buffers" and held[name] is not value):
        watch.note_registration(module)
