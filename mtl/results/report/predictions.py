"""Example predictions next to the labels: a picture for each map, a text for each other task, and what colours mean."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mtl.data import Batch
from mtl.model.trunk import in_eval_mode
from mtl.results.pictures import picture_of
from mtl.results.report.markup import Html, Piece, hidden, joined, number, scrolling, tag
from mtl.tasks import Task
from mtl.training.setup import RunSetup

NUM_EXAMPLES = 6
# Sides in pixels, the largest first, and the bytes of all pictures: the first side that keeps to them is taken.
_SIDES = (192, 128, 96, 64, 32)
_MOST_BYTES = 900_000
_QUALITY = 85
_NOTES = {
    "normals": "Normals: red, green and blue are the x, y and z of the unit vector, from -1 to 1.",
    "points": "Points: all heat maps in one.",
}


@dataclass(frozen=True)
class PictureRow:
    """A row of pictures, one for each example.

    Attributes:
        title: What they show.
        pictures: "b h w c", uint8, c is 1 or 3.
        is_map: Whether they show labels or predictions: few colours, with edges that are to stay sharp.
        legend: What a picture shows in words, for whoever cannot see it.
    """

    title: str
    pictures: np.ndarray
    is_map: bool
    legend: str


def predict(setup: RunSetup, num_examples: int = NUM_EXAMPLES) -> tuple[Batch, dict[str, Tensor]]:
    """Examples of the validation data, and the model's outputs for them, on the CPU."""
    batch = setup.val.batch(setup.val.examples(num_examples))
    with in_eval_mode(setup.model), torch.no_grad():
        outputs = setup.model(batch.images.to(setup.device))
    return batch, {name: output.float().cpu() for name, output in outputs.items()}


def predictions_html(batch: Batch, outputs: Mapping[str, Tensor], tasks: Mapping[str, Task], note: str) -> Html:
    """The examples as columns; rows are the image, then truth and prediction of each task."""
    rows = picture_rows(batch, outputs, tasks)
    words = {
        name: (task.caption(batch.labels[name], is_label=True), task.caption(outputs[name], is_label=False))
        for name, task in tasks.items()
        if name not in _dense(tasks)
    }
    pictures = zip(rows, picture_cells(rows), strict=True)
    body = [tag("tr", tag("th", row.title, scope="row"), *cells) for row, cells in pictures]
    for name, (truth, predicted) in words.items():
        body.append(tag("tr", tag("th", f"{name}, truth", scope="row"), *(tag("td", each) for each in truth)))
        body.append(_predicted_row(name, tasks[name], truth, predicted))
    titles = [tag("th", hidden("what"), scope="col")]
    titles += [tag("th", hidden("example "), str(place + 1), scope="col") for place in range(len(batch))]
    label = "Example predictions"
    inner = tag("table", tag("caption", label), tag("thead", tag("tr", *titles)), tag("tbody", *body), class_="panels")
    return joined([tag("p", note, class_="note"), scrolling(inner, label), _legends(_dense(tasks))])


def picture_rows(batch: Batch, outputs: Mapping[str, Tensor], tasks: Mapping[str, Task]) -> list[PictureRow]:
    rows = [PictureRow("image", picture_of(batch.images).numpy(), False, "image")]
    for name, task in _dense(tasks).items():
        for what, values, is_label in (("truth", batch.labels[name], True), ("predicted", outputs[name], False)):
            drawn = task.draw(values, is_label=is_label)
            pictures = (drawn.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            rows.append(PictureRow(f"{name}, {what}", pictures, True, f"{name}, {what}"))
    return rows


def _dense(tasks: Mapping[str, Task]) -> dict[str, Task]:
    return {name: task for name, task in tasks.items() if task.output == "dense"}


def picture_cells(rows: Sequence[PictureRow]) -> list[list[Html]]:
    """The pictures as cells, as large as they may be."""
    for side in _SIDES:
        files = [[_encoded(picture, side, row.is_map) for picture in row.pictures] for row in rows]
        if sum(len(each) for row in files for each in row) <= _MOST_BYTES:
            break
    return [
        [
            tag(
                "td",
                tag(
                    "img",
                    src=f"data:image/{'png' if row.is_map else 'jpeg'};base64,{base64.b64encode(file).decode()}",
                    alt=f"{row.legend}, example {place}",
                    width=row.pictures.shape[2],
                    height=row.pictures.shape[1],
                    class_="map" if row.is_map else None,
                ),
            )
            for place, file in enumerate(own, 1)
        ]
        for row, own in zip(rows, files, strict=True)
    ]


def _encoded(picture: np.ndarray, side: int, is_map: bool) -> bytes:
    """A picture as the content of a PNG or JPEG file, at most `side` pixels wide and high."""
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    how = Image.Resampling.NEAREST if is_map else Image.Resampling.LANCZOS
    if max(image.size) > side:
        factor = side / max(image.size)
        width, height = (max(1, round(each * factor)) for each in image.size)
        image = image.resize((width, height), how)
    file = io.BytesIO()
    if is_map:
        # A palette of 256 colours: enough for classes and scales, at a third of the bytes.
        image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _predicted_row(name: str, task: Task, truth: Sequence[str], predicted: Sequence[str]) -> Html:
    """Predictions in words; those of classes say whether they are right."""
    cells: list[Piece] = []
    for said, true in zip(predicted, truth, strict=True):
        if task.label_kind != "class":
            cells.append(tag("td", said))
            continue
        is_right = said == true
        cells.append(
            tag("td", said, hidden(" (right)" if is_right else " (wrong)"), class_="good" if is_right else "bad")
        )
    return tag("tr", tag("th", f"{name}, predicted", scope="row"), *cells)


def _legends(tasks: Mapping[str, Task]) -> Html:
    pieces: list[Piece] = []
    for name, task in tasks.items():
        if legend := task.legend():
            keys = [tag("li", tag("i", style=f"background:{_css(colour)}"), label) for label, colour in legend]
            pieces += [tag("h3", f"{name}: classes"), tag("ul", *keys, class_="keys")]
        elif (scale := task.colour_scale()) is not None:
            stops = ",".join(map(_css, scale.colours))
            bar = tag("i", style=f"background:linear-gradient(to right,{stops})", role="img", aria_label="colour bar")
            ends = [f"{_plain(end)} {scale.unit}" for end in (scale.low, scale.high)]
            pieces += [tag("h3", f"{name}: scale"), tag("div", ends[0], bar, ends[1], class_="gradient")]
        elif task.label_kind in _NOTES:
            pieces.append(tag("p", f"{name}: {_NOTES[task.label_kind].partition(': ')[2]}", class_="note"))
    return joined(pieces)


def _plain(value: float) -> str:
    return f"{value:g}" if value == round(value) else number(value)


def _css(colour: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * max(0.0, min(1.0, part))):02x}" for part in colour)
