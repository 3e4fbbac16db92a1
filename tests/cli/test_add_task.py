"""`mtl add-task`: old weights and outputs keep every bit, which the tests check by themselves; mistakes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from distributed_runs import PROGRAM, finish, surroundings
from mtl.checkpoint.trained_run import open_trained_run
from mtl.cli import main
from mtl.config import ConfigError, load_config
from mtl.phases.setup import build_meta_setup, build_model_setup
from mtl.results.unchanged import compare_outputs
from mtl.runtime.fingerprint import fingerprint, root
from mtl.training.add_task import open_finished_run
from mtl.training.setup import assemble
from processes import torchrun
from runs import TINY, read_metrics, read_model, tiny_config

# Heads with and without BatchNorm, and of two kinds of features.
OLD: dict[str, Any] = {
    "segmentation": {"type": "segmentation", "num_classes": 13},
    "kind": {"type": "classification", "label": "object"},
}
FASHION = {"name": "multifashion", "num_train": 48, "num_val": 16}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The folder of a first run, `runs/first`, whose best weights are not its last ones."""
    folder = tmp_path_factory.mktemp("first")
    phases = [{"name": "a", "epochs": 3, "lr": 1e-2}, {"name": "b", "epochs": 1, "lr": 3.0}]
    file = tiny_config(folder, name="first", tasks=OLD, phases=phases, seed=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        assert main(["train", "-q", str(file)]) == 0
    return folder


@pytest.fixture
def here(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    shutil.copytree(first / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **config: Any) -> str:
    (folder / "new.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return "new.yaml"


DEPTH: dict[str, Any] = {"tasks": {"depth": {"type": "depth"}}, "phases": [{"name": "new", "epochs": 2, "lr": 1e-2}]}


def outputs_of(run_dir: Path, images: Tensor, which: str = "best") -> dict[str, Tensor]:
    """Of a model that is built from a run's configuration and filled from the safetensors of a checkpoint."""
    config = load_config(run_dir / "config.yaml", ["trunk.weights=none"])
    model = build_model_setup(config).model.eval()
    there = read_model(run_dir / "checkpoints" / which)
    model.load_state_dict({name: there[name] for name in model.state_dict()})
    with torch.no_grad():
        outputs: dict[str, Tensor] = model(images)
    return outputs


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().view(torch.int32) for tensor in (one, other)))


def proof(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "unchanged.json").read_text())
    return content


def old_names(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in tensors if name.startswith(("trunk.", "heads.segmentation.", "heads.kind."))]


def test_a_task_is_added_and_every_old_bit_is_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["add-task", "runs/first", write(here, **DEPTH)]) == 0
    said = "".join(capsys.readouterr())
    run = here / "runs/first-depth"
    best, last = (read_model(run / "checkpoints" / which) for which in ("best", "last"))
    before = read_model(here / "runs/first/checkpoints/best")
    assert len(old_names(before)) > 100 and set(old_names(best)) == set(old_names(before))
    for name in old_names(before):
        assert torch.equal(best[name], before[name]) and torch.equal(last[name], before[name]), name
    assert any(name.startswith("heads.depth.") for name in best)
    # The outputs, by models of the test's own, on the images that the run says it compared.
    setup = assemble(load_config(run / "config.yaml"), quiet=True, begins=False)
    images = torch.cat([split.images_of(torch.arange(len(split)), None) for split in (setup.val, setup.train)])
    one, other = outputs_of(here / "runs/first", images), outputs_of(run, images)
    assert list(other) == ["segmentation", "kind", "depth"]
    assert all(same_bits(one[task], other[task]) for task in OLD)
    assert not torch.equal(one["kind"], outputs_of(here / "runs/first", images, "last")["kind"])
    found = proof(run)
    assert (found["run"], found["images"], found["equal"]) == ("runs/first", 60, True)
    assert found["splits"] == {"val": 20, "train": 40} and list(found["tasks"]) == list(OLD)
    batches = {"val 0": (0, 8), "val 8": (8, 16), "val 16": (16, 20)}
    batches |= {f"train {at}": (20 + at, 28 + at) for at in range(0, 40, 8)}
    for task in OLD:
        parts = {name: outputs_of(here / "runs/first", images[a:b])[task] for name, (a, b) in batches.items()}
        assert found["tasks"][task] == root({name: fingerprint(part) for name, part in parts.items()})
    assert "unchanged: the outputs of segmentation, kind are those of runs/first/checkpoints/step-00000015, to" in said
    report = (run / "report.html").read_text()
    assert '<h3>Outputs of the old tasks: <b class="good">unchanged</b></h3>' in report
    assert found["tasks"]["kind"] in report
    # The same data: old tasks are measured as before.
    rows = [row for row in read_metrics(run) if "val/score" in row]
    assert len(rows) == 2 and rows[0]["val/kind/accuracy"] == rows[1]["val/kind/accuracy"]
    assert "no phase trains it" not in said


