"""The command line as a user meets it: exit codes, one clear message, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import forks
from forks import Forked
from mtl.cli import main
from mtl.config import load_config
from mtl.runtime.version import __version__
from mtl.training.run_dir import MARK
from mtl.training.setup import assemble
from processes import HANGS_S, wait_until
from runs import read_metrics, tiny_config

ROOT = Path(__file__).parents[2]


def test_a_run_shows_phases_epochs_results_and_where_the_files_lie(tmp_path: Path) -> None:
    # A Python of its own, imports and exit and all; elsewhere, forks do.
    result = subprocess.run(
        [sys.executable, "-m", "mtl", "train", str(tiny_config(tmp_path))],
        # Python's own: readline may have passed the terminal's width to the system's.
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["phase", "freeze", "frozen"]
    assert lines[2].startswith("warm-heads  trunk ") and lines[2].endswith("1 epoch (5 steps)")
    assert lines[3].startswith("finetune    trunk.conv1, trunk.bn1, heads.object ") and lines[3].endswith("7 steps")
    assert any(line.startswith("warm-heads  epoch 1  step 5  loss ") and line.endswith("img/s") for line in lines)
    assert "warm-heads: 1 epoch done; next phase: finetune" in lines
    table = next(
        i for i, line in enumerate(lines) if line.split() == ["task", "metric", "trivial", "warm-heads", "finetune"]
    )
    assert [line.split()[:2] for line in lines[table + 2 : table + 5]] == [
        ["segmentation", "miou"],
        ["segmentation", "pixel_accuracy"],
        ["depth", "abs_rel"],
    ]
    assert any(line.startswith("audit: clean; frozen tensors bit-identical (warm-heads: ") for line in lines)
    assert str(tmp_path / "runs/tiny") in lines[-1]
    assert result.stderr == "", "no bar where there is no terminal"


@pytest.mark.slow
def test_quiet_says_nothing(tmp_path: Path) -> None:
    call = ["-m", "mtl", "train", str(tiny_config(tmp_path)), "-q", "phases.finetune.steps=1"]
    result = forks.run(call, timeout=HANGS_S)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_broken_freeze_is_exit_code_3_and_named(tmp_path: Path) -> None:
    file = tiny_config(tmp_path)
    program = (
        "import sys, torch\n"
        "from torch.optim import AdamW\n"
        "real = AdamW.step\n"
        "def step(self, *a, **k):\n"
        "    real(self, *a, **k)\n"
        "    import gc\n"
        "    from mtl.model import MultiTaskModel\n"
        "    for model in (o for o in gc.get_objects() if type(o) is MultiTaskModel):\n"
        "        with torch.no_grad():\n"
        "            model.trunk.bn1.weight[0] += 1\n"
        "AdamW.step = step\n"
        "from mtl.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    result = forks.run(["-c", program, "train", str(file), "-q"], timeout=HANGS_S)
    assert result.returncode == 3, result.stderr
    assert "phase 'warm-heads', step 1, trunk.bn1.weight: param_changed" in result.stderr
    assert "likely cause: written" in result.stderr
    assert "audit.json" in result.stderr and "Traceback" not in result.stderr


BAD: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "unknown key": ({}, ["data.imagesize=64"], "command line: data.imagesize: unknown key; nearest: image_size"),
    "wrong type": ({"seed": "abc"}, [], r"tiny.yaml:\d+: seed: expected a valid integer, got 'abc'"),
    "dead pattern": (
        {"phases": [{"name": "a", "epochs": 1, "freeze": ["trunk.layer9"]}]},
        [],
        r"tiny.yaml:\d+: phases.a.freeze.0: pattern 'trunk.layer9' matches nothing \(nearest: trunk.layer",
    ),
    "too many depth groups": (
        {"phases": [{"name": "a", "epochs": 1, "freeze": ["trunk@first:9"]}]},
        [],
        r"tiny.yaml:\d+: phases.a.freeze.0: pattern 'trunk@first:9' asks for 9 of the 5 depth groups of 'trunk'",
    ),
    "wrong count": (
        {"phases": [{"name": "a", "epochs": 1, "freeze": [{"pattern": "heads.object", "must_match": 3}]}]},
        [],
        r"tiny.yaml:\d+: phases.a.freeze.0: pattern 'heads.object' must match 3 names, but matches 2",
    ),
    "dead classic pattern": (
        {"MODEL": {"NOT_TRAIN_IN_MULTI_TASK": ["encoder"]}},
        [],
        r"tiny.yaml:\d+: MODEL.NOT_TRAIN_IN_MULTI_TASK.0: pattern '~encoder' matches nothing",
    ),
    "phase that trains nothing": (
        {"phases": [{"name": "a", "epochs": 1, "freeze": ["trunk", "heads"]}]},
        [],
        r"tiny.yaml:\d+: phases.a.freeze: phase 'a' trains nothing",
    ),
    "uncovered learning rate": (
        {},
        ["phases.finetune.lr={trunk: 1.0}"],
        r"command line: phases.finetune.lr: no pattern covers \d+ trainable parameters, such as heads.",
    ),
    "unknown trunk": ({"trunk": {"name": "resnt18"}}, [], r"tiny.yaml:\d+: trunk.name: .*nearest: resnet18"),
    "missing weights": (
        {},
        ["trunk.weights=nowhere.pth"],
        r"command line: trunk.weights: no such file: nowhere.pth \(choices: hub, packaged, none",
    ),
    "packaged for another trunk": ({}, ["trunk.weights=packaged"], "trunk.weights: packaged holds weights of tf_eff"),
    "images beyond any memory": (
        {},
        ["data.image_size=1000000000"],
        "command line: data.image_size: one image of 1,000,000,000 x 1,000,000,000 pixels takes 12,000,000,000 GB",
    ),
    "more images than any memory holds": (
        {},
        ["data.num_train=1000000000000"],
        r"command line: data.num_train: 1,000,000,000,0.0 images of 32 x 32 pixels with their labels take 14,344,000",
    ),
    "unknown data": (
        {},
        ["data.name=scene"],
        "command line: data.name: expected one of scenes, .*, got 'scene'; nearest: scenes",
    ),
    "task without labels": (
        {},
        ["tasks.dept={type: depth}"],
        "command line: tasks.dept: scenes has no label .dept.; .*; nearest: depth; if the task has another name than",
    ),
    "labels that do not fit": (
        {},
        ["tasks.segmentation.num_classes=5"],
        "command line: tasks.segmentation.num_classes: expected at least the 13 classes of this label .*, got 5",
    ),
    "images too small for the trunk": (
        {"trunk": {"name": "test_vit"}, "phases": [{"name": "a", "steps": 1}]},
        ["data.image_size=8"],
        "command line: data.image_size: 'test_vit' takes no images of 8 x 8 pixels; sizes that fit: 16, .*160 \\(",
    ),
    "options that leave no pooled vector": (
        {},
        ["trunk.options={global_pool: ''}"],
        r"command line: trunk.options: 'test_resnet' with options .* expected a pooled vector per image",
    ),
    "options of another input": (
        {},
        ["trunk.options={in_chans: 1}"],
        "command line: trunk.options: the trunk takes images of 1 channel, and those of scenes have 3",
    ),
    "a model that is no trunk": (
        {},
        ["trunk.options={features_only: true}"],
        r"command line: trunk.options: 'test_resnet' with options {'features_only': True} gives no features",
    ),
    "batches of one image": (
        {},
        ["data.batch_size=1"],
        "command line: data.batch_size: expected batches of two images",
    ),
    "a seed that no generator takes": ({}, ["seed=20241124093000"], "command line: seed: expected a number less than"),
    "freezing a method that steps itself": (
        {"balance": {"method": "famo"}},
        ["phases.0.freeze=[trunk, balance]"],
        "command line: phases.warm-heads.freeze: balance cannot be frozen, since its method steps its own weights",
    ),
    "unknown balance": ({}, ["balance.method=uv"], "command line: balance.method: no method 'uv'; nearest: uw"),
    "no such device": ({}, ["device=cuda:9"], "command line: device: there is no device 'cuda:9' here"),
    "run directory below a file": ({"runs_dir": "tiny.yaml/x"}, [], r"tiny.yaml:\d+: runs_dir: .*cannot be made"),
    "length of both kinds": (
        {"phases": [{"name": "a", "epochs": 1, "steps": 1}]},
        [],
        r"tiny.yaml:\d+: phases.a: expected exactly one of epochs, steps, until, evaluate_only",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_message_exit_code_2_and_nothing_written(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, overrides, message = BAD[name]
    file = tiny_config(tmp_path, **changes)
    before = {path for path in tmp_path.rglob("*") if "cache" not in str(path)}
    assert main(["train", str(file), *overrides]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert re.search(message, said.err), said.err
    assert said.err.startswith("error: ")
    assert {path for path in tmp_path.rglob("*") if "cache" not in str(path)} == before


def test_a_run_directory_that_holds_a_run_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_config(tmp_path)
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny" / MARK).touch()
    (tmp_path / "runs/tiny-2").mkdir()
    assert main(["train", str(file)]) == 2
    said = "already holds a run; give this one another name, such as name=tiny-3, or resume that one: resume=auto"
    assert said in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs/tiny").iterdir()] == [MARK]


# What other programs leave in a folder of that name.
FOREIGN = {
    "config.yaml": "mine",
    "metrics.jsonl": "{}",
    "checkpoints/step-00000001/state.json": '{"step": 1}',
    "checkpoints/step-00000002/state.json": "[",
    "checkpoints/step-00000003/model.safetensors": "",
    "checkpoints/last.pt": "weights",
    "history.json": "[]",
    "notes.txt": "",
}


@pytest.mark.parametrize("names", [[name] for name in FOREIGN] + [list(FOREIGN)], ids=" ".join)
@pytest.mark.parametrize("resume", [[], ["resume=auto"]])
def test_a_folder_that_is_no_run_of_ours_is_refused_and_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], resume: list[str]
) -> None:
    file, folder = tiny_config(tmp_path), tmp_path / "runs/tiny"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(FOREIGN[name])
    before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    assert main(["train", str(file), *resume]) == 2
    what = "files, but no run to resume" if resume else "files"
    said = f"error: {file}:3: name: {folder} already holds {what}; give this one another name, such as name=tiny-2\n"
    assert re.sub(r"yaml:\d+", "yaml:3", capsys.readouterr().err) == said
    assert {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")} == before


def test_a_missing_configuration_lists_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config(tmp_path)
    assert main(["train", str(tmp_path / "tyni.yaml")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/tyni.yaml: no such file; there are: {tmp_path}/tiny.yaml\n"


@pytest.mark.slow
def test_a_damaged_data_cache_costs_a_warning_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_config(tmp_path)
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    assert main(["train", str(file), cache, "-q", "phases.finetune.steps=1"]) == 0
    entry = next((tmp_path / "cache").glob("scenes-train-*"))
    with (entry / "data.safetensors").open("r+b") as stream:
        stream.seek(-5, 2)
        stream.write(b"\xff")
    assert main(["train", str(file), cache, "-q", "name=again", "phases.finetune.steps=1"]) == 0
    reason = "its bytes are not those that were written"
    warning = f"warning: the data cache {entry} is damaged ({reason}): the data is made again\n"
    assert capsys.readouterr().out == warning
    runs = [read_metrics(tmp_path / "runs" / name) for name in ("tiny", "again")]
    assert [row["val/score"] for row in runs[0] if "val/score" in row] == [
        row["val/score"] for row in runs[1] if "val/score" in row
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_run_directory_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert main(["train", str(tiny_config(tmp_path, runs_dir=str(closed)))]) == 2
    assert "is not a directory that you may write to" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["tran"], ["train"], ["train", "x.yaml", "--nonsense"]])
def test_wrong_arguments_are_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage: mtl" in capsys.readouterr().err


def test_the_module_and_the_command_are_the_same_program() -> None:
    command = Path(sys.executable).parent / "mtl"
    said = [
        subprocess.check_output([*call, "--version"], text=True) for call in ([command], [sys.executable, "-m", "mtl"])
    ]
    assert said == [f"mtl {__version__}\n"] * 2


@pytest.mark.slow
def test_of_two_runs_that_start_at_once_with_one_name_one_is_refused(tmp_path: Path) -> None:
    file = tiny_config(tmp_path)
    call = ["-m", "mtl", "train", str(file), "-q"]
    processes = [Forked(call, stderr=subprocess.PIPE) for _ in range(2)]
    results = sorted((process.wait(timeout=HANGS_S), process.communicate()[1]) for process in processes)
    assert [code for code, _ in results] == [0, 2], results
    assert "another process is training in" in results[1][1] or "already holds a run" in results[1][1]
    steps = [row["step"] for row in read_metrics(tmp_path / "runs/tiny") if "train/loss" in row]
    assert steps == list(range(1, 13))


def test_a_loss_that_is_not_finite_is_exit_code_1_and_says_how_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tiny_config(tmp_path)), "-q", "phases.0.lr=1e10", "phases.0.epochs=3"]) == 1
    why, how = capsys.readouterr().err.splitlines()
    assert re.match(r"error: train/loss\S* is \S+ at step \d+ of phase 'warm-heads'; a lower learning rate", why)
    assert how == "Nothing was saved yet."


@pytest.mark.slow
def test_a_run_that_is_killed_is_not_called_clean(tmp_path: Path) -> None:
    file = tiny_config(tmp_path, phases=[{"name": "a", "freeze": ["trunk"], "epochs": 1}, {"name": "b", "epochs": 500}])
    process = Forked(["-m", "mtl", "train", str(file), "-q"])
    audit = tmp_path / "runs/tiny/audit.json"
    wait_until(lambda: audit.exists() and '"name": "b"' in audit.read_text())
    process.kill()
    process.wait()
    report = json.loads(audit.read_text())
    assert report["ok"] is False
    assert [(phase["name"], phase["completed"]) for phase in report["phases"]] == [("a", True), ("b", False)]
    assert main(["report", str(tmp_path / "runs/tiny")]) == 0
    assert 'Audit: <b class="warn">not finished</b>' in (tmp_path / "runs/tiny/report.html").read_text()


@pytest.mark.slow
def test_a_run_that_is_interrupted_says_how_to_resume(tmp_path: Path) -> None:
    file = tiny_config(tmp_path, phases=[{"name": "a", "epochs": 500}])
    process = Forked(["-m", "mtl", "train", str(file), "-q"], stderr=subprocess.PIPE)
    last = tmp_path / "runs/tiny/checkpoints/last"
    wait_until(last.exists)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=HANGS_S)
    assert process.returncode == 1
    why, how = said.strip().splitlines()
    assert re.fullmatch(r"stopped by SIGINT after step \d+; all is saved", why)
    assert how == "To resume, rerun with resume=auto."


@pytest.mark.slow
def test_a_picture_that_cannot_be_written_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_config(tmp_path, phases=[{"name": "a", "steps": 1}])
    assert main(["train", str(file), "-q"]) == 0
    for picture, message in [
        ("nodir/x.png", "nodir/x.png cannot be written: No such file or directory"),
        ("x.pdf", "--picture: expected a name that ends in .png, got x.pdf"),
    ]:
        assert main(["report", str(tmp_path / "runs/tiny"), "--picture", picture]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.slow
def test_the_default_configuration_takes_a_method_that_learns_nothing() -> None:
    config = load_config(ROOT / "configs/scenes.yaml", ["balance.method=mean", "data.num_train=32", "data.num_val=8"])
    phases = assemble(config, quiet=True).phases
    assert {group["lr"] for group in phases[0].groups} == {3e-3}
