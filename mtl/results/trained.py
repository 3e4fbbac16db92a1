"""A trained model, by itself: what a run directory holds, as a module that predicts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl.checkpoint.files import CheckpointError
from mtl.checkpoint.load import read_weights
from mtl.checkpoint.run_files import DATA, read_model_form
from mtl.config import RunConfig, SettingError, mistake_of
from mtl.model import MultiTaskModel
from mtl.phases.setup import build_model, without_weights
from mtl.results.predict.batches import Picture, Preparer, predictions
from mtl.results.run_choice import checkpoint_of, read_run
from mtl.runtime.fingerprint import fingerprint, root
from mtl.runtime.text import hint
from mtl.tasks import Task, build_tasks
from mtl.training.autotune import autocast_for

# Of a checkpoint, what makes outputs; the rest belongs to training.
_PARTS = ("trunk.", "heads.")


@dataclass(frozen=True)
class Origin:
    """Where a trained model comes from.

    Attributes:
        run_dir: The run's directory.
        checkpoint: The name of its checkpoint: `best`, `last` or `step-<n>`.
        step: Steps that it was trained for.
        phase: The phase in which the last of them was.
        fingerprint: A digest of its parameters and buffers.
    """

    run_dir: Path
    checkpoint: str
    step: int
    phase: str
    fingerprint: str


class TrainedModel(nn.Module):
    """The model of a run in eval mode.

    Attributes:
        network: Trunk and heads.
        config: The run's configuration.
        tasks: The tasks by name.
        origin: Where it comes from.
        channels: Channels of the images that it takes; where these are 3, grey ones are taken, too.
        constants: The output of the trivial predictor by task, "c"; without those that the run had no labels of.
    """

    def __init__(self, network: MultiTaskModel, config: RunConfig, form: Mapping[str, Any], origin: Origin) -> None:
        """Args:
        network: Trunk and heads, with their weights.
        config: The run's configuration.
        form: What `data.json` says of the model.
        origin: Where they come from.
        """
        super().__init__()
        self.network = network
        self._form = {name: form[name] for name in ("channels", "tasks")}
        self.config = config
        self.origin = origin
        self.tasks = _tasks(config, self._form)
        self.eval()
        self.requires_grad_(False)

    @property
    def channels(self) -> int:
        return self.network.channels

    @property
    def constants(self) -> dict[str, Tensor]:
        return {
            name: torch.tensor([torch.nan if value is None else value for value in own["constant"]])
            for name, own in self._form["tasks"].items()
            if own["constant"] is not None
        }

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images on which it was trained."""
        return self.config.data.size

    @property
    def class_names(self) -> dict[str, list[str]]:
        """By task, the names of its classes or attributes in their order; empty where they have none."""
        return {name: list(task.class_names) for name, task in self.tasks.items()}

    def forward(self, images: Tensor, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        """The outputs of the heads, as losses take them: `predict` has them in units.

        Args:
            images: "b c h w", uint8, or floats from 0 to 1; `image_size` is what it was trained on.
            tasks: The tasks whose heads are run; all if not given.

        Returns:
            By task, "b k h w" of dense tasks, "b k" of others.
        """
        scaled = 255 * images if images.is_floating_point() else images
        outputs: dict[str, Tensor] = self.network(scaled.permute(0, 2, 3, 1), tasks)
        return outputs

    def predict(
        self, images: Picture | Sequence[Picture], tasks: Collection[str] | None = None, batch_size: int = 32
    ) -> Any:
        """Predictions for images, in the units of each task, at each image's own size.

        Images are brought to `image_size`, and maps back to the image's size. Nothing else of `data.transform.val` is
        done to them.

        Args:
            images: Paths of files, PIL images, or tensors "c h w", uint8 or floats from 0 to 1; one, or a sequence.
            tasks: The tasks; all if not given.
            batch_size: Images that the network is given at once.

        Returns:
            For each image, in order, or for the only one, by task: of a dense task a tensor on the CPU (segmentation
            classes "h w", depth metres "1 h w", normals unit vectors "3 h w", edges and saliency probabilities "h w",
            key points "k 3": column, row, height of the map); of other tasks numbers, names and probabilities.

        Raises:
            DataError: An image cannot be read, or has other channels than the model takes.
            SettingError: There is no such task.
        """
        several = isinstance(images, Sequence) and not isinstance(images, str)
        given: Sequence[Any] = images if several else [images]  # type: ignore[assignment]
        own = {name: self.tasks[name] for name in self.names_of(tasks)}
        found = [
            {name: each[name] if task.output == "dense" else task.as_data(each[name]) for name, task in own.items()}
            for each in predictions(self.network, map(self.preparer, given), own, self.autocast, batch_size)
        ]
        return found if several else found[0]

    @property
    def preparer(self) -> Preparer:
        """Brings images to the form that the network takes."""
        return Preparer(self.image_size, self.channels)

    @property
    def autocast(self) -> torch.autocast:
        """The types in which the run computed."""
        return autocast_for(self.config.precision, next(self.parameters()).device)

    def names_of(self, tasks: Collection[str] | None) -> list[str]:
        """The names of some tasks, in the run's order; of all if not given.

        Raises:
            SettingError: There is no such task.
        """
        for name in tasks or ():
            if name not in self.tasks:
                there = f"there are: {', '.join(self.tasks)}{hint(name, self.tasks)}"
                raise SettingError("tasks", f"no task {name!r}; {there}")
        return [name for name in self.tasks if tasks is None or name in tasks]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: tasks hold functions, and are made again from the configuration."""
        state = dict(self.__dict__)
        del state["tasks"]
        return state | {"config": self.config.model_dump(mode="json", exclude_none=True)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        config = RunConfig.model_validate(state["config"])
        own = state | {"config": config, "tasks": _tasks(config, state["_form"])}
        super().__setstate__(own)  # type: ignore[no-untyped-call]  # torch's


def load(run_dir: str | Path, which: str | int | None = None, device: str | torch.device = "cpu") -> TrainedModel:
    """Loads a trained model from a run's directory, which is not changed; no data is opened.

    Args:
        run_dir: Such as `runs/scenes`.
        which: `best` or `last`, or the number of a step of which there is a checkpoint; by default the best weights, or
            the last ones of a run without a score. Where the run averaged its weights, these are the averages.
        device: Where it computes.

    Raises:
        RunFileError: It is no run's directory, or one of its files is damaged.
        CheckpointError: There is no such checkpoint, it is damaged, or does not fit; or the run is not finished, and
            `which` does not say what to take.
        ConfigError: The configuration does not work here, such as a class of the user's own that is not found.
    """
    run_dir = Path(run_dir)
    return load_as(run_dir, read_run(run_dir), which, device)


def load_as(
    run_dir: Path, config: RunConfig, which: str | int | None = None, device: str | torch.device = "cpu"
) -> TrainedModel:
    """As `load`, for the images of another configuration than the run's own, of which trunk and heads are the same."""
    form = read_model_form(run_dir / DATA)
    folder = checkpoint_of(run_dir, which)
    state, tensors = read_weights(folder)
    own = {name: tensors[name] for name in tensors if name.startswith(_PARTS)}
    try:
        # The random numbers of whoever loads it are left as they were.
        with torch.random.fork_rng(devices=[]):
            network = build_model(without_weights(config), _tasks(config, form), form["channels"])
    except SettingError as error:
        raise mistake_of(config, error) from error
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        why = " ".join(str(error).partition(":")[2].split())
        size = " x ".join(map(str, config.data.size))
        raise CheckpointError(
            f"{folder} does not fit the model for images of {size} pixels ({why}); some trunks take images of the size"
            " that they were trained on only: data.image_size"
        ) from error
    digest = root({name: fingerprint(tensor) for name, tensor in own.items()})
    origin = Origin(run_dir, folder.name, int(state["step"]), state["phase"], digest)
    return TrainedModel(network, config, form, origin).to(device)


def _tasks(config: RunConfig, form: Mapping[str, Any]) -> dict[str, Task]:
    names = {name: own["classes"] for name, own in form["tasks"].items()}
    return build_tasks(config, names, {name: own["num_outputs"] for name, own in form["tasks"].items()})
