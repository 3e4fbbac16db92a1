"""From files to a folder of predictions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mtl.config import SettingError
from mtl.data import DataError
from mtl.results.predict.batches import Prepared, predictions
from mtl.results.predict.inputs import Input, frames, is_video
from mtl.results.predict.label_table import FINGERPRINT, label_cell, label_file, settings_for, table_of
from mtl.results.predict.outputs import flat, map_files, write_file
from mtl.results.trained import TrainedModel
from mtl.runtime.console import progress_bar
from mtl.runtime.files import write_json, write_text
from mtl.tasks import Task


@dataclass
class PredictedFiles:
    """The files that were written, and the images that were left out.

    Attributes:
        files: The tables, and the folders with a file for each image, below the output folder.
        num_images: Images that predictions were written for.
        bad: Why the others were left out, one message each.
        training: With labels, the `data` of a configuration that trains on them.
    """

    files: list[str] = field(default_factory=list)
    num_images: int = 0
    bad: list[str] = field(default_factory=list)
    training: str = ""


class _ImageReader:
    """Prepares images one after the other, in a thread, and leaves out what cannot be read."""

    def __init__(self, model: TrainedModel, inputs: Sequence[Input], written: PredictedFiles) -> None:
        self._prepare, self._inputs, self._written = model.preparer, inputs, written
        # Those whose predictions are still to come, in order.
        self.waiting: deque[Input] = deque()

    def __iter__(self) -> Iterator[Prepared]:
        for named in self._inputs:
            try:
                for each in frames(named) if is_video(named.file) else [named]:
                    prepared = self._prepare(each.file if each.image is None else each.image)
                    self.waiting.append(Input(each.file, each.name, each.frame))
                    yield prepared
            except DataError as error:
                self._written.bad.append(str(error))


def predict_files(
    model: TrainedModel,
    inputs: Sequence[Input],
    out: Path,
    tasks: Sequence[str],
    with_labels: bool,
    batch_size: int = 32,
    quiet: bool = True,
) -> PredictedFiles:
    """Writes the predictions for some files into a folder.

    Files that exist are replaced; each appears whole, the tables last.

    Args:
        model: The trained model.
        inputs: What to predict for.
        out: The folder, made if it is not there.
        tasks: The tasks.
        with_labels: Whether to write a table that `data.name: table` reads as well.
        batch_size: Images that the network is given at once.
        quiet: Whether to show no progress bar.

    Raises:
        SettingError: There is a video, and labels are asked for, which a table has for files only; or the extra for
            videos is not installed.
        OSError: The folder cannot be written.
    """
    own = {name: model.tasks[name] for name in tasks}
    if with_labels and (videos := [each for each in inputs if is_video(each.file)]):
        raise SettingError("--to-labels", f"a table has labels of image files, and {videos[0].file} is a video")
    written = PredictedFiles()
    reader = _ImageReader(model, inputs, written)
    shown, cells, labels, folders = list[Any](), list[dict[str, Any]](), list[dict[str, str]](), dict[str, None]()
    with progress_bar(len(inputs), "predicting", quiet) as bar:
        for found in predictions(model.network, reader, own, model.autocast, batch_size):
            each = reader.waiting.popleft()
            place = {"image": str(each.file)} | ({} if each.frame is None else {"frame": each.frame})
            files, data = _write_maps(out, each, own, found)
            folders |= dict.fromkeys(f"{file.split('/')[0]}/" for paths in files.values() for file in paths)
            shown.append(place | {name: data.get(name, files.get(name)) for name in own})
            cells.append(place | {key: value for name in data for key, value in flat(name, data[name]).items()})
            if with_labels:
                labels.append(_label_row(out, each, own, found, files, model.origin.fingerprint))
            bar.update(0 if each.frame else 1)
    written.num_images = len(shown)
    written.files = sorted(folders)
    if not shown:
        return written
    origin = model.origin
    head = {"run": str(origin.run_dir), "checkpoint": origin.checkpoint, "step": origin.step}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "predictions.json", head | {"fingerprint": origin.fingerprint, "images": shown})
    written.files.append("predictions.json")
    if any(task.output != "dense" or task.label_kind == "points" for task in own.values()):
        write_text(out / "predictions.csv", table_of(cells))
        written.files.append("predictions.csv")
    if with_labels:
        write_text(out / "labels.csv", table_of(labels))
        written.files.append("labels.csv")
        is_outside = any(Path(row["image"]).is_absolute() for row in labels)
        written.training = settings_for(out / "labels.csv", own, is_outside)
    return written


def _write_maps(
    out: Path, each: Input, tasks: Mapping[str, Task], found: Mapping[str, Tensor]
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Writes the maps of an image: their paths below the folder by task, and the predictions that are no maps."""
    files, data = dict[str, list[str]](), dict[str, Any]()
    for name, task in tasks.items():
        if task.output != "dense" or task.label_kind == "points":
            data[name] = task.as_data(found[name])
            continue
        files[name] = []
        for pattern, content in map_files(name, task, found[name]).items():
            file = pattern.format(each.name)
            write_file(out, file, content)
            files[name].append(file)
    return files, data


def _label_row(
    out: Path,
    each: Input,
    tasks: Mapping[str, Task],
    found: Mapping[str, Tensor],
    files: Mapping[str, Sequence[str]],
    fingerprint: str,
) -> dict[str, str]:
    image, folder = each.file.resolve(), out.resolve()
    row = {"image": str(image.relative_to(folder) if image.is_relative_to(folder) else image)}
    for name, task in tasks.items():
        label = task.as_label(found[name][None])[0]
        path = files[name][0] if name in files else ""
        if (content := label_file(task, label)) is not None:
            path = f"{name}_label/{each.name}.png"
            write_file(out, path, content)
        row[name] = label_cell(task, label, path)
    return row | {FINGERPRINT: fingerprint}
