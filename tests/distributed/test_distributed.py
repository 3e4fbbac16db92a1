"""Several processes: their collectives, whose gradients are averaged, and metrics over all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distributed_script
from mtl.distributed.ddp import wrap_ddp
from mtl.distributed.world import Flags, World, WorldError, shares_of_means
from mtl.tasks import Classification, Depth, Metrics, Normals, Segmentation, Task
from processes import run_in_processes
from traffic import count_traffic

# One process


def test_with_one_process_every_method_returns_its_argument() -> None:
    world, norm = World.from_environment({}), nn.BatchNorm1d(2)
    losses = torch.ones(2, requires_grad=True)
    assert world == World.alone() and world.is_alone and world.is_main
    world.start(torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    assert world.shares(indices := torch.arange(3))[0].equal(indices)
    assert world.all_reduce_flags(True, False, 2.5) == Flags(True, False, 2.5)
    assert world.global_losses(losses) is losses
    assert not world.mean(losses).requires_grad
    assert world.broadcast(value := object()) is value
    world.average_buffers(norm, ["running_mean"])
    world.merge_metrics([Depth().metrics()])
    world.barrier()
    replica = wrap_ddp(norm, ["weight"], world)
    with replica.no_sync():
        assert replica(lambda x: x + 1, 2) == 3
    assert count_traffic(replica).num_bytes == 0
    replica.close()
    world.close()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, {"RANK": "", "WORLD_SIZE": "1"}],
)
def test_an_environment_that_torchrun_does_not_make_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(WorldError, match=r"expected RANK, WORLD_SIZE, LOCAL_RANK as whole.*start with torchrun"):
        World.from_environment(environment)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(WorldError, match="expected ranks from 0 to 1, got 2"):
        World.from_environment({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


def test_shares_of_a_batch_are_the_batch_and_none_is_empty() -> None:
    batch = torch.randperm(11)
    worlds = [World(rank, 4, 0) for rank in range(4)]
    parts = [world.shares(batch)[world.rank] for world in worlds]
    assert torch.cat(parts).equal(batch) and [len(part) for part in parts] == [3, 3, 3, 2]
    with pytest.raises(WorldError, match=r"at least 4 images.*got 3; raise data.batch_size"):
        worlds[0].shares(batch[:3])


def test_only_what_requires_a_gradient_can_be_wrapped() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    for name in ("bias", "wieght"):
        with pytest.raises(WorldError, match=f"got '{name}'"):
            wrap_ddp(layer, [name], World.alone())


# Weights of means


class Exact(Task):
    """A masked mean in float64."""

    output, num_outputs, goal = "vector", 1, Depth.goal

    def fit(self, label: Tensor) -> Tensor:
        return label

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        is_there = label.isfinite()
        return ((output - label.nan_to_num()) ** 2 * is_there).sum() / is_there.sum().clamp(min=1)

    def weight(self, label: Tensor) -> Tensor:
        return label.isfinite().sum().double()

    def metrics(self) -> Metrics:
        raise NotImplementedError

    def check_labels(self, label: Tensor) -> None:
        pass


def in_parts(
    tasks: list[Task], outputs: list[Tensor], labels: list[Tensor], sizes: list[int], world: int
) -> tuple[Tensor, list[Tensor]]:
    """Losses and gradients of micro-batches of several processes, weighed by their shares; `sizes` rank by rank."""
    leaves = [output.clone().requires_grad_() for output in outputs]
    weights = torch.stack(
        [torch.stack([t.weight(part) for part in label.split(sizes)]) for t, label in zip(tasks, labels, strict=True)],
        1,
    )
    num_micro = len(sizes) // world
    total = torch.zeros(len(tasks), dtype=torch.float64)
    for rank in range(world):
        mine = slice(rank * num_micro, (rank + 1) * num_micro)
        shares = shares_of_means(weights[mine], weights.sum(0), world)
        for micro in range(num_micro):
            at = rank * num_micro + micro
            local = [
                t.loss(leaf.split(sizes)[at], label.split(sizes)[at])
                for t, leaf, label in zip(tasks, leaves, labels, strict=True)
            ]
            total = total + torch.stack(local) * shares[micro] / (num_micro * world)
    return total.detach(), list(torch.autograd.grad(total.sum(), leaves))


@pytest.mark.parametrize(("sizes", "world"), [([3, 5, 4, 4], 2), ([1, 7, 8], 3), ([9, 7], 1)])
def test_weighed_means_of_parts_are_the_mean_of_the_whole(sizes: list[int], world: int) -> None:
    tasks: list[Task] = [Exact(), Exact()]
    outputs = [torch.randn(16, 6, dtype=torch.float64) for _ in tasks]
    labels = [torch.randn(16, 6, dtype=torch.float64) for _ in tasks]
    labels[0][:3], labels[0][5, 1:] = float("nan"), float("nan")
    labels[1][:] = float("nan")  # nothing is labelled anywhere
    leaves = [output.clone().requires_grad_() for output in outputs]
    whole = torch.stack([t.loss(leaf, label) for t, leaf, label in zip(tasks, leaves, labels, strict=True)])
    expected = torch.autograd.grad(whole.sum(), leaves)
    total, grads = in_parts(tasks, outputs, labels, sizes, world)
    torch.testing.assert_close(total, whole.detach(), rtol=1e-12, atol=1e-15)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-15)


def test_so_are_those_of_the_built_in_tasks_with_uneven_labels() -> None:
    segmentation = Segmentation(3)
    label = torch.randint(0, 3, (8, 5, 5))
    segmentation.fit(label)
    tasks: list[Task] = [segmentation, Classification(3), Depth(), Normals()]
    outputs = [torch.randn(8, 3, 5, 5), torch.randn(8, 3), torch.randn(8, 1, 5, 5), torch.randn(8, 3, 5, 5)]
    normals = nn.functional.normalize(torch.randn(8, 3, 5, 5), dim=1)
    labels = [label, torch.randint(0, 3, (8,)), 1 + torch.rand(8, 1, 5, 5), normals]
    for each, missing in zip(labels, (255, -1, float("nan"), 0), strict=True):
        each[:3] = missing
    labels[0][4, 2:], labels[3][5, :, 1:] = 255, 0
    leaves = [output.clone().requires_grad_() for output in outputs]
    whole = torch.stack([t.loss(leaf, each) for t, leaf, each in zip(tasks, leaves, labels, strict=True)])
    expected = torch.autograd.grad(whole.sum(), leaves)
    # The first process has no label at all in its first micro-batch.
    total, grads = in_parts(tasks, outputs, labels, [2, 2, 3, 1], 2)
    torch.testing.assert_close(total.float(), whole.detach(), rtol=1e-6, atol=1e-7)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-8)
    assert [t.weight(each[:2]).item() for t, each in zip(tasks, labels, strict=True)] == [0, 0, 0, 0]
    assert {t.weight(each).dtype for t, each in zip(tasks, labels, strict=True)} == {torch.float64}


def test_a_task_without_a_weight_of_its_own_weighs_by_images() -> None:
    assert Task.weight(Exact(), torch.zeros(5, 2)).item() == 5


# Statistics


@pytest.mark.parametrize("task", [Segmentation(3), Classification(3), Depth(), Normals()])
def test_statistics_have_their_form_before_the_first_batch(task: Task) -> None:
    dense = task.output == "dense"
    output = torch.randn(2, task.num_outputs, *([4, 4] if dense else []))
    label = torch.zeros(2, *([4, 4] if dense else []), dtype=torch.int64)
    if isinstance(task, Depth | Normals):
        label = nn.functional.normalize(torch.rand(2, task.num_outputs, 4, 4), dim=1)
    metrics, other = task.metrics(), task.metrics()
    empty = other.state()
    metrics.update(output, label)
    state = metrics.state()
    assert [(s.shape, s.dtype) for s in empty] == [(s.shape, s.dtype) for s in state]
    assert not any(s.any() for s in empty)
    other.load_state([a + b for a, b in zip(empty, state, strict=True)])
    assert other.compute() == metrics.compute()


def test_metrics_that_do_not_say_how_they_add_up_are_for_one_process() -> None:
    class Own(Metrics):
        def update(self, output: Tensor, label: Tensor) -> None: ...

        def compute(self) -> dict[str, float]:
            return {}

    with pytest.raises(NotImplementedError, match=r"Own has no state and load_state; several ranks need them"):
        Own().state()


# Several processes


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has found."""
    folder = tmp_path_factory.mktemp("processes")
    run_in_processes(Path(distributed_script.__file__).read_text(), folder, request.param)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def test_collectives_give_every_process_the_same(found: list[dict[str, Any]]) -> None:
    size = len(found)
    ranks = range(size)
    mean = 1.0 + sum(ranks) / size
    for rank, each in enumerate(found):
        messages = each["messages"]
        assert messages["agreement"] == [True, False, 1.5]
        # The gradient of the sum of squares is 2 x at the global losses.
        assert messages["losses"] == [[mean, 4.0], [2 * mean, 8.0]]
        assert messages["buffers"] == [[sum(ranks) / size, 3.0], 7, [1.0, 1.0]]
        assert messages["object"] == {"é": [1, None]}
        assert messages["slice"] == torch.arange(7).tensor_split(size)[rank].tolist()


