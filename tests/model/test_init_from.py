"""`init_from`: what is taken from another run or a file, to the bit; what does not fit is named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl.checkpoint.run_files import read_history
from mtl.cli import main
from mtl.config import ConfigError, load_config
from mtl.model.init_from import InitialWeights, read_initial_weights
from mtl.phases.setup import build_meta_setup
from mtl.training.run import train
from mtl.training.setup import RunSetup, assemble
from runs import TINY, read_model, tiny_config, tiny_parts

TASKS = {name: TINY["tasks"][name] for name in ("segmentation", "object")}
# The second phase spoils what the first one has learned: the best weights are not the last ones.
PHASES: list[dict[str, Any]] = [
    {"name": "a", "epochs": 3, "lr": 1e-2},
    {"name": "b", "epochs": 1, "lr": 3.0},
]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        parts = tiny_parts(tmp_path_factory.mktemp("old"), tasks=TASKS, phases=PHASES, seed=4)
        return train(parts, quiet=True).run_dir


def begun(folder: Path, *overrides: str, **changes: Any) -> RunSetup:
    """A run of other tasks that has not begun to train."""
    own = {"tasks": TASKS | {"depth": TINY["tasks"]["depth"]}, "phases": [{"name": "all", "epochs": 1}]}
    return tiny_parts(folder, *overrides, **own | changes)


def state(setup: RunSetup) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in setup.root.state_dict().items() if not name.startswith("balance.")}


def test_what_patterns_select_has_the_bits_of_the_best_weights_and_the_rest_is_as_without(
    old: Path, tmp_path: Path
) -> None:
    best = read_model(old / "checkpoints/best")
    plain = state(begun(tmp_path))
    names = ["trunk", "heads.segmentation", "!trunk.layer4", "!heads.segmentation.out.bias"]
    found = state(begun(tmp_path, init_from={"run": str(old), "names": names}))
    assert list(found) == list(plain)
    taken = [
        name
        for name in plain
        if (name.startswith("trunk.") and not name.startswith("trunk.layer4."))
        or (name.startswith("heads.segmentation.") and name != "heads.segmentation.out.bias")
    ]
    assert any(name.endswith("running_var") for name in taken) and len(taken) < len(plain)
    for name, tensor in found.items():
        assert torch.equal(tensor, (best if name in taken else plain)[name]), name
        if name in taken and name.endswith("weight") and "bn" not in name and plain[name].ndim > 1:
            assert not torch.equal(tensor, plain[name]), name


def test_the_bias_of_a_head_that_was_taken_is_not_set_from_the_data(old: Path, tmp_path: Path) -> None:
    best = read_model(old / "checkpoints/best")
    found = state(begun(tmp_path, init_from={"run": str(old), "names": ["heads"]}, tasks=TASKS))
    fitted = state(begun(tmp_path, tasks=TASKS))
    for name in ("heads.object.out.bias", "heads.segmentation.out.bias"):
        assert torch.equal(found[name], best[name]) and not torch.equal(found[name], fitted[name])


@pytest.mark.parametrize("which", ["best", "last", 15, 20])
def test_a_checkpoint_may_be_chosen(old: Path, tmp_path: Path, which: str | int) -> None:
    expected = read_model(old / "checkpoints" / (which if isinstance(which, str) else f"step-{which:08d}"))
    setup = begun(tmp_path, init_from={"run": str(old), "names": "trunk", "which": which})
    trunk = {name: tensor for name, tensor in state(setup).items() if name.startswith("trunk.")}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trunk.items())
    assert setup.taken[0].step == {"best": 15, "last": 20}.get(str(which), which)


def test_best_and_last_are_not_the_same_here(old: Path) -> None:
    best, last = (read_model(old / "checkpoints" / which) for which in ("best", "last"))
    assert not torch.equal(best["trunk.conv1.0.weight"], last["trunk.conv1.0.weight"])


def test_of_a_run_with_averages_it_takes_the_averages(tmp_path: Path) -> None:
    phases = [{"name": "a", "epochs": 1, "lr": 1e-2}]
    parts = tiny_parts(tmp_path, name="ema", tasks=TASKS, phases=phases, optim={"ema_decay": 0.7})
    run = train(parts, quiet=True).run_dir
    # `live` next to the optimizer state are the weights as they trained.
    live = load_file(run / "checkpoints/last/optimizer.safetensors")
    trained = next(tensor for name, tensor in live.items() if name.endswith("trunk.conv1.0.weight") and "live" in name)
    found = state(begun(tmp_path, init_from={"run": str(run), "names": "trunk"}))["trunk.conv1.0.weight"]
    assert torch.equal(found, read_model(run / "checkpoints/best")["trunk.conv1.0.weight"])
    assert not torch.equal(found, trained)


def test_an_entry_may_be_a_file_and_rename_a_head(old: Path, tmp_path: Path) -> None:
    best = read_model(old / "checkpoints/best")
    head = {name: tensor.half() for name, tensor in best.items() if name.startswith("heads.object.")}
    save_file(head, tmp_path / "head.safetensors")
    file = str(tmp_path / "head.safetensors")
    entries = [
        {"run": str(old), "names": ["trunk"]},
        {"weights": file, "names": ["heads.object"], "rename": {"heads.object": "heads.a"}},
    ]
    tasks = {"a": {**TASKS["object"], "label": "object"}, "object": TASKS["object"]}
    found = state(begun(tmp_path, init_from=entries, tasks=tasks))
    plain = state(begun(tmp_path, tasks=tasks))
    for name, tensor in head.items():
        renamed = name.replace("heads.object", "heads.a")
        assert torch.equal(found[renamed], tensor.float()) and torch.equal(found[name], plain[name])
    assert torch.equal(found["trunk.conv1.0.weight"], best["trunk.conv1.0.weight"])


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_exactly_the_names_that_are_listed_are_taken(
    old: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    best = read_model(old / "checkpoints/best")
    mine = [name for name in best if name.split(".")[0] in ("trunk", "heads")]
    chosen = data.draw(st.lists(st.sampled_from(mine), min_size=1, unique=True))
    folder = tmp_path_factory.mktemp("drawn")
    found = initial(folder, {"run": str(old), "names": chosen})
    assert found.tensors.keys() == set(chosen)
    assert all(torch.equal(found.tensors[name], best[name]) for name in chosen)
    assert sum(found.taken[0].tensors.values()) == len(chosen)


def initial(folder: Path, *entries: dict[str, Any], **changes: Any) -> InitialWeights:
    own = {"tasks": TASKS, "phases": PHASES[:1], "init_from": list(entries)} | changes
    setup = build_meta_setup(load_config(tiny_config(folder, **own)))
    classes = {name: task.class_names for name, task in setup.tasks.items()}
    return read_initial_weights(setup.config, setup.root, classes)


def test_the_trunks_own_weights_are_not_loaded_if_it_is_given_whole(old: Path, tmp_path: Path) -> None:
    trunk = {"name": "test_resnet", "weights": str(tmp_path / "nowhere.safetensors")}
    setup = begun(tmp_path, trunk=trunk, init_from={"run": str(old), "names": "trunk"})
    best = read_model(old / "checkpoints/best")
    assert torch.equal(state(setup)["trunk.conv1.0.weight"], best["trunk.conv1.0.weight"])
    with pytest.raises(ConfigError, match=r"trunk\.weights: no such file"):
        begun(tmp_path, trunk=trunk, init_from={"run": str(old), "names": ["trunk", "!trunk.bn1"]})


def test_the_run_records_what_it_took_and_does_not_need_the_source_to_resume(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "runs/old"
    shutil.copytree(old, source, symlinks=True)
    tasks = TASKS | {"depth": TINY["tasks"]["depth"]}
    entry = {"run": str(source), "names": ["trunk", "heads.object"]}
    phases = [{"name": "all", "epochs": 1, "freeze": ["trunk", "heads.object"]}]
    file = tiny_config(tmp_path, name="new", tasks=tasks, init_from=entry, phases=phases)
    assert main(["train", str(file)]) == 0
    log = "".join(capsys.readouterr())
    best = read_model(source / "checkpoints/best")
    num = sum(name.startswith("trunk.") for name in best)
    taken = read_history(tmp_path / "runs/new/history.json")["init_from"]
    assert [item["source"] for item in taken] == [f"{source}/checkpoints/step-00000015"]
    assert taken[0]["tensors"] == {"trunk": num, "heads.object": 2} and taken[0]["step"] == 15
    assert f"trunk ({num} tensors), heads.object (2 tensors); digest {taken[0]['digest']}" in log
    kept = read_model(tmp_path / "runs/new/checkpoints/last")
    assert all(torch.equal(kept[name], best[name]) for name in best if name.startswith(("trunk.", "heads.object.")))
    shutil.rmtree(source)
    assert main(["report", str(tmp_path / "runs/new")]) == 0
    assert main(["train", "-q", str(file), "resume=auto"]) == 0
    assert read_history(tmp_path / "runs/new/history.json")["init_from"] == taken
    capsys.readouterr()
    assert main(["train", "-q", str(file), "resume=auto", "init_from={run: runs/other, names: trunk}"]) == 2
    assert "init_from: " in (said := capsys.readouterr().err) and "it is read only where a run begins" in said


# What does not fit


def mistake(folder: Path, *entries: dict[str, Any], **changes: Any) -> str:
    """The one line that is said; nothing is written."""
    file = tiny_config(folder, **{"tasks": TASKS, "phases": PHASES[:1], "init_from": list(entries)} | changes)
    with pytest.raises(ConfigError) as error:
        assemble(load_config(file), quiet=True)
    (line,) = error.value.mistakes
    assert not (folder / "runs").exists() and "\n" not in line
    return line


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ({"names": ["trunk.layer9"]}, {}, r"names.0: pattern 'trunk.layer9' matches nothing \(nearest: trunk.layer"),
        ({"names": ["trunk", "heads.objects"]}, {}, r"names.1: .* matches nothing \(nearest: heads.object,"),
        (
            {"names": ["heads"]},
            {"tasks": {"objekt": {**TASKS["object"], "label": "object"}}},
            r"it lacks 2 tensors of the new model: heads.objekt; nearest: heads.object; it has 24 tensors that the new"
            r" model has not: heads.segmentation, heads.object$",
        ),
        (
            {"names": ["heads.object"]},
            {"tasks": {"objekt": {**TASKS["object"], "label": "object"}}},
            r"it has 2 tensors that the new model has not: heads.object; nearest: heads.objekt$",
        ),
        (
            {"names": ["heads.object"]},
            {"tasks": {"object": {**TASKS["object"], "num_classes": 11}}},
            r"2 of another shape: heads.object.out.weight is \(10, \d+\) there, \(11, \d+\) here, heads.object.out.b",
        ),
        (
            {"names": ["trunk"]},
            {"trunk": {"name": "test_resnet"}, "data": {"name": "four:Four", "image_size": 32, "batch_size": 8}},
            r"1 of another shape: trunk.conv1.0.weight is \(\d+, 3, 3, 3\) there, \(\d+, 4, 3, 3\) here",
        ),
        ({"names": ["trunk"]}, {"trunk": {"name": "test_efficientnet"}}, r"it lacks \d+ tensors of the new model: "),
        ({"names": ["trunk"], "which": 7}, {}, r"has no checkpoint 7; there are: best, last, 20"),
        ({"names": ["trunk"], "rename": {"heads.objct": "heads.a"}}, {}, r"rename.heads.objct: .* nearest: heads.obj"),
        ({"names": ["trunk"], "run": "nowhere"}, {}, r"init_from.0.run: nowhere is not there; expected the dir"),
        ({"names": ["trunk"], "run": None, "weights": "nowhere.pt"}, {}, r"init_from.0.weights: nowhere.pt: no such"),
    ],
)
def test_a_mistake_is_one_line_at_its_key(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], changes: Any, message: str
) -> None:
    (tmp_path / "four.py").write_text(FOUR)
    monkeypatch.syspath_prepend(tmp_path)
    whole = {key: value for key, value in ({"run": str(old)} | entry).items() if value is not None}
    line = mistake(tmp_path, whole, **changes)
    assert re.search(message, line) and "tiny.yaml:" in line, line


FOUR = """
import numpy as np
from torch.utils.data import Dataset

