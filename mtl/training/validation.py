"""Validation: every task's metrics over a whole split, and how they compare with the constant prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from mtl.data import IN_THREAD, Batch, Loading, Split, validation_batches, validation_rounds
from mtl.distributed.world import ALONE, World
from mtl.model import MultiTaskModel
from mtl.model.trunk import Features, in_eval_mode
from mtl.runtime.tensors import is_sharded
from mtl.tasks import Task

Scores = dict[str, dict[str, float]]


def validate(
    model: MultiTaskModel,
    tasks: Mapping[str, Task],
    split: Split,
    batch_size: int,
    device: torch.device,
    autocast: torch.autocast,
    encode: Callable[[Batch, Collection[str]], Features],
    world: World = ALONE,
    loading: Loading = IN_THREAD,
) -> Scores:
    """Metrics of some tasks over a split, by task and name: the same on every process.

    Args:
        model: The model.
        tasks: The tasks that are measured.
        split: The images and labels.
        batch_size: Images in one batch.
        device: Where the model computes.
        autocast: The types in which it does.
        encode: Gives what the heads of these tasks read of the trunk.
        world: The processes, which share the work.
        loading: How batches are made.
    """

    def outputs() -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        for batch, counts in validation_rounds(split, batch_size, world, loading):
            batch = batch.to(device)
            with autocast:
                predicted = model.decode(encode(batch, tasks), batch.size, tasks)
            if counts:
                yield batch, predicted

    # What FSDP gathers in inference mode could not be used in training.
    is_gathered = any(is_sharded(parameter) for parameter in model.parameters())
    with in_eval_mode(model), torch.no_grad(), torch.inference_mode(not is_gathered):
        return _measure(tasks, outputs(), world)


def validate_constant(
    tasks: Mapping[str, Task], constants: Mapping[str, Tensor], split: Split, batch_size: int
) -> Scores:
    """Metrics of the trivial predictor, which gives the same output for every image and pixel."""

    def outputs() -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        for batch in validation_batches(split, batch_size):
            yield (
                batch,
                {
                    name: tasks[name].constant_output(constant, len(batch), batch.size)
                    for name, constant in constants.items()
                },
            )

    return _measure(tasks, outputs())


def _measure(
    tasks: Mapping[str, Task], outputs: Iterable[tuple[Batch, dict[str, Tensor]]], world: World = ALONE
) -> Scores:
    metrics = {name: task.every_metric() for name, task in tasks.items()}
    for batch, predicted in outputs:
        for name, each in metrics.items():
            each.update(predicted[name], batch.labels[name])
    world.merge_metrics(part for each in metrics.values() for part in each.parts)
    return {name: each.compute() for name, each in metrics.items()}


def score(tasks: Mapping[str, Task], scores: Scores, trivial: Scores) -> float:
    """`val/score`: the mean skill of the main metrics of all tasks that have labels; NaN if none has."""
    skills = [
        task.goal.skill(scores[name][task.goal.metric], trivial[name][task.goal.metric]) for name, task in tasks.items()
    ]
    known = [skill for skill in skills if not math.isnan(skill)]
    return sum(known) / len(known) if known else math.nan