def test_only_trainable_gradients_of_a_phase_are_averaged(found: list[dict[str, Any]]) -> None:
    trunk, norm, head = [["trunk.weight", "trunk.bias"], ["norm.weight", "norm.bias"], ["head.weight", "head.bias"]]
    frozen = {"all": [], "heads": trunk + norm, "thawed": norm + head}
    num_bytes = {"all": 4 * (16 + 8 + 10), "heads": 4 * 10, "thawed": 4 * 16}
    for each in found:
        for phase, got in each["phases"].items():
            assert got["right"] and got["own again"], phase
            assert got["without"] == frozen[phase]
            # Nothing was sent for the micro-batch before the last.
            assert got["bytes"] == [0, num_bytes[phase], num_bytes[phase]]
            assert got["marks"] == []


def test_processes_validate_together_what_one_does_alone(found: list[dict[str, Any]]) -> None:
    first = found[0]["validation"]
    for each in found:
        assert each["validation"] == first
        assert each["validation"]["one batches"] == 3
        assert each["validation"]["many batches"] == {2: 2, 3: 1}[len(found)]
    for task, values in first["one"].items():
        exact = task in ("object", "segmentation")
        for name, value in values.items():
            is_count = exact or name in ("delta1", "median") or name.startswith("within")
            assert first["many"][task][name] == (value if is_count else pytest.approx(value, rel=1e-12))
            assert first["few"][task][name] == pytest.approx(value, rel=1e-4)
