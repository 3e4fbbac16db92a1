"""Runs in tensorboard and in a backend of the user's own: what is shown, read back; what is refused; what fails."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import forks
from mtl.cli import main
from mtl.config import ConfigError, TrackingConfig, load_config
from mtl.training.result import RunResult
from mtl.training.run import train
from mtl.training.setup import RunSetup, assemble
from mtl.training.tracking.choice import check_backend
from mtl.training.tracking.tracker import Tracker
from processes import HANGS_S
from runs import TINY, read_metrics, tiny_config, tiny_parts

ROOT = Path(__file__).parents[2]
PHASES = [{"name": "warm", "freeze": ["trunk"], "epochs": 1}, {"name": "tune", "freeze": ["trunk.conv1"], "epochs": 1}]


def events(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def scalars(found: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in found.Scalars(name)]


def text(found: EventAccumulator, name: str) -> str:
    value = found.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0]
    return bytes(value).decode()


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[tuple[RunSetup, RunResult]]:
    folder = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        parts = tiny_parts(folder, tracking={"backend": "tensorboard", "log_every_steps": 2}, phases=PHASES)
        yield parts, train(parts, quiet=True)


def test_tensorboard_has_every_number_of_metrics_jsonl_at_its_step(logged: tuple[RunSetup, RunResult]) -> None:
    found = events(logged[1].run_dir)
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(logged[1].run_dir):
        shown = ["grad/conflict_share"] if "grad/unreached" in row else [*row.keys() - {"step", "phase"}]
        for name, value in ((name, row[name]) for name in shown):
            expected.setdefault(name, []).append((row["step"], value))
    assert len(expected) > 25
    for name, points in expected.items():
        assert [step for step, _ in scalars(found, name)] == [step for step, _ in points]
        assert [value for _, value in scalars(found, name)] == pytest.approx([value for _, value in points], rel=1e-6)
    assert scalars(found, "phase/number") == [(0, 1.0), (5, 2.0)]


def test_tensorboard_has_pictures_tables_and_the_configuration(logged: tuple[RunSetup, RunResult]) -> None:
    parts, result = logged
    found = events(result.run_dir)
    assert {*found.Tags()["images"]} == {"plan/picture", "val/predictions", "grad/heat_map"}
    assert [each.step for each in found.Images("val/predictions")] == [5, 10]
    shown = found.Images("plan/picture")[0]
    with Image.open(io.BytesIO(shown.encoded_image_string)) as picture:
        assert picture.size == (shown.width, shown.height)
    head, _, *rows = text(found, "results").splitlines()
    assert head == "| task | metric | trivial | warm | tune | best |"
    assert rows[0].startswith(f"| segmentation | miou | {parts.trivial['segmentation']['miou']:.6g} |")
    assert len(rows) == 11
    assert "name: test_resnet" in text(found, "configuration")
    assert "| audit/ok | True |" in text(found, "summary")
    assert not (result.run_dir / "wandb").exists()


def test_what_was_shown_after_the_checkpoint_of_a_resumed_run_is_shown_once(tmp_path: Path) -> None:
    config = TrackingConfig(backend="tensorboard")
    first = Tracker(config, tmp_path, "x", {})
    for step in (1, 2, 3, 4):
        first.log({"step": step, "loss": 10.0 + step})
    first.finish({}, failed=True)
    second = Tracker(config, tmp_path, "x", {}, step=2)
    for step in (3, 4, 5):
        second.log({"step": step, "loss": 20.0 + step})
    second.finish({}, failed=False)
    found = [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0), (5, 25.0)]
    assert scalars(events(tmp_path), "loss") == found


def test_an_alert_is_text(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(backend="tensorboard"), tmp_path, "x", {})
    tracker.alert("x: audit violation", "trunk.conv1 changed", 7)
    tracker.finish({}, failed=True)
    assert "trunk.conv1 changed" in text(events(tmp_path), "alert/x: audit violation")


def test_without_its_package_tensorboard_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    file = tiny_config(tmp_path, phases=PHASES)
    (tmp_path / "tensorboard.py").write_text("raise ImportError('No module named tensorboard')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from mtl.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ["-c", code, "train", str(file), "tracking.backend=tensorboard", "tracking.mode=auto"]
    done = forks.run(command, cwd=ROOT, timeout=HANGS_S)
    assert (done.returncode, done.stderr) == (
        2,
        "error: command line: tracking.backend: tensorboard needs the package tensorboard; install it with:"
        " pip install 'mtl-freeze[tensorboard]'\n",
    )
    assert not (tmp_path / "runs").exists()


# Backends of the user's own

OWN = """
    import json
    from mtl.config import Strict
    from mtl.training.tracking import BestCheckpoint, TrackedRun, TrackingBackend


    class Options(Strict):
        file: str
        fail_at: int = -1


    class Lines(TrackingBackend):
        Options = Options

        def __init__(self, run: TrackedRun, file: str, fail_at: int) -> None:
            self.message = f"lines of {run.name} in {file}"
            self.run_id = "a-key-of-its-own"
            self.file, self.fail_at = run.run_dir / file, fail_at
            lower = [name for name, direction in run.directions.items() if direction == "lower"]
            self.write({"begin": run.step, "key": run.resumed_id, "lower": lower})

        def write(self, line: dict) -> None:
            with self.file.open("a") as stream:
                stream.write(json.dumps(line) + "\\n")

        def log(self, row, step: int) -> None:
            if step == self.fail_at:
                raise ConnectionError("gone")
            self.write({"step": step, "names": sorted(row)})

        def finish(self, summary, best: BestCheckpoint | None, failed: bool) -> None:
            self.write({"end": failed, "best": None if best is None else best.step})


    class NoBackend:
        pass


    class Broken(TrackingBackend):
        def __init__(self, run: TrackedRun) -> None:
            raise OSError("no room")

        def log(self, row, step: int) -> None:
            pass
