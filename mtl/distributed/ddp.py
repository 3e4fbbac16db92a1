"""One model in every process, each on its share of the batch; DDP averages the trainable gradients of a phase."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mtl.distributed.world import World, WorldError
from mtl.runtime.tensors import is_sharded

Result = TypeVar("Result")


class _Run(nn.Module):
    """Gives DDP a forward: any computation with the module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        return compute(*arguments)


class PhaseDDP:
    """Averages the gradients of a module's trainable parameters over all processes, by DDP. Made by `wrap_ddp`."""

    def __init__(self, module: nn.Module, trainable: Collection[str], world: World) -> None:
        self._ddp: list[DistributedDataParallel] = []
        if not world.is_alone and trainable:
            self._ddp.append(_ddp_over(module, trainable))

    def __call__(self, compute: Callable[..., Result], *arguments: Any) -> Result:
        """Runs a computation whose backward comes next; the gradients are averaged while it runs.

        Args:
            compute: Uses the module's parameters; what it returns must hold the tensors of the loss.
            arguments: Are passed to it.
        """
        if self._ddp:
            result: Result = self._ddp[0](compute, *arguments)
            return result
        return compute(*arguments)

    def no_sync(self) -> AbstractContextManager[None]:
        """For every micro-batch of a step but the last: forward and backward inside it accumulate locally."""
        return self._ddp[0].no_sync() if self._ddp else nullcontext()

    def close(self) -> None:
        """Removes its hooks from the parameters, so that the next phase can be wrapped; may be called again."""
        for ddp in self._ddp:
            ddp._remove_autograd_hooks()  # type: ignore[no-untyped-call]
        self._ddp.clear()


def wrap_ddp(module: nn.Module, trainable: Collection[str], world: World) -> PhaseDDP:
    """Averages gradients over the processes from now on, for exactly these parameters.

    Args:
        module: The module, which is left as it is and has the same weights in every process.
        trainable: Names of trainable parameters that every backward reaches; DDP waits for each of them.
        world: The processes.

    Raises:
        WorldError: A name is not that of a trainable parameter.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    wrong = [name for name in trainable if name not in parameters or not parameters[name].requires_grad]
    if wrong:
        raise WorldError(f"expected names of parameters that require a gradient, got {wrong[0]!r}; enforce the freeze")
    # FSDP averages the gradients of sharded parameters by itself.
    return PhaseDDP(module, [name for name in trainable if not is_sharded(parameters[name])], world)


def _ddp_over(module: nn.Module, trainable: Collection[str]) -> DistributedDataParallel:
    run, reduced = _Run(module), {f"module.{name}" for name in trainable}
    names = [name for name, _ in run.named_parameters(remove_duplicate=False)]
    # Statistics of frozen norm layers must stay; World.average_buffers averages the trainable ones.
    ignored = [name for name in names if name not in reduced]
    ignored += [name for name, _ in run.named_buffers(remove_duplicate=False)]
    # As `_set_params_and_buffers_to_ignore_for_model`, which would leave marks on tensors that a later phase thaws.
    run._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]
    return DistributedDataParallel(
        run,
        # Weights are equal by construction, and the audit proves that frozen ones stay so.
        init_sync=False,
        gradient_as_bucket_view=True,
    )
