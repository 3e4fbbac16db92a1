"""Whether a model to which tasks were added still gives the outputs of the old tasks, to the bit, on images."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl.checkpoint.files import CheckpointError
from mtl.checkpoint.trained_run import TrainedRun, open_trained_run
from mtl.config import RunConfig
from mtl.model import MultiTaskModel
from mtl.model.network import MEMORY_FORMATS
from mtl.runtime.fingerprint import fingerprint, root
from mtl.runtime.tensors import byte_view
from mtl.runtime.text import count, shorten
from mtl.training.setup import RunSetup

# Of the validation split, and of the training split if that has fewer.
NUM_IMAGES = 1000


@dataclass(frozen=True)
class OutputDifference:
    """A task whose outputs are others than before.

    Attributes:
        task: The task.
        split: `val` or `train`.
        image: The index in it of the first image with another output.
        images: How many images have another output.
        max_difference: The largest absolute difference of two numbers; NaN if one of them is NaN.
    """

    task: str
    split: str
    image: int
    images: int
    max_difference: float

    def __str__(self) -> str:
        first = f"image {self.image} of {self.split} is the first of {self.images}"
        return f"{self.task}: {first}, differences up to {self.max_difference:.3g}"


@dataclass(frozen=True)
class OutputComparison:
    """The outputs of the old tasks by the old model and by the new one, in one process, on the same batches.

    Attributes:
        run: The old run's directory.
        before: The old checkpoint.
        after: The new one.
        images: Images by split.
        tasks: By task, a digest of all outputs of the old model.
        differences: The tasks whose outputs differ in a bit.
    """

    run: str
    before: str
    after: str
    images: Mapping[str, int]
    tasks: Mapping[str, str]
    differences: tuple[OutputDifference, ...]

    @property
    def equal(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """The content of `unchanged.json`."""
        return {
            **asdict(self),
            "images": sum(self.images.values()),
            "splits": dict(self.images),
            "equal": self.equal,
            "differences": [asdict(each) for each in self.differences],
        }

    def __str__(self) -> str:
        splits = " and ".join(f"{num:,} of {split}" for split, num in self.images.items())
        on = f"on {count(sum(self.images.values()), 'image')} ({splits})"
        if self.equal:
            return f"unchanged: the outputs of {', '.join(self.tasks)} are those of {self.before}, to the bit, {on}"
        lines = [f"changed: outputs are not those of {self.before}, {on}", *(f"  {each}" for each in self.differences)]
        return "\n".join(lines)


def compare_outputs(setup: RunSetup, run_dir: Path, old: TrainedRun) -> OutputComparison:
    """Compares the outputs of an old run's tasks with those of the best weights of a run that has added others.

    Both models are built from their configurations and filled from their checkpoints; nothing is shared with the model
    that was trained. The new one computes the outputs of all its tasks.

    Args:
        setup: The new run, for its data, device and tasks.
        run_dir: Its directory.
        old: The checkpoint of the old run that it began with.

    Raises:
        CheckpointError: A checkpoint cannot be read, or does not fit.
        DataError: An image cannot be read.
    """
    new, tasks = open_trained_run(run_dir), list(old.config.tasks)
    before, after = _model_of(old, setup, tasks), _model_of(new, setup, setup.tasks)
    digests: dict[str, dict[str, str]] = {task: {} for task in tasks}
    found: dict[str, OutputDifference] = {}
    num = dict[str, int]()
    with torch.inference_mode():
        for split, indices, images in _batches(setup):
            num[split] = num.get(split, 0) + len(indices)
            one, other = before(images), after(images)
            for task in tasks:
                digests[task][f"{split} {int(indices[0])}"] = fingerprint(one[task])
                _compare(task, split, indices, one[task], other[task], found)
    roots = {task: root(each) for task, each in digests.items()}
    return OutputComparison(
        str(old.folder), str(old.checkpoint), str(new.checkpoint), num, roots, tuple(found.values())
    )


def _model_of(run: TrainedRun, setup: RunSetup, tasks: Collection[str]) -> MultiTaskModel:
    """A model of some tasks in eval mode, with the weights of a checkpoint."""
    config: RunConfig = run.config
    channels = setup.model.channels
    options = config.trunk.options | ({} if channels == 3 else {"in_chans": channels})
    trunk = config.trunk.model_copy(update={"weights": "none", "options": options, "checkpointing": False})
    layout = MEMORY_FORMATS[setup.config.memory_format]
    with torch.random.fork_rng(devices=[]):
        heads = {task: config.tasks[task].head for task in tasks}
        model = MultiTaskModel(trunk, {t: setup.tasks[t] for t in tasks}, setup.config.data.size, layout, heads)
    there = run.tensors()
    if missing := [name for name in model.state_dict() if name not in there]:
        raise CheckpointError(f"{run.checkpoint} lacks {shorten(missing, 4)}")
    model.load_state_dict({name: there[name] for name in model.state_dict()})
    return model.to(setup.device).eval()


def _batches(setup: RunSetup) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The name of the split, indices and images of batches, until there are as many as are compared."""
    left, size = NUM_IMAGES, setup.config.data.batch_size
    for name, split in (("val", setup.val), ("train", setup.train)):
        for indices in torch.split(torch.arange(min(left, len(split))), size):
            yield name, indices, split.images_of(indices, None).to(setup.device)
        left -= min(left, len(split))


def _compare(
    task: str, split: str, indices: Tensor, one: Tensor, other: Tensor, found: dict[str, OutputDifference]
) -> None:
    """Adds what differs in a batch to what was found before."""
    differs = (byte_view(one.contiguous()) != byte_view(other.contiguous())).view(len(one), -1).any(dim=1)
    if not differs.any():
        return
    size = (one[differs].double() - other[differs].double()).abs().max().item()
    before = found.get(task, OutputDifference(task, split, int(indices[differs.cpu()][0]), 0, 0.0))
    # NaN stays NaN.
    largest = size if math.isnan(size) or size > before.max_difference else before.max_difference
    images = before.images + int(differs.sum())
    found[task] = OutputDifference(task, before.split, before.image, images, largest)