class Four(Dataset):
    def __init__(self, split):
        pass
    def __len__(self):
        return 16
    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (32, 32, 4), dtype=np.uint8)
        return {"image": image, "segmentation": np.zeros((32, 32), np.uint8), "object": index % 10}
"""


def test_two_entries_may_not_give_one_tensor(old: Path, tmp_path: Path) -> None:
    line = mistake(tmp_path, {"run": str(old), "names": "trunk"}, {"run": str(old), "names": ["trunk.bn1", "heads"]})
    assert "init_from.1.names: an entry before this one gives trunk.bn1 already" in line


def test_a_type_that_loses_digits_is_refused(old: Path, tmp_path: Path) -> None:
    best = read_model(old / "checkpoints/best")
    save_file({"trunk.bn1.bias": best["trunk.bn1.bias"].double()}, tmp_path / "w.safetensors")
    line = mistake(tmp_path, {"weights": str(tmp_path / "w.safetensors"), "names": ["trunk.bn1.bias"]})
    assert "1 of another type: trunk.bn1.bias is float64 there, float32 here" in line


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"names": ["trunk"]}, "expected either run, a run's directory, or weights"),
        ({"names": ["trunk"], "run": "a", "weights": "b"}, "expected either run, a run's directory, or weights"),
        ({"names": ["trunk"], "weights": "b", "which": "best"}, "expected which only with run"),
        ({"names": [], "run": "a"}, "init_from.0.names: "),
        ({"run": "a"}, "init_from.0.names: this key is required"),
        ({"run": "a", "names": "trunk", "which": "first"}, "0.which: expected one of best, last, got 'first'"),
        ({"run": "a", "names": "trunk", "which": 0}, "init_from.0.which: expected a number greater than or equal to 1"),
    ],
)
def test_an_entry_that_is_not_one_is_refused(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(tiny_config(tmp_path, init_from=[entry]))
    assert message in error.value.mistakes[0]


def test_a_damaged_run_and_one_of_another_version_are_refused(old: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(old, run, symlinks=True)
    state_file = run / "checkpoints/step-00000015/state.json"
    text = state_file.read_text()
    model = run / "checkpoints/step-00000015/model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    assert "step-00000015/model.safetensors is damaged" in mistake(tmp_path, {"run": str(run), "names": "trunk"})
    state_file.write_text(text.replace('"step": 15', '"step": 16', 1))
    assert "is damaged, or of another version" in mistake(tmp_path, {"run": str(run), "names": "trunk"})
    (run / "checkpoints/best").unlink()
    shutil.rmtree(run / "checkpoints/step-00000015")
    line = mistake(tmp_path, {"run": str(run), "names": "trunk", "which": "best"})
    assert "has no checkpoint best: no validation gave a score; there are: last, 20" in line


def test_classes_of_other_names_are_named(tmp_path: Path) -> None:
    """Two data sets that name the classes of one label: in another order, and another number of them."""
    (tmp_path / "a.csv").write_text("file,part,kind\n" + "".join(f"{n}.png,train,{'xyz'[n % 3]}\n" for n in range(9)))
    pictures(tmp_path)
    tasks = {"kind": {"type": "classification"}}
    data = {"name": "table", "train": str(tmp_path / "a.csv"), "val": str(tmp_path / "a.csv"), "image": "file"}
    data |= {"image_size": 32, "batch_size": 3}
    phases = [{"name": "a", "epochs": 1}]
    changes: dict[str, Any] = {"tasks": tasks, "balance": "mean", "phases": phases}
    train(tiny_parts(tmp_path, name="xyz", data=data, **changes), quiet=True)
    (tmp_path / "runs").rename(tmp_path / "kept")
    entry = {"run": str(tmp_path / "kept/xyz"), "names": ["heads.kind"]}
    (tmp_path / "b.csv").write_text((tmp_path / "a.csv").read_text().replace(",z", ",w"))
    other = {**data, "train": str(tmp_path / "b.csv"), "val": str(tmp_path / "b.csv")}
    found = initial(tmp_path, entry, data=other, **changes)
    assert found.notes == ("heads.kind has 3 classes there, 3 here: class 0 is x there, w here",)
    assert initial(tmp_path, entry, data=data, **changes).notes == ()
    (tmp_path / "b.csv").write_text((tmp_path / "a.csv").read_text().replace("8.png,train,z", "8.png,train,q"))
    line = mistake(tmp_path, entry, data=other, **changes)
    assert line.endswith("heads.kind has 3 classes there, 4 here: class 0 is x there, q here")


def pictures(folder: Path) -> None:
    for number in range(9):
        Image.new("RGB", (32, 32), (20 * number, 50, 90)).save(folder / f"{number}.png")
