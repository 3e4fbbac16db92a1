"""A run in wandb, online or in a file that can be uploaded later."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl.runtime.console import first_line
from mtl.runtime.deferred import deferred, nothing
from mtl.training.tracking.backend import BestCheckpoint, Row, Table, TrackedRun, TrackingBackend

_SUMMARY = {"higher": "max", "lower": "min"}
# Files next to a checkpoint without which it cannot be read as a run.
_OF_A_RUN = (".mtl-run", "config.yaml", "plan.json", "audit.json", "data.json", "history.json", "metrics.jsonl")


class WandbBackend(TrackingBackend):
    """A run of wandb; where wandb cannot be had, `message` says why, and nothing is shown."""

    # For a row, wandb takes as long as a step of small heads.
    shows_every_step = False

    def __init__(self, run: TrackedRun) -> None:
        self._tracked = run
        self._run: Any = None
        self.run_id = run.resumed_id
        self.message = self._start()
        self.is_off = self._run is None
        if self._run is not None:
            self.run_id = str(self._run.id)
            self.url = str(self._run.url) if self._run.url else None
            self._define_metrics(run)

    def log(self, row: Row, step: int) -> None:
        self._run.log(dict(row), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Table, step: int) -> None:
        self._run.log({name: _wandb().Table(list(columns), [*map(list, rows)])}, step=step)

    def picture(self, name: str, png: bytes, step: int) -> None:
        # A file is copied as it is; from pixels, wandb would encode it again.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "picture.png"
            file.write_bytes(png)
            self._run.log({name: _wandb().Image(str(file))}, step=step)

    def alert(self, title: str, text: str, step: int) -> None:
        # wandb takes titles of less than 64 characters, and drops a second alert of one title within a minute.
        self._run.alert(title[:63], f"{text}\n(after step {step})", level="ERROR", wait_duration=0)

    def finish(self, summary: Row, best: BestCheckpoint | None, failed: bool) -> None:
        self._run.summary.update(dict(summary))
        if best is not None and self._tracked.config.log_model:
            self._log_model(best)
        self._run.finish(exit_code=int(failed))

    def _define_metrics(self, run: TrackedRun) -> None:
        """Validations are drawn over epochs, and a run is judged by its best value where one is known to be better."""
        self._run.define_metric("epoch")
        self._run.define_metric("val/*", step_metric="epoch")
        for metric, direction in run.directions.items():
            if metric.startswith("val/") and direction is not None:
                self._run.define_metric(metric, step_metric="epoch", summary=_SUMMARY[direction])

    def _log_model(self, best: BestCheckpoint) -> None:
        """The best checkpoint as an artifact, in the layout of a run directory."""
        run = self._tracked
        name = re.sub(r"[^A-Za-z0-9_.\-]", "-", f"model-{run.name}")[:128]
        artifact = _wandb().Artifact(name, type="model", metadata={"step": best.step, **best.metrics})
        for file in (run.run_dir / each for each in _OF_A_RUN):
            if file.is_file():
                artifact.add_file(str(file), name=file.name)
        for file in sorted(path for path in best.folder.rglob("*") if path.is_file()):
            inside = f"checkpoints/best/{file.relative_to(best.folder).as_posix()}"
            # Checkpoints never change once they are written: without a copy.
            artifact.add_file(str(file.resolve()), name=inside, policy="immutable")
        aliases = ["best", f"step-{best.step}"]
        if (score := best.metrics.get("val/score")) is not None:
            aliases.append(f"score-{score:.4f}")
        self._run.log_artifact(artifact, aliases=aliases)

    def _start(self) -> str:
        config = self._tracked.config
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
                self._run = self._init(wandb, mode or "online")
            except Exception as error:  # a failed connection has many types; the run continues without it
                if mode == "offline":
                    raise
                self.is_less = True
                self._run = self._init(wandb, "offline")
                return f"wandb: offline, since online failed ({first_line(error)}); wandb sync {self._folder()}"
        except Exception as error:  # noqa: BLE001 - nothing that wandb does ends a run
            self._run, self.is_less = None, True
            return f"wandb: off, since it failed ({first_line(error)}); the numbers are in metrics.jsonl"
        if mode == "offline":
            return f"wandb: offline ({why}); upload later with: wandb sync {self._folder()}"
        return f"wandb: {mode or 'online'}, {self._run.url or 'no address'}"

    def _init(self, wandb: Any, mode: str) -> Any:
        run = self._tracked
        config, settings = run.config, self._settings(wandb, mode)
        # It asks launch for one class; without the package around that, the public API is not imported, for a second.
        with deferred({"wandb.sdk.launch": nothing}):
            return wandb.init(
                project=config.project,
                name=run.name,
                dir=str(run.run_dir),
                config=dict(run.settings),
                mode=mode,
                settings=settings,
                # Offline, both parts have the same id, and are one run once they are uploaded. In a sweep, wandb takes
                # project and id from the agent in place of these.
                id=run.resumed_id,
                resume="allow" if run.resumed_id else None,
                group=config.group,
                job_type=config.job_type,
                tags=config.tags or None,
                notes=config.notes,
            )

    def _settings(self, wandb: Any, mode: str) -> Any:
        config = self._tracked.config
        # Only a server may never answer; wandb's own process comes, if late where others want the processor, too.
        chosen: Mapping[str, Any] = {"init_timeout": 30 if mode == "online" else 300, "silent": True}
        return wandb.Settings(
            x_disable_stats=not config.system_metrics, console="auto" if config.console else "off", **chosen
        )

    def _folder(self) -> str:
        return os.path.relpath(Path(self._run.dir).parent) if self._run is not None else ""


def _wandb() -> Any:
    import wandb  # late: it takes seconds, and no run needs it

    return wandb