def test_the_run_proves_itself_again_and_the_weights_are_compared_by_audit(here: Path) -> None:
    new = write(here, **DEPTH)
    assert main(["add-task", "runs/first", new, "--name", "more", "-q"]) == 0
    found = (here / "runs/more/unchanged.json").read_text()
    (here / "runs/more/unchanged.json").unlink()
    assert main(["add-task", "runs/first", new, "--name", "more", "-q", "resume=auto"]) == 0
    assert (here / "runs/more/unchanged.json").read_text() == found
    checkpoints = [f"runs/{name}/checkpoints/best" for name in ("first", "more")]
    assert main(["audit", *checkpoints, "--freeze", "trunk", "heads.segmentation", "heads.kind"]) == 0
    assert main(["audit", "runs/more"]) == 0
    assert main(["report", "runs/more"]) == 0
    assert 'class="good">unchanged</b>' in (here / "runs/more/report.html").read_text()


def test_other_data_need_not_have_the_old_labels(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {**FASHION, "seed": 3}
    new = write(here, tasks={"left": {"type": "classification"}}, data=data, phases=[{"name": "new", "epochs": 2}])
    assert main(["add-task", "runs/first", new, "data.num_val=12"]) == 0
    said = "".join(capsys.readouterr())
    run = here / "runs/first-left"
    assert proof(run)["equal"] and proof(run)["splits"] == {"val": 12, "train": 48}
    names = {name for row in read_metrics(run) for name in row if name.startswith("val/") and name != "val/best_score"}
    assert names == {"val/score", "val/left/accuracy"}
    # As much as the new head reads is kept, and no pyramid for the old ones.
    (kept,) = re.findall(r"kept in memory: (\S+) kB for 60 images", said)
    width = build_meta_setup(load_config(run / "config.yaml")).model.heads["left"].get_parameter("out.weight").shape[1]
    assert float(kept) * 1000 == pytest.approx(60 * 4 * width, rel=0.01)
    config = load_config(run / "config.yaml")
    assert (config.data.image_size, config.data.batch_size) == (32, 8)
    kind: Any = config.tasks["kind"]
    assert kind.unlabelled and kind.label is None
    assert kind.class_names == json.loads((here / "runs/first/data.json").read_text())["classes"]["object"]
    # What was added to can be added to: `left` is an old task by now, and what it learned is kept.
    again = write(here, tasks={"normals": {"type": "normals"}}, data={"name": "scenes", "num_train": 16, "num_val": 8})
    assert main(["add-task", "runs/first-left", again, "--name", "third", "-q"]) == 0
    assert list(proof(here / "runs/third")["tasks"]) == ["segmentation", "kind", "left"]
    third: Any = load_config(here / "runs/third/config.yaml").tasks
    assert third["left"].class_names[9] == "ankle boot" and third["kind"].class_names == kind.class_names
    assert load_config(here / "runs/third/config.yaml").written_phases[0].config.epochs == 2
    assert main(["train", "-q", "runs/third/config.yaml", "resume=auto"]) == 0


def test_mixed_data_may_have_all_labels(here: Path) -> None:
    sets = {"rooms": {"name": "scenes", "num_train": 16, "num_val": 8}, "shop": FASHION}
    data = {"name": "mixed", "sets": sets, "mix": {"by": "uniform"}}
    new = write(here, tasks={"left": {"type": "classification"}, "depth": {"type": "depth"}}, data=data)
    assert main(["add-task", "runs/first", new, "-q", "phases.left-depth.epochs=1"]) == 0
    assert proof(here / "runs/first-left-depth")["images"] == 8 + 16 + 16 + 48


# The proof


def test_outputs_that_changed_are_named_with_their_size(here: Path) -> None:
    """Best and last weights of the first run differ, which stands for a new run that has lost what the old one knew."""
    run = here / "runs/first"
    setup = assemble(load_config(run / "config.yaml"), quiet=True)
    old = open_trained_run(run, "last")
    found = compare_outputs(setup, run, old)
    images = torch.cat([split.images_of(torch.arange(len(split)), None) for split in (setup.val, setup.train)])
    assert not found.equal and [each.task for each in found.differences] == ["segmentation", "kind"]
    for each in found.differences:
        parts = [images[a:b] for a, b in (*[(0, 8), (8, 16), (16, 20)], *((at, at + 8) for at in range(20, 60, 8)))]
        one, other = (torch.cat([outputs_of(run, p, which)[each.task] for p in parts]) for which in ("last", "best"))
        assert each.images == 60 and (each.split, each.image) == ("val", 0)
        assert each.max_difference == (one.double() - other.double()).abs().max().item()
    assert compare_outputs(setup, run, open_trained_run(run, "best")).equal


def test_a_run_whose_old_outputs_changed_ends_with_3_and_its_report_says_so(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The old run is trained again, otherwise, after the new one has begun with it."""
    new = write(here, **DEPTH)
    assert main(["add-task", "runs/first", new, "-q"]) == 0
    written = (here / "runs/first/config.yaml").read_text()
    shutil.rmtree(here / "runs/first")
    (here / "first.yaml").write_text(written)
    assert main(["train", "-q", "first.yaml", "runs_dir=runs", "phases.a.lr=0.02"]) == 0
    capsys.readouterr()
    assert main(["add-task", "runs/first", new, "-q", "resume=auto"]) == 3
    said = "".join(capsys.readouterr())
    assert re.search(r"changed: outputs are not those of runs/first/checkpoints/step-\d+, on 60 images", said)
    assert re.search(r"  segmentation: image 0 of val is the first of 60, differences up to [\d.e-]+\n", said)
    assert proof(here / "runs/first-depth")["equal"] is False
    assert '<b class="bad">changed</b>' in (here / "runs/first-depth/report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("distributed", ["{strategy: ddp}", "{strategy: fsdp2, checkpoint: dcp}"])
def test_two_processes_add_a_task_and_prove_it(here: Path, cache_dir: Path, distributed: str) -> None:
    new = write(here, **DEPTH)
    command = ["add-task", "runs/first", new, "-q", f"distributed={distributed}"]
    code, said = finish(torchrun(2, PROGRAM, *command), surroundings(cache_dir))
    assert code == 0, said
    before, after = (read_model(here / f"runs/{name}/checkpoints/best") for name in ("first", "first-depth"))
    assert all(torch.equal(after[name], before[name]) for name in old_names(before))
    assert proof(here / "runs/first-depth")["equal"]


# Mistakes


def refused(here: Path, capsys: pytest.CaptureFixture[str], *arguments: str, run: str = "runs/first") -> str:
    """The one line that is said; exit code 2, and nothing is written."""
    before = sorted(here.rglob("*"))
    capsys.readouterr()
    assert main(["add-task", run, *arguments]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert sorted(here.rglob("*")) == before and not out
    return line


OBJECT = {"type": "classification", "num_classes": 10}


def phase(**settings: Any) -> dict[str, Any]:
    return {**DEPTH, "phases": [{"name": "a", "epochs": 1, **settings}]}


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ({"phases": []}, [], r"new.yaml:1: tasks: expected the tasks to add, such as \{object:"),
        ({"tasks": {}}, [], r"new.yaml:1: tasks: expected the tasks to add"),
        (
            {"tasks": {"kind": OBJECT}},
            [],
            r"new.yaml:2: tasks.kind: runs/first has the task 'kind' already, with segmentation, kind; give the new",
        ),
        (
            {**DEPTH, "trunk": {"name": "test_vit"}},
            [],
            r"new.yaml:8: trunk: the trunk is that of runs/first, as it is; leave this out",
        ),
        (DEPTH, ["trunk.weights=hub"], r"command line: trunk.weights: the trunk is that of runs/first"),
        (DEPTH, ["tasks.kind.num_classes=9"], r"command line: tasks.kind.num_classes: the task is that of runs/first"),
        ({"tasks": {"dept": {"type": "depth"}}}, [], r"tasks.dept: scenes has no label 'dept'; .*nearest: depth"),
        (
            phase(tasks=["dept"]),
            [],
            r"new.yaml:\d+: phases.a.tasks.0: no task 'dept'; there are: segmentation, kind, depth; nearest: depth",
        ),
        (
            {"tasks": {"left": {"type": "classification"}}, "data": FASHION},
            ["phases.left.tasks=[kind]"],
            r"command line: phases.left.tasks.0: kind is unlabelled; there are: left",
        ),
        (
            phase(freeze=["heads"]),
            [],
            r"new.yaml:\d+: phases.a.freeze: this would train trunk, and runs/first has trained them",
        ),
        (
            phase(freeze=["trunk", "heads", "!heads.depth", "!trunk.bn1"]),
            [],
            r"phases.a.freeze: this would train trunk.bn1, and runs/first has trained them: .*"
            r"; freeze trunk, heads.segmentation, heads.kind, or leave it out$",
        ),
        (
            DEPTH,
            ["phases.new.train=[heads]"],
            r"command line: phases.new.train: this would train heads.segmentation, heads.kind, and",
        ),
        (
            {**DEPTH, "phases": [{"repeat": 2, "phases": [{"name": "b", "epochs": 1, "freeze": []}]}]},
            [],
            r"phases.b.freeze: this would train trunk, heads.segmentation, heads.kind, and",
        ),
        (
            {**DEPTH, "init_from": {"run": "runs/first", "names": "trunk.bn1"}},
            [],
            r"new.yaml:\d+: init_from.1.names: an entry before this one gives trunk.bn1 already",
        ),
        (DEPTH, ["--name", "first"], r"command line: name: runs/first already holds a run; give this one another name"),
        (DEPTH, ["phases.nw.epochs=1"], r"command line: 'phases.nw.epochs=1': 'nw' is none of new"),
        (DEPTH, ["data.image_size=1"], r"command line: data.image_size: expected a number greater than or equal to 8"),
    ],
)
def test_a_mistake_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any], overrides: list[str], message: str
) -> None:
    line = refused(here, capsys, write(here, **config), *overrides)
    assert re.search(message, line), line


def test_a_run_that_cannot_be_added_to_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = write(here, **DEPTH)
    line = refused(here, capsys, new, run="runs/nowhere")
    assert line == "error: runs/nowhere is not there; expected the directory of a run, such as runs/scenes"
    checkpoint = here / "runs/first/checkpoints/step-00000015"
    state = (checkpoint / "state.json").read_text()
    model = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(model[:-8])
    assert "model.safetensors is damaged" in refused(here, capsys, new)
    (checkpoint / "model.safetensors").write_bytes(model)
    (checkpoint / "state.json").write_text(state.replace('"step": 15', '"step": 16', 1))
    assert "is damaged, or of another version: it is not what was written" in refused(here, capsys, new)
    (checkpoint / "state.json").write_text(state)
    config = here / "runs/first/config.yaml"
    written = config.read_text()
    config.write_text(written.replace("batch_size", "batchsize"))
    assert "first/config.yaml:" in (line := refused(here, capsys, new)) and "data.batchsize: unknown key" in line
    config.write_text(written.replace("num_classes: 13", "num_classes: 14"))
    line = refused(here, capsys, new)
    assert "2 of another shape: heads.segmentation.out.weight is (13, " in line and "(14, " in line
    config.write_text(written.replace("  kind:\n", "  knd:\n"))
    assert "tasks: the run was trained with segmentation, kind; the file was edited" in refused(here, capsys, new)
    config.unlink()
    assert "first/config.yaml: no such file" in refused(here, capsys, new)


def test_a_run_that_is_not_finished_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its newest checkpoint is inside its second phase."""
    checkpoints = here / "runs/first/checkpoints"
    (checkpoints / "last").unlink()
    (checkpoints / "last").symlink_to("step-00000015")
    line = refused(here, capsys, write(here, **DEPTH))
    assert "runs/first is not finished: its last checkpoint, of step 15, is of phase 'a'" in line
    assert line.endswith("finish it first: mtl train runs/first/config.yaml resume=auto")


def test_a_run_that_ends_with_an_evaluation_is_finished(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It writes no checkpoint after the evaluation; as a source of weights, an unfinished run is warned of."""
    phases = [{"name": "a", "epochs": 1}, {"name": "b", "evaluate_only": True}]
    assert main(["train", "-q", str(tiny_config(here, name="judged", tasks=OLD, phases=phases))]) == 0
    assert open_finished_run(here / "runs/judged").step == 5
    (here / "runs/first/checkpoints/last").unlink()
    (here / "runs/first/checkpoints/last").symlink_to("step-00000015")
    for name, warned in (("judged", False), ("first", True)):
        entry = {"run": f"runs/{name}", "names": "trunk"}
        capsys.readouterr()
        file = tiny_config(here, name=f"from-{name}", tasks=OLD, phases=phases[:1], init_from=entry)
        assert main(["train", "-q", str(file)]) == 0
        said = "".join(capsys.readouterr())
        assert ("runs/first is not finished: its last step so far is 15, of 'a'" in said) == warned


# Tasks without labels


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"kind": {**OBJECT, "unlabelled": True}}, "tasks: expected a task that is not unlabelled"),
        ({"kind": {**OBJECT, "unlabelled": True, "label": "a"}}, "no label if it is unlabelled"),
        ({"kind": {**OBJECT, "unlabelled": True, "data": "a"}}, "no data if it is unlabelled"),
        ({"kind": {**OBJECT, "class_names": ["a", "b"]}}, "class_names only if it is unlabelled"),
        (
            {"a": {"type": "distill", "teacher": {"run": "b"}, "unlabelled": True}, "depth": {"type": "depth"}},
            "a.unlabelled: expected false: the teacher gives labels of any image",
        ),
    ],
)
def test_a_task_without_labels_reads_none(tmp_path: Path, tasks: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tiny_config(tmp_path, tasks=tasks, phases=[{"name": "a", "epochs": 1}]))


def test_a_task_without_labels_takes_its_head_from_elsewhere_and_has_no_metrics(tmp_path: Path) -> None:
    tasks = {"kind": {**OBJECT, "unlabelled": True}, "depth": TINY["tasks"]["depth"]}
    phases: list[dict[str, Any]] = [{"name": "a", "epochs": 1}]
    with pytest.raises(ConfigError, match=r"tasks.kind.unlabelled: nothing trains heads.kind, and init_from does not"):
        assemble(load_config(tiny_config(tmp_path, tasks=tasks, balance="mean", phases=phases)), quiet=True)
    phases = [{"name": "a", "until": {"metric": "val/kind/accuracy", "at_least": 0.5}, "max_epochs": 2}]
    with pytest.raises(ConfigError, match=r"no metric 'val/kind/accuracy'.* val/score, train/loss, val/depth"):
        build_meta_setup(load_config(tiny_config(tmp_path, tasks=tasks, balance="mean", phases=phases)))
