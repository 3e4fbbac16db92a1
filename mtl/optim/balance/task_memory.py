"""What a balancing method remembers of each task, of which a step may have some only, and the base of such methods."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from mtl.optim.balance.gradient_method import GradientMethod, TaskGradients
from mtl.optim.balance.row_shards import RowShards, ShardedRows, row_of
from mtl.optim.balance.subset import Subset


class TaskMemory:
    """Tensors whose first axis has an entry a task, by name.

    Entries are zeros until they are written. Those of tasks that a step has not stay as they are. Of rows that are
    split over ranks each has its own entries; the state has them by parameter, as sharded tensors.
    """

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks
        self._values: dict[str, Tensor] = {}
        self._rows_of: str | None = None
        # How its rows are split; those of a checkpoint are whole.
        self._shards: RowShards | None = None

    def read(self, name: str, tasks: Subset, like: Tensor) -> Tensor:
        """The entries of some tasks, in the type, shape and device of `like`, whose first axis has one for each."""
        held = self._values.get(name)
        if held is None:
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

    def match(self, gradients: TaskGradients, kept: Collection[str]) -> None:
        """Drops what it has of rows of other parameters than those of a step, which begins with zeros again.

        That a row is as long says nothing: blocks of a trunk, trained in turns, are of one size.

        Args:
            gradients: Of the step.
            kept: Names of tensors that stay, since they do not depend on the rows.
        """
        shards = gradients.shards
        length = shards.size if shards is not None and self._shards is None else gradients.rows.shape[1]
        rows = {name: held for name, held in self._values.items() if held.ndim > 1}
        is_as_long = all(held.shape[1:] == (length,) for held in rows.values())
        # A checkpoint of before there was a key has none, and is taken to be of these rows.
        if not is_as_long or self._rows_of not in (None, gradients.rows_of):
            self._values = {name: held for name, held in self._values.items() if name in kept}
        elif shards is not None and self._shards is None:
            self._values |= {name: shards.here(held) for name, held in rows.items()}
        self._shards, self._rows_of = shards, gradients.rows_of

    def state(self) -> dict[str, Any]:
        values: dict[str, Any] = dict(self._values)
        if self._shards is not None:
            values |= {n: self._shards.by_parameter(held) for n, held in self._values.items() if held.ndim > 1}
        return values | ({} if self._rows_of is None else {"rows_of": self._rows_of})

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._rows_of = state.get("rows_of")
        values = {name: value for name, value in state.items() if name != "rows_of"}
        # A step that is undone brings back what is split as it was before; a checkpoint has whole rows.
        split = [held.shards for held in values.values() if isinstance(held, ShardedRows)]
        self._shards = split[0] if split else None
        self._values = {n: row_of(held) if isinstance(held, list) else held.clone() for n, held in values.items()}


class RememberingMethod(GradientMethod):
    """A method whose state is a memory of each task.

    If it remembers rows, its memory is emptied where the rows are those of other parameters.
    """

    # Names in the memory of what stays then.
    _kept: Collection[str] = ()

    def __init__(self, num_tasks: int) -> None:
        self._memory = TaskMemory(num_tasks)

    def _begin(self, gradients: TaskGradients) -> None:
        if self.remembers_rows:
            self._memory.match(gradients, self._kept)

    def state(self) -> dict[str, Any]:
        return {"memory": self._memory.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self._memory.load_state(state["memory"])
