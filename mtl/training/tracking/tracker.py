"""Tracking: the same numbers to `metrics.jsonl`, always, and to wandb, if it can be had."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mtl.config import TrackingConfig
from mtl.runtime.console import first_line, logger
from mtl.runtime.files import without_nan

Rows = Iterable[Sequence[float | str | None]]


class Tracker:
    """Logs rows of numbers.

    Attributes:
        message: How wandb was resolved, in one line.
        is_less: Whether that is less than what was asked for, or could be had.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        name: str,
        run_config: Mapping[str, Any],
        wandb_id: str | None = None,
        is_silent: bool = False,
    ) -> None:
        """Args:
        config: How to track.
        run_dir: Where `metrics.jsonl` and `wandb/` go; it exists.
        name: The run's name.
        run_config: The resolved configuration, shown in wandb.
        wandb_id: The wandb run to resume, if there is one.
        is_silent: Whether nothing is logged, since another process of the run does it.
        """
        self._metrics = run_dir / "metrics.jsonl"
        self._run: Any = None
        self._wandb_id = wandb_id
        self._is_silent = is_silent
        self.is_less = False
        self.message = "wandb: in the first process"
        if not is_silent:
            self.message = self._start_wandb(config, run_dir, name, run_config)

    @property
    def wandb_id(self) -> str | None:
        """The run's name inside wandb, under which it can be resumed; None if it is not tracked there."""
        return self._wandb_id if self._run is None else str(self._run.id)

    @property
    def url(self) -> str | None:
        """The run's address in wandb; None without one."""
        return None if self._run is None or not self._run.url else str(self._run.url)

    def flush_to_disk(self) -> int:
        """Forces `metrics.jsonl` to disk.

        Returns:
            Its size in bytes.
        """
        if not self._metrics.exists():
            return 0
        with self._metrics.open("rb") as stream:
            os.fsync(stream.fileno())
            return os.fstat(stream.fileno()).st_size

    def cut_back(self, num_bytes: int) -> None:
        """Takes what was logged after a checkpoint out of `metrics.jsonl`: it is going to be logged again."""
        if self._is_silent:
            return
        found = self._metrics.read_bytes() if self._metrics.exists() else b""
        if len(found) < num_bytes:
            logger.warning(
                f"{self._metrics} has lost rows: {len(found):,} bytes are left of {num_bytes:,}; new ones follow"
            )
            # Behind half a row, the next one could not be read either.
            num_bytes = found.rfind(b"\n") + 1
        if len(found) > num_bytes:
            os.truncate(self._metrics, num_bytes)

    def log(self, row: Mapping[str, float | int | str]) -> None:
        """Logs one row; `step`, the number of steps done, must be in it and never go back."""
        if self._is_silent:
            return
        with self._metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(without_nan(row), allow_nan=False) + "\n")
        if self._run is not None:
            self._guard("log", lambda: self._run.log(dict(row), step=int(row["step"])))

    def log_table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """Shows a table in wandb, if that runs; `step` must not be lower than that of the last row."""
        if self._run is not None:
            self._guard(
                name, lambda: self._run.log({name: _wandb().Table(list(columns), [*map(list, rows)])}, step=step)
            )

    def log_picture(self, name: str, draw: Callable[[], bytes], step: int) -> None:
        """Shows a picture in wandb, if that runs.

        Args:
            name: Under which name.
            draw: Makes the picture, a PNG file's content; called only if it is shown.
            step: Must not be lower than that of the last row.
        """
        if self._run is None:
            return
        image = Image.open(io.BytesIO(draw()))
        self._guard(name, lambda: self._run.log({name: _wandb().Image(image)}, step=step))

    def finish(self, summary: Mapping[str, float | str | bool], failed: bool) -> None:
        """Ends tracking; `summary` is what wandb shows for the whole run."""
        if self._run is not None:
            self._guard("the summary", lambda: self._run.summary.update(dict(summary)))
        if self._run is not None:
            self._guard("finishing", lambda: self._run.finish(exit_code=int(failed)))

    def _start_wandb(self, config: TrackingConfig, run_dir: Path, name: str, run_config: Mapping[str, Any]) -> str:
        mode = os.environ.get("WANDB_MODE", "") if config.mode == "auto" else config.mode
        if mode == "disabled":
            return "wandb: disabled"
        # Look-ups that wandb would make before it knows whether there is a network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        if config.mode == "online":
            # Else wandb looks for no key where WANDB_MODE says otherwise.
            os.environ["WANDB_MODE"] = config.mode
        why = "no key, or asked for"
        try:
            wandb = _wandb()
            if mode in ("", "online") and not wandb.login(prompt=False, verify=False):
                # Asked for without a key, wandb would ask for one, and wait.
                self.is_less = mode == "online"
                mode, why = "offline", "wandb knows no key: wandb login" if mode else why
            try:
                self._run = self._init(wandb, config, run_dir, name, run_config, mode or "online")
            except Exception as error:  # a failed connection has many types; the run continues without it
                if mode == "offline":
                    raise
                self.is_less = True
                self._run = self._init(wandb, config, run_dir, name, run_config, "offline")
                return f"wandb: offline, since online failed ({first_line(error)}); wandb sync {self._folder()}"
        except Exception as error:  # noqa: BLE001 - nothing that wandb does ends a run
            self._run, self.is_less = None, True
            return f"wandb: off, since it failed ({first_line(error)}); the numbers are in metrics.jsonl"
        if mode == "offline":
            return f"wandb: offline ({why}); upload later with: wandb sync {self._folder()}"
        return f"wandb: {mode or 'online'}, {self._run.url or 'no address'}"

    def _init(
        self, wandb: Any, config: TrackingConfig, run_dir: Path, name: str, run_config: Mapping[str, Any], mode: str
    ) -> Any:
        # Only a server may never answer; wandb's own process comes, if late where others want the processor, too.
        timeout_s = 30 if mode == "online" else 300
        settings = wandb.Settings(init_timeout=timeout_s, x_disable_stats=True, console="off", silent=True)
        return wandb.init(
            project=config.project,
            name=name,
            dir=str(run_dir),
            config=dict(run_config),
            mode=mode,
            settings=settings,
            # Offline, both parts have the same id, and are one run once they are uploaded.
            id=self._wandb_id,
            resume="allow" if self._wandb_id else None,
        )

    def _folder(self) -> str:
        return os.path.relpath(Path(self._run.dir).parent) if self._run is not None else ""

    def _guard(self, what: str, act: Any) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - nothing that wandb does ends a run
            self._run = None
            logger.warning(f"wandb: stopped, since {what} failed ({first_line(error)}); metrics.jsonl continues")


def _wandb() -> Any:
    import wandb  # late: it takes seconds, and no run needs it

    return wandb
