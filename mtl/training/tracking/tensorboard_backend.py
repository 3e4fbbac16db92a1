"""A run in tensorboard's event files, `tensorboard/` in the run directory."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard import summary as summaries

from mtl.config.yaml_text import dump_yaml
from mtl.training.tracking.backend import BestCheckpoint, Row, Table, TrackedRun, TrackingBackend

FOLDER = "tensorboard"


class TensorboardBackend(TrackingBackend):
    """Numbers as scalars over steps, tables and alerts as text, pictures as images."""

    def __init__(self, run: TrackedRun) -> None:
        folder = run.run_dir / FOLDER
        self._writer: Any = FileWriter(str(folder), flush_secs=30)
        self._step = run.step
        if run.step:
            # What was shown after the checkpoint that the run resumes from is logged again: readers drop it here.
            self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), run.step + 1)
        self.message = f"tensorboard: tensorboard --logdir {os.path.relpath(folder)}"
        self._text("configuration", f"```yaml\n{dump_yaml(dict(run.settings))}\n```", run.step)

    def log(self, row: Row, step: int) -> None:
        # One event a row: a tenth of the time that an event for each number takes.
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step" and not isinstance(value, str)
        ]
        self._add(Summary(value=values), step)

    def table(self, name: str, columns: Sequence[str], rows: Table, step: int) -> None:
        lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
        self._text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def picture(self, name: str, png: bytes, step: int) -> None:
        width, height = Image.open(io.BytesIO(png)).size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        self._writer.flush()

    def alert(self, title: str, text: str, step: int) -> None:
        self._text(f"alert/{title}", f"```\n{text}\n```", step)
        self._writer.flush()

    def finish(self, summary: Row, best: BestCheckpoint | None, failed: bool) -> None:  # noqa: ARG002
        rows = [[name, value] for name, value in {**summary, "failed": failed}.items()]
        self.table("summary", ["name", "value"], rows, self._step)
        self._writer.close()

    def _text(self, name: str, markdown: str, step: int) -> None:
        make_text: Any = summaries.text
        self._add(make_text(name, markdown), step)

    def _add(self, summary: Any, step: int) -> None:
        self._step = max(self._step, step)
        self._writer.add_summary(summary, step)


def _cell(value: float | str | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "\\|")