"""


def own_config(folder: Path, module: str, **tracking: Any) -> Path:
    (folder / f"{module}.py").write_text(textwrap.dedent(OWN))
    own = {"backend": f"{module}:Lines", "options": {"file": "lines.jsonl"}, "log_every_steps": 2}
    return tiny_config(folder, tracking=own | tracking, phases=PHASES)


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "lines.jsonl").read_text().splitlines()]


def test_a_backend_of_ones_own_gets_every_row_and_draws_no_picture_that_it_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(*_: Any) -> None:
        pytest.fail("drawn")

    monkeypatch.setattr("mtl.training.tracking.predictions.draw_panel", drawn)
    monkeypatch.setattr("mtl.training.tracking.dashboard.draw_plan", drawn)
    result = train(assemble(load_config(own_config(tmp_path, "own_rows")), quiet=True), quiet=True)
    begin, *rows, end = lines_of(result.run_dir)
    assert (begin["begin"], begin["key"]) == (0, None)
    assert {"val/depth/rmse", "val/normals/mean"} <= {*begin["lower"]}
    steps = [row["step"] for row in rows if "train/loss" in row["names"]]
    assert steps == list(range(1, 11))
    assert end == {"end": False, "best": result.best_step}
    state = json.loads((result.run_dir / "checkpoints/last/state.json").read_text())
    assert state["wandb_id"] == "a-key-of-its-own"


def test_a_resumed_run_gives_its_backend_the_key_and_the_step_that_it_continues_from(tmp_path: Path) -> None:
    file = own_config(tmp_path, "own_key")
    train(assemble(load_config(file), quiet=True), quiet=True)
    assert main(["train", str(file), "-q", "resume=auto"]) == 0
    begins = [line for line in lines_of(tmp_path / "runs/tiny") if "begin" in line]
    assert [(each["begin"], each["key"]) for each in begins] == [(0, None), (10, "a-key-of-its-own")]


def test_a_backend_that_fails_in_the_middle_is_reported_once_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = own_config(tmp_path, "own_failing", options={"file": "lines.jsonl", "fail_at": 3})
    result = train(assemble(load_config(file), quiet=True), quiet=True)
    said = [record.message for record in caplog.records if "own_failing" in record.message]
    assert said == ["own_failing:Lines: stopped, since log failed (gone); metrics.jsonl continues"]
    assert max(line.get("step", 0) for line in lines_of(result.run_dir)) == 2
    assert [row["step"] for row in read_metrics(result.run_dir) if "train/loss" in row] == list(range(1, 11))


def test_a_backend_that_cannot_be_made_ends_no_run(tmp_path: Path) -> None:
    own_config(tmp_path, "own_broken")
    config = TrackingConfig(backend="own_broken:Broken")
    tracker = Tracker(config, tmp_path, "x", {})
    assert tracker.is_less and tracker.message == (
        "own_broken:Broken: off, since it failed (no room); the numbers are in metrics.jsonl"
    )
    tracker.log({"step": 1, "x": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1.0}]


@pytest.mark.parametrize(
    ("tracking", "message"),
    [
        ({"backend": "tensorbord"}, "or package.module:Name, got 'tensorbord'; nearest: tensorboard"),
        ({"backend": "own_wrong:NoBackend", "options": {}}, "NoBackend"),
        ({"backend": "own_wrong:Nothing", "options": {}}, "own_wrong has no 'Nothing'"),
        ({"backend": "nowhere_at_all:X", "options": {}}, "'nowhere_at_all' cannot be imported"),
        ({"options": {"fil": "x"}}, "tracking.options.fil: unknown key; nearest: file"),
        ({"backend": "wandb"}, "expected options only for a backend of your own"),
        ({"predictions_every_epochs": -1}, "tracking.predictions_every_epochs: expected"),
        ({"tags": "one"}, "tracking.tags: expected"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, tracking: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_backend(load_config(own_config(tmp_path, "own_wrong", **tracking)))
    assert message in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("settings", "overrides", "keys"),
    [
        ({"backend": "tensorboard", "tags": ["a"], "mode": "offline"}, [], ["tags", "mode"]),
        (
            {"backend": "none", "predictions_every_epochs": 2, "log_model": True},
            [],
            ["predictions_every_epochs", "log_model"],
        ),
        ({"backend": "wandb", "tags": ["a"], "log_model": True}, [], []),
        ({"backend": "own_unread:Lines", "options": {"file": "x"}, "tags": ["a"]}, [], []),
        # A file may be for wandb, and the command line choose otherwise.
        ({"tags": ["a"], "log_model": True}, ["tracking.backend=tensorboard"], []),
        ({"tags": ["a"], "log_model": True}, ["tracking.mode=disabled"], []),
    ],
)
def test_what_only_wandb_reads_is_warned_of_with_another_backend(
    tmp_path: Path, settings: dict[str, Any], overrides: list[str], keys: list[str]
) -> None:
    from mtl.phases.setup import build_meta_setup

    (tmp_path / "own_unread.py").write_text(textwrap.dedent(OWN))
    file = tiny_config(tmp_path, tracking=settings, phases=PHASES)
    unread = [line for line in build_meta_setup(load_config(file, overrides)).unread if "tracking." in line]
    assert sorted(line.split("tracking.")[1].split(":")[0] for line in unread) == sorted(keys), unread


def test_the_command_line_is_refused_what_tensorboard_does_not_read(tmp_path: Path) -> None:
    from mtl.phases.setup import build_meta_setup

    file = tiny_config(tmp_path, tracking={}, phases=PHASES)
    with pytest.raises(ConfigError, match=r"tracking\.notes: tensorboard does not read it"):
        build_meta_setup(load_config(file, ["tracking.backend=tensorboard", "tracking.notes=x"]))


def test_no_backend_says_so_and_writes_metrics(tmp_path: Path) -> None:
    assert TINY["tracking"]["mode"] == "disabled"
    tracker = Tracker(TrackingConfig(backend="none"), tmp_path, "x", {})
    assert tracker.message == "no tracking; the numbers are in metrics.jsonl"
    tracker.log({"step": 1, "x": 2.0})
    tracker.finish({}, failed=False)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
