"""What a balancing method remembers of each task, of which a step may have some only, and the base of such methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtl.optim.balance.gradient_method import GradientMethod
from mtl.optim.balance.subset import Subset


class TaskMemory:
    """Tensors whose first axis has an entry a task, by name.

    Entries are zeros until they are written. Those of tasks that a step has not stay as they are. A tensor whose other
    axes change in length, as that of gradients does with what a phase trains, begins with zeros again, and so does
    `counts`, the number of steps that each task was in.
    """

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks
        self._values: dict[str, Tensor] = {}

    def read(self, name: str, tasks: Subset, like: Tensor) -> Tensor:
        """The entries of some tasks, in the type, shape and device of `like`, whose first axis has one for each."""
        held = self._values.get(name)
        if held is None or held.shape[1:] != like.shape[1:]:
            if held is not None:
                self._values.pop("counts", None)
            held = like.new_zeros(self._num_tasks, *like.shape[1:])
        held = held.to(like)
        self._values[name] = held
        return held[tasks.index(held.device)]

    def write(self, name: str, tasks: Subset, values: Tensor) -> None:
        """Replaces the entries of some tasks, which were read before."""
        held = self._values[name]
        # Not in place: a copy of the state may hold it.
        self._values[name] = held.index_copy(0, tasks.index(held.device), values.detach().to(held))

    def count(self, tasks: Subset, like: Tensor) -> Tensor:
        """How many steps each of these tasks was in, this one included, "t"."""
        counts = self.read("counts", tasks, like) + 1
        self.write("counts", tasks, counts)
        return counts

    def state(self) -> dict[str, Any]:
        return dict(self._values)

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._values = {name: value.clone() for name, value in state.items()}


class RememberingMethod(GradientMethod):
    """A method whose state is a memory of each task."""

    def __init__(self, num_tasks: int) -> None:
        self._memory = TaskMemory(num_tasks)

    def state(self) -> dict[str, Any]:
        return {"memory": self._memory.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self._memory.load_state(state["memory"])
