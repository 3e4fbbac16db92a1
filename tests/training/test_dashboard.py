"""What a run shows besides its rows, read back from wandb's offline file and from tensorboard's event files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import wandb_file
from mtl.audit import AuditError
from mtl.training.nonfinite import NotFiniteError
from mtl.training.result import RunResult
from mtl.training.run import train
from mtl.training.setup import RunSetup
from runs import read_metrics, tiny_parts

TASKS = ("segmentation", "depth", "normals", "object")
LOGGED: dict[str, Any] = {
    "tracking": {
        "mode": "offline",
        "log_every_steps": 2,
        "project": "house",
        "group": "seeds",
        "job_type": "trial",
        "tags": ["one", "two"],
        "notes": "what it is about",
        "system_metrics": True,
        "console": True,
        "log_model": True,
        "predictions_every_epochs": 2,
    },
    "optim": {"lr": {"trunk": 1e-4, "heads": 1e-3, "balance": 1e-2}, "weight_decay": 0.1},
    "phases": [
        {"name": "warm", "freeze": ["trunk"], "epochs": 1, "lr": 2e-3},
        {"name": "tune", "freeze": ["trunk.conv1", "trunk.bn1", "heads.object"], "epochs": 2},
    ],
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[tuple[RunSetup, RunResult, Path]]:
    """One run with everything in wandb; its offline file."""
    folder = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        patch.setenv("WANDB_X_SERVICE_WAIT", "300")
        parts = tiny_parts(folder, **LOGGED)
        result = train(parts, quiet=True)
        yield parts, result, wandb_file.offline_file(result.run_dir)


@pytest.fixture
def history(logged: tuple[RunSetup, RunResult, Path]) -> dict[int, dict[str, Any]]:
    return {row["_step"]: row for row in wandb_file.history(logged[2])}


def table(run_dir: Path, row: dict[str, Any], name: str) -> tuple[list[str], list[list[Any]]]:
    (media,) = run_dir.glob("wandb/offline-run-*/files")
    content = json.loads((media / row[f"{name}/path"]).read_text())
    return content["columns"], content["data"]


def test_the_run_has_its_project_group_job_type_tags_and_notes(logged: tuple[RunSetup, RunResult, Path]) -> None:
    (run,) = wandb_file.of_kind(logged[2], "run")
    assert (run.project, run.run_group, run.job_type) == ("house", "seeds", "trial")
    assert (run.display_name, run.notes, list(run.tags)) == ("tiny", "what it is about", ["one", "two"])


def test_the_machine_and_what_is_printed_are_kept_only_if_asked_for(
    logged: tuple[RunSetup, RunResult, Path], tmp_path: Path
) -> None:
    kinds = {record.WhichOneof("record_type") for record in wandb_file.read_records(logged[2])}
    assert "stats" in kinds
    parts = tiny_parts(tmp_path, "phases.a.steps=1", phases=[{"name": "a", "steps": 1}], tracking={"mode": "offline"})
    plain = wandb_file.offline_file(train(parts, quiet=True).run_dir)
    kinds = {record.WhichOneof("record_type") for record in wandb_file.read_records(plain)}
    assert not kinds & {"stats", "output", "output_raw", "artifact"} - {"artifact"}
    assert not [each for each in wandb_file.of_kind(plain, "artifact") if each.type == "model"]


def test_every_validation_metric_is_judged_in_its_direction_and_drawn_over_epochs(
    logged: tuple[RunSetup, RunResult, Path],
) -> None:
    defined = {each.name or each.glob_name: each for each in wandb_file.of_kind(logged[2], "metric")}
    assert (defined["val/*"].step_metric, defined["epoch"].step_metric) == ("epoch", "")
    found = {
        name: "higher" if metric.summary.max else "lower" if metric.summary.min else None
        for name, metric in defined.items()
        if name not in ("val/*", "epoch")
    }
    assert found == {
        "val/score": "higher",
        "val/segmentation/miou": "higher",
        "val/segmentation/pixel_accuracy": "higher",
        "val/depth/abs_rel": "lower",
        "val/depth/rmse": "lower",
        "val/depth/delta1": "higher",
        "val/normals/mean": "lower",
        "val/normals/median": "lower",
        "val/normals/within_11": "higher",
        "val/normals/within_22": "higher",
        "val/normals/within_30": "higher",
        "val/object/accuracy": "higher",
    }
    assert {metric.step_metric for name, metric in defined.items() if name.startswith("val/")} == {"epoch"}


def test_the_summary_has_the_best_value_of_each_metric_and_all_of_the_best_checkpoint(
    logged: tuple[RunSetup, RunResult, Path],
) -> None:
    _, result, file = logged
    summary = wandb_file.summary(file)
    rows = [row for row in read_metrics(result.run_dir) if "val/score" in row]
    assert summary["val/depth/rmse"] == {"min": min(row["val/depth/rmse"] for row in rows)}
    assert summary["val/score"] == {"max": max(row["val/score"] for row in rows)}
    best = max(rows, key=lambda row: row["val/score"])
    assert (summary["best/step"], summary["val/best_score"]) == (best["step"], best["val/score"])
    names = {name for name in best if name.startswith("val/") and name != "val/best_score"}
    assert {name: summary[name.replace("val/", "best/")] for name in names} == {name: best[name] for name in names}
    assert summary["audit/ok"] is True and summary["audit/violations"] == 0
    # What a sweep reads: a plain number, after every validation.
    scores = [row["val/score"] for row in rows]
    assert [row["val/best_score"] for row in rows] == [max(scores[: n + 1]) for n in range(len(scores))]


def test_every_step_has_its_phase_the_raw_sum_of_losses_and_a_rate_for_each_group(
    history: dict[int, dict[str, Any]],
) -> None:
    # Of two steps that are logged together the second, and of each epoch the last.
    shown = [2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert shown == [step for step, row in history.items() if "train/loss" in row]
    for step in shown:
        row, is_warm = history[step], step <= 5
        assert row["phase_number"] == (1 if is_warm else 2)
        losses = [row[f"train/loss/{task}"] for task in TASKS if f"train/loss/{task}" in row]
        assert len(losses) == 4, "a frozen head's loss trains the trunk"
        assert math.isclose(row["train/loss_sum"], sum(losses), rel_tol=1e-6)
        # One phase has one rate for all that trains: heads, and the weights of the balancing method.
        groups = {"heads", "balance"} if is_warm else {"trunk", "heads", "balance"}
        rates = {key.removeprefix("train/lr/"): row[key] for key in row if key.startswith("train/lr/")}
        assert rates.keys() == groups
        assert row["train/lr"] == max(rates.values())
        if not is_warm:
            assert math.isclose(rates["balance"], 100 * rates["trunk"]) and math.isclose(
                rates["heads"], 10 * rates["trunk"]
            )


def test_where_a_phase_begins_it_says_what_is_frozen_and_trained(
    logged: tuple[RunSetup, RunResult, Path], history: dict[int, dict[str, Any]]
) -> None:
    root = logged[0].root
    total = sum(parameter.numel() for parameter in root.parameters())
    trunk = sum(parameter.numel() for parameter in logged[0].model.trunk.parameters())
    own = ("trunk.conv1.", "trunk.bn1.", "heads.object.")
    some = sum(parameter.numel() for name, parameter in root.named_parameters() if name.startswith(own))
    marks = {step: row for step, row in history.items() if "phase/begins" in row}
    keys = ("begins", "number", "frozen_parameters", "trained_parameters")
    found = [(step, *(row[f"phase/{key}"] for key in keys)) for step, row in marks.items()]
    assert found == [(0, "warm", 1, trunk, total - trunk), (5, "tune", 2, some, total - some)]
    columns, rows = table(logged[1].run_dir, history[0], "plan/phases")
    assert columns == ["number", "phase", "length", "frozen parameters", "trained parameters"]
    assert [row[:2] + row[3:] for row in rows] == [[1, "warm", trunk, total - trunk], [2, "tune", some, total - some]]


def test_the_table_of_results_has_the_trivial_predictor_each_phase_and_the_best(
    logged: tuple[RunSetup, RunResult, Path], history: dict[int, dict[str, Any]]
) -> None:
    parts, result, _ = logged
    columns, rows = table(result.run_dir, history[15], "results")
    assert columns == ["task", "metric", "trivial", "warm", "tune", "best"]
    validations = {row["step"]: row for row in read_metrics(result.run_dir) if "val/score" in row}
    assert len(rows) == 11
    for task, metric, trivial, warm, tune, best in rows:
        key = f"val/{task}/{metric}"
        assert trivial == parts.trivial[task][metric]
        assert [warm, tune, best] == [validations[step][key] for step in (5, 15, result.best_step)]


def test_the_plan_is_a_picture_and_predictions_come_at_their_cadence(
    logged: tuple[RunSetup, RunResult, Path], history: dict[int, dict[str, Any]]
) -> None:
    (media,) = logged[1].run_dir.glob("wandb/offline-run-*/files")
    # Drawn at the end of the first epoch: no step waits for it.
    (row,) = (row for row in history.values() if "plan/picture/path" in row)
    assert row is history[5]
    with Image.open(media / row["plan/picture/path"]) as picture:
        assert picture.size == (row["plan/picture/width"], row["plan/picture/height"])
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 3
    assert [step for step, row in history.items() if "val/predictions/path" in row] == [10], "epoch 2 of 3"


def test_the_panel_shows_labels_and_predictions_of_the_validated_weights(tmp_path: Path) -> None:
    from mtl.training.tracking.panel import draw_panel

    parts = tiny_parts(tmp_path)
    batch = parts.val.batch(torch.arange(2))
    # A model that is right about everything but the depth.
    outputs = {
        "segmentation": torch.nn.functional.one_hot(batch.labels["segmentation"], 13).permute(0, 3, 1, 2).float(),
        "depth": torch.zeros(2, 1, 32, 32),
        "normals": batch.labels["normals"],
        "object": torch.nn.functional.one_hot(batch.labels["object"], 10).float(),
    }
    png = tmp_path / "panel.png"
    png.write_bytes(draw_panel(batch, outputs, parts.tasks))
    with Image.open(png) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    # Two lines of words, then tiles of 128 pixels, 4 apart, from 92 on: the image, and two rows for each map.
    tops = [2 * 13 + 4 + row * 132 for row in range(7)]
    tiles = [pixels[top : top + 128, 92 : 92 + 128] for top in tops]
    image = batch.images[0].numpy().repeat(4, axis=0).repeat(4, axis=1)
    assert (tiles[0] == image).all()
    assert (tiles[1] == tiles[2]).all() and (tiles[5] == tiles[6]).all()
    assert (tiles[3] != tiles[4]).any() and len(np.unique(tiles[4].reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(tiles[1].reshape(-1, 3), axis=0)) == len(batch.labels["segmentation"][0].unique())


def test_the_best_checkpoint_is_an_artifact_in_the_layout_of_a_run(logged: tuple[RunSetup, RunResult, Path]) -> None:
    _, result, file = logged
    (artifact,) = [each for each in wandb_file.of_kind(file, "artifact") if each.type == "model"]
    assert artifact.name == "model-tiny"
    own = {"best", f"step-{result.best_step}", f"score-{result.best_score:.4f}"}
    assert {*artifact.aliases} - {"latest"} == own
    paths = {entry.path for entry in artifact.manifest.contents}
    best = {f"checkpoints/best/{each.name}" for each in (result.run_dir / "checkpoints/best").iterdir()}
    assert best | {"config.yaml", "audit.json", ".mtl-run"} <= paths
    assert json.loads(artifact.metadata)["val/score"] == result.best_score


def test_a_run_that_is_bad_for_each_step_alerts_of_what_was_not_finite(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path, **LOGGED | {"phases": [{"name": "a", "steps": 3, "lr": 1e38}]})
    with pytest.raises(NotFiniteError) as caught:
        train(parts, quiet=True)
    file = wandb_file.offline_file(tmp_path / "runs/tiny")
    (alert,) = wandb_file.of_kind(file, "alert")
    assert alert.title == f"tiny: {caught.value.what} is not finite" and alert.level == "ERROR"
    assert caught.value.fact in alert.text
    models = [each for each in wandb_file.of_kind(file, "artifact") if each.type == "model"]
    assert not models, "a run that failed has no best model"
    (ended,) = wandb_file.of_kind(file, "exit")
    assert ended.exit_code == 1


@pytest.mark.parametrize("policy", ["raise", "warn"])
def test_a_violation_is_alerted_once(tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtl.training.loop import Trainer

    parts = tiny_parts(
        tmp_path,
        f"audit.policy={policy}",
        tracking={"mode": "offline", "log_every_steps": 2},
        phases=[{"name": "a", "freeze": ["trunk"], "epochs": 2}],
    )
    finish_epoch, weight = Trainer.finish_epoch, parts.model.trunk.get_parameter("conv1.0.weight")

    def broken(self: Trainer, active: Any) -> None:
        if self.state.epoch == 1:
            with torch.no_grad():
                weight.add_(1.0)
        finish_epoch(self, active)

    monkeypatch.setattr(Trainer, "finish_epoch", broken)
    if policy == "raise":
        with pytest.raises(AuditError):
            train(parts, quiet=True)
    else:
        with pytest.warns(UserWarning, match="param_changed"):
            train(parts, quiet=True)
    (alert,) = wandb_file.of_kind(wandb_file.offline_file(tmp_path / "runs/tiny"), "alert")
    assert alert.title == "tiny: audit violation" and alert.level == "ERROR"
    assert "trunk.conv1.0.weight" in alert.text and "param_changed" in alert.text


def test_steps_that_are_left_out_are_alerted_of_once(tmp_path: Path) -> None:
    parts = tiny_parts(
        tmp_path,
        "not_finite=skip",
        tracking={"mode": "offline", "log_every_steps": 1},
        phases=[{"name": "a", "freeze": ["trunk"], "epochs": 2}],
    )
    labels = parts.train.labels["normals"] = parts.train.labels["normals"].float()
    # The squares of float32 cannot hold it.
    labels[:2, :, 0, 0] = 1e30
    train(parts, quiet=True)
    alerts = wandb_file.of_kind(wandb_file.offline_file(tmp_path / "runs/tiny"), "alert")
    assert [each.title for each in alerts] == ["tiny: train/loss/normals is not finite"]
