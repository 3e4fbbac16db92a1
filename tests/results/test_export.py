"""`mtl export`: files that compute what the model does, with a card; and nothing where they do not."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mtl
from mtl.cli import main
from mtl.config import TrunkConfig
from mtl.model import build_trunk
from mtl.results.export.meaning import meaning_of
from mtl.results.export.names import output_names
from mtl.results.export.parity import difference
from mtl.results.trained import TrainedModel, load
from mtl.tasks import (
    Classification,
    Depth,
    Edges,
    Keypoints,
    MultiLabel,
    Normals,
    Ordinal,
    Regression,
    Saliency,
    Segmentation,
    Task,
)
from mtl.tasks.ordinal import Coral, Corn
from mtl.training.run import train
from once import made_once
from runs import TINY, tiny_parts
from trained_runs import EVERY_TYPE, every_type_config

onnxruntime = pytest.importorskip("onnxruntime")

Capture = pytest.CaptureFixture[str]
# An output that cannot be called as its task is, and one that is called like the input.
TASKS: dict[str, Any] = {
    "segmentation": {"type": "segmentation", "num_classes": 13},
    "images": {"type": "depth", "label": "depth"},
    "größe": {"type": "classification", "num_classes": 10, "label": "object"},
}
NAMES = {"segmentation": "segmentation", "images": "task_images", "größe": "groe"}
DATA = TINY["data"] | {"image_size": 64, "num_train": 16, "num_val": 8}


@pytest.fixture(autouse=True)
def _untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest records torch's log of every symbolic shape, which takes most of the time."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> Path:
        phases = [{"name": "all", "freeze": ["trunk.conv1"], "steps": 2, "lr": 1e-3}]
        return train(tiny_parts(folder, tasks=TASKS, data=DATA, phases=phases), quiet=True).run_dir

    return made_once(tmp_path_factory, "export-run", make)


@pytest.fixture(scope="module")
def model(run_dir: Path) -> TrainedModel:
    return load(run_dir)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def export(run_dir: Path, form: str, out: Path, *options: str) -> dict[str, Any]:
    """Exports, looks whether the run is as it was, and returns the record."""
    before = content_of(run_dir)
    assert main(["export", str(run_dir), "--format", form, "--out", str(out), *options]) == 0
    assert content_of(run_dir) == before
    assert [each.name for each in out.parent.iterdir() if each.name.startswith(".")] == []
    record: dict[str, Any] = json.loads((out / "export.json").read_text())
    assert sorted(record["files"]) == sorted(each.name for each in out.iterdir())
    return record


def run_card(out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the code of a card defines, run in its folder."""
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)
    return names


def some_images(num: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randint(256, (num, 3, height, width), dtype=torch.uint8, generator=generator)


def assert_same(got: dict[str, Any], model: TrainedModel, images: torch.Tensor) -> None:
    """Outputs by name are those of the model, for the tasks that are there."""
    expected = model(images)
    assert got
    for name, output in got.items():
        (task,) = (task for task, own in NAMES.items() if name in (task, own))
        difference = (torch.as_tensor(output) - expected[task]).abs().max()
        assert difference <= 1e-4 * max(1, expected[task].abs().max()), name


# Files


def test_timm_loads_the_trunk_and_it_gives_the_same_bits(
    run_dir: Path, model: TrainedModel, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = export(run_dir, "timm", tmp_path / "out")
    printed = capsys.readouterr().out
    assert f"load: {record['call']}\n" in printed and "parity: 0 at most, limit 0: 8 images of 64 x 64" in printed
    trunk = run_card(tmp_path / "out", monkeypatch)["trunk"]
    assert not trunk.training
    prepared = model.network.prepare(some_images(3, 64, 96).permute(0, 2, 3, 1))
    pairs = zip(trunk.forward_intermediates(prepared), model.network.trunk.forward_intermediates(prepared), strict=True)
    (last, own_last), (maps, own_maps) = pairs
    assert torch.equal(last, own_last) and len(maps) > 2
    assert all(torch.equal(*pair) for pair in zip(maps, own_maps, strict=True))
    assert torch.equal(trunk(prepared), model.network.trunk(prepared))


def test_safetensors_has_all_weights_under_our_names_and_says_what_they_are(
    run_dir: Path, model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(run_dir, "safetensors", tmp_path / "out", "--tasks", "images,größe")
    file = tmp_path / "out/model.safetensors"
    weights, own = load_file(file), model.network.state_dict()
    assert weights.keys() == {name for name in own if not name.startswith("heads.segmentation.")}
    assert all(torch.equal(tensor, own[name]) for name, tensor in weights.items())
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    assert about["fingerprint"] == model.origin.fingerprint and about["mtl_version"] == mtl.__version__
    assert json.loads(about["tasks"]) == ["images", "größe"]
    assert json.loads(about["class_names"]) == {"images": [], "größe": model.class_names["größe"]}
    assert run_card(tmp_path / "out", monkeypatch)["weights"].keys() == weights.keys()
    # The same file begins the next run.
    trunk = build_trunk(TrunkConfig(name="test_resnet", weights=str(file)), (64, 64))
    assert all(torch.equal(tensor, own[f"trunk.{name}"]) for name, tensor in trunk.state_dict().items())


@pytest.mark.slow
def test_torch_takes_any_batch_and_size_and_floats(
    run_dir: Path, model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = export(run_dir, "torch", tmp_path / "out", "--input", "float")
    assert record["size_step"] == 1 and record["input"] == "float"
    checked = {(check["images"], *check["size"]) for check in record["parity"]["checks"]}
    assert checked == {(8, 64, 64), (1, 64, 64), (8, 97, 127)}
    assert all(value <= 1e-4 for check in record["parity"]["checks"] for value in check["differences"].values())
    program = run_card(tmp_path / "out", monkeypatch)["model"]
    for images in (some_images(5, 64, 64), some_images(1, 101, 75)):
        assert_same(program(images / 255), model, images)
    about = {"mtl.json": ""}
    torch.export.load(tmp_path / "out/model.pt2", extra_files=about)
    assert json.loads(about["mtl.json"])["fingerprint"] == model.origin.fingerprint


@pytest.mark.slow
def test_onnx_takes_any_batch_and_size_under_names_that_are_valid(
    run_dir: Path, model: TrainedModel, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = export(run_dir, "onnx", tmp_path / "out", "--which", "last")
    assert record["outputs"] == NAMES and record["opset"] == 18
    printed = capsys.readouterr().out
    assert "opset 18" in printed and "outputs: segmentation, task_images (images), groe (größe)" in printed
    names = run_card(tmp_path / "out", monkeypatch)
    assert [*names["outputs"]] == [*NAMES.values()]
    session = names["model"]
    shapes = {each.name: each.shape for each in [*session.get_inputs(), *session.get_outputs()]}
    assert shapes == {
        "images": ["batch", 3, "height", "width"],
        "segmentation": ["batch", 13, "height", "width"],
        "task_images": ["batch", 1, "height", "width"],
        "groe": ["batch", 10],
    }
    for images in (some_images(5, 64, 64), some_images(1, 101, 75)):
        found = session.run(None, {"images": images.numpy()})
        assert_same(dict(zip(NAMES.values(), found, strict=True)), model, images)
    about = session.get_modelmeta().custom_metadata_map
    assert about["fingerprint"] == model.origin.fingerprint
    assert json.loads(about["class_names"])["größe"] == model.class_names["größe"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_the_parts_give_what_the_whole_gives(
    run_dir: Path, model: TrainedModel, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = export(run_dir, form, tmp_path / "out", "--split", "--tasks", "segmentation,größe")
    suffix, names_of = {"torch": ("pt2", {task: task for task in NAMES}), "onnx": ("onnx", NAMES)}[form]
    heads = {task: f"head_{names_of[task]}.{suffix}" for task in ("segmentation", "größe")}
    assert sorted(record["files"]) == sorted([*heads.values(), f"trunk.{suffix}", "README.md", "export.json"])
    assert record["head_inputs"]["größe"] == ["pooled"] and record["size_step"] == 32
    names = run_card(tmp_path / "out", monkeypatch)
    images = some_images(3, 96, 64)
    assert names["output"].shape == (1, 13, 64, 64)
    trunk, found = names["trunk"], {}
    if form == "torch":
        features = trunk(images)
        for task, read in record["head_inputs"].items():
            found[task] = torch.export.load(heads[task]).module()({name: features[name] for name in read})
    else:
        outputs = trunk.run(None, {"images": images.numpy()})
        features = dict(zip([each.name for each in trunk.get_outputs()], outputs, strict=True))
        for task, read in record["head_inputs"].items():
            session = onnxruntime.InferenceSession(heads[task])
            (found[task],) = session.run(None, {name: features[name] for name in read})
    assert found.keys() == {"segmentation", "größe"}
    assert_same(found, model, images)


def test_the_card_says_what_the_run_s_files_say(run_dir: Path, model: TrainedModel, tmp_path: Path) -> None:
    export(run_dir, "safetensors", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (metrics,) = [row for row in rows if "val/score" in row]
    for key, value in metrics.items():
        if key.count("/") == 2 and key.startswith("val/"):
            _, task, name = key.split("/")
            assert f"| {task} | {name} | {value:.4f} |" in card
    assert "| all | `trunk.conv1` | 2 | 13 | clean; frozen tensors bit-identical |" in card
    assert '| images | `heads.images.*` | "b 1 h w" | log metres along the optical axis | exp gives metres |' in card
    assert f"- größe: {', '.join(f'{n} {name}' for n, name in enumerate(model.class_names['größe']))}" in card
    assert "timm's `test_resnet`. Training began with weights drawn at random." in card
    assert model.origin.fingerprint in card and "`scenes`: 16 images in `train`, 8 images in `val`." in card
    mean, std = (model.network.trunk.pretrained_cfg[name] for name in ("mean", "std"))
    assert f"mean ({', '.join(f'{v:g}' for v in mean)}) and std ({', '.join(f'{v:g}' for v in std)})" in card


def test_without_the_data_random_images_are_compared_and_the_card_says_so(run_dir: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run_dir, tmp_path / "moved", symlinks=True)
    config = moved / "config.yaml"
    config.write_text(config.read_text().replace("name: scenes\n", "name: scenes\n  cache_dir: /dev/null/there\n"))
    record = export(moved, "safetensors", tmp_path / "out")
    assert record["parity"]["images"].startswith("random images of seed 0 (the validation data cannot be opened: ")
    assert record["parity"]["images"] in (tmp_path / "out/README.md").read_text()


# Names and numbers


def test_outputs_have_valid_names_each_once() -> None:
    tasks = ["a", "ä", "a_2", "pooled", "pyramid_3", "深度", "_x", "images", "ñ", "class"]
    assert output_names(tasks) == {
        "a": "a",
        "ä": "a_3",
        "a_2": "a_2",
        "pooled": "task_pooled",
        "pyramid_3": "task_pyramid_3",
        "深度": "task_",
        "_x": "_x",
        "images": "task_images",
        "ñ": "n",
        "class": "class",
    }


@pytest.mark.parametrize(
    ("got", "expected", "stated"),
    [
        ([0.5, 0.25], [0.5, 0.0], 0.25),  # of small outputs the absolute difference
        ([101.0, 50.0], [100.0, 50.0], 0.01),  # of large ones relative to the largest
        ([np.nan, np.inf], [np.nan, np.inf], 0.0),
        ([np.nan, 1.0], [1.0, 1.0], np.inf),
        ([1.0, 1.0], [np.inf, 1.0], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
    ],
)
def test_a_difference_is_absolute_for_small_outputs_and_relative_for_large_ones(
    got: list[float], expected: list[float], stated: float
) -> None:
    assert difference(torch.tensor(got), torch.tensor(expected)) == pytest.approx(stated)


def words_of(task: Task) -> str:
    return ". ".join(meaning_of(task))


def test_every_task_type_says_what_its_outputs_are_and_how_they_become_predictions() -> None:
    bins = Depth("bins", low=0.5, high=8.0, num_bins=16)
    (formula,) = re.findall(r"centre k = (.*) m$", words_of(bins))
    centres = torch.tensor([eval(formula, {"k": number}) for number in range(16)])
    logits = torch.randn(2, 16, 3, 4)
    assert torch.allclose(bins.metres(logits), (logits.softmax(1) * centres.view(-1, 1, 1)).sum(1, keepdim=True))
    assert words_of(Depth("log", low=1.0, high=9.0)).endswith("exp gives metres, at least 1, at most 9")
    assert words_of(Depth("linear", high=9.0)).endswith("they are metres, at most 9")
    assert words_of(Regression(scale=10.0)).endswith("times 10") and "times" not in words_of(Regression())
    logits, expected = torch.randn(5, 3), {}
    for loss in (Corn(), Coral()):
        task = Ordinal(4, loss)
        above = logits.sigmoid().cumprod(1) if "cumulative product" in words_of(task) else logits.sigmoid()
        expected[type(loss)] = (above > 0.5).sum(1)
        assert torch.equal(task.as_label(task.predict(logits, (1, 1))), expected[type(loss)])
    plain = [Segmentation(3), Classification(3), Normals(), MultiLabel(3), Edges(), Saliency(), Keypoints(2, (64, 64))]
    assert len({words_of(task) for task in plain}) == len(plain) - 1
    assert not any(type(task).__name__ in words_of(task) for task in plain)


# A head of the user's own that does not export, or exports as something else

OWN_HEADS = """
import torch
from torch import nn
from mtl.model import Head

class Base(Head):
    output = "vector"
    reads = frozenset({"pooled"})
    def __init__(self, shape, num_outputs):
        super().__init__()
        self.out = nn.Linear(shape.pooled, num_outputs)

class Asks(Base):
    def forward(self, features, size):
        output = self.out(features.pooled)
        return output if output.detach().sum().item() > 0 else -output

class Counts(Base):
    def forward(self, features, size):
        return self.out(features.pooled) + torch.zeros(len(features.pooled), 1)

class Drifts(Base):
    def forward(self, features, size):
        return self.out(features.pooled) + (0.02 if torch.compiler.is_compiling() else 0)
"""


@pytest.fixture
def own_head(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "own_heads.py").write_text(OWN_HEADS)
    tasks = {
        name: {"type": "classification", "num_classes": 10, "label": "object", "head": f"own_heads:{kind}"}
        for name, kind in (("asks", "Asks"), ("counts", "Counts"), ("drifts", "Drifts"))
    }
    yield train(tiny_parts(tmp_path, tasks=tasks, phases=[{"name": "a", "steps": 1}]), quiet=True).run_dir
    sys.modules.pop("own_heads", None)


@pytest.mark.slow
def test_a_head_that_torch_cannot_trace_is_named_with_torch_s_reason(
    own_head: Path, tmp_path: Path, capsys: Capture
) -> None:
    for form in ("torch", "onnx"):
        assert main(["export", str(own_head), "--format", form, "--out", str(tmp_path / "out")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: the head of asks, Asks, cannot be exported: torch.export: ")
        assert "data-dependent" in line
    arguments = ["export", str(own_head), "--format", "torch", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--tasks", "counts"]) == 1
    assert re.search("the head of counts, Counts, .*specialized it to be a constant", capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and [*tmp_path.glob(".out*")] == []


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_left_behind(
    own_head: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["export", str(own_head), "--format", "torch", "--tasks", "drifts", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"drifts differs by 0\.0\d+ on 8 images of 32 x 32; expected 0\.0001 at most", line), line
    assert not (tmp_path / "out").exists() and [*tmp_path.glob(".out*")] == []
    # The weights themselves are not in question.
    export(own_head, "safetensors", tmp_path / "out")


# Bad input


def refused(capsys: Capture, *arguments: str | Path) -> str:
    """The one line of a call that ends with exit code 2."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--format", "torch", "--tasks", "segmentatoin"], r"no task 'segmentatoin'; .*nearest: segmentation"),
        (["--format", "timm", "--tasks", "images"], "--tasks: timm has the trunk alone"),
        (["--format", "timm", "--split"], "--split: timm has weights alone"),
        (["--format", "safetensors", "--input", "float"], "--input: safetensors has weights alone"),
        (["--format", "timm", "--size", "64", "64"], "--size: timm has weights alone"),
        (["--format", "onnx", "--size", "64", "0"], "--size: expected a height and a width above 0, got 64 0"),
        (["--format", "torch", "--size", "64", "1"], "test_resnet.* takes no images of 64 x 1|data.image_size"),
        (["--format", "timm", "--which", "lost"], "has no checkpoint lost; there are: best, last"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    run_dir: Path, tmp_path: Path, options: list[str], reason: str, capsys: Capture
) -> None:
    line = refused(capsys, "export", run_dir, "--out", tmp_path / "out", *options)
    assert re.search(reason, line), line
    assert [*tmp_path.iterdir()] == []


def test_only_files_of_an_earlier_export_are_replaced(run_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    out, force = tmp_path / "out", ["--format", "timm", "--force"]
    assert refused(capsys, "export", run_dir, "--out", run_dir / "x", *force).startswith("error: --out: ")
    (tmp_path / "file").write_text("")
    assert "no folder" in refused(capsys, "export", run_dir, "--out", tmp_path / "file", *force)
    out.mkdir()
    (out / "README.md").write_text("mine")
    assert "README.md is of no export" in refused(capsys, "export", run_dir, "--out", out, *force)
    assert content_of(out) == {"README.md": b"mine"}
    (out / "README.md").unlink()
    export(run_dir, "safetensors", out)
    (out / "notes.txt").write_text("mine")
    before = content_of(out)
    assert "is not empty" in refused(capsys, "export", run_dir, "--format", "timm", "--out", out)
    (out / "trunk.safetensors").write_text("mine")
    assert "trunk.safetensors is of no export" in refused(capsys, "export", run_dir, "--out", out, *force)
    (out / "trunk.safetensors").unlink()
    assert content_of(out) == before
    assert main(["export", str(run_dir), "--out", str(out), *force]) == 0
    assert sorted(content_of(out)) == ["README.md", "export.json", "notes.txt", "trunk.safetensors"]


def test_weights_that_cannot_be_read_back_are_named(
    run_dir: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, file, metadata)
        file.write_bytes(file.read_bytes()[:-4])

    monkeypatch.setattr("mtl.results.export.weights.save_file", cut)
    assert main(["export", str(run_dir), "--out", str(tmp_path / "out"), "--format", "safetensors"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model.safetensors, which was just written, cannot be read: ")
    assert [*tmp_path.iterdir()] == []


def test_a_record_of_an_earlier_export_that_was_cut_is_named(run_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    export(run_dir, "safetensors", out)
    record = out / "export.json"
    record.write_text(record.read_text()[:-3])
    before = content_of(out)
    line = refused(capsys, "export", run_dir, "--out", out, "--format", "timm", "--force")
    assert line.startswith(f"error: --out: {record}: cannot be read: ") and "cut short" in line
    assert content_of(out) == before


def test_a_run_that_is_damaged_or_not_finished_is_refused(run_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "copy", symlinks=True)
    weights = copy / "checkpoints/last/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
    arguments = ["export", copy, "--format", "timm", "--out", tmp_path / "out"]
    assert "is damaged" in refused(capsys, *arguments, "--which", "last")
    (copy / "audit.json").unlink()
    assert "is not finished" in refused(capsys, *arguments)
    assert "is no run" in refused(capsys, "export", tmp_path / "copi", *arguments[2:])
    assert not (tmp_path / "out").exists()


def test_without_the_extra_a_line_says_how_to_install_it(
    run_dir: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "onnxscript", raising=False)
    paths = sys.path_importer_cache

    class Hidden:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name == "onnxscript":
                monkeypatch.setattr(sys, "path", [])
                monkeypatch.setattr(sys, "meta_path", [])

    assert paths is not None
    monkeypatch.setattr(sys, "meta_path", [Hidden, *sys.meta_path])
    line = refused(capsys, "export", run_dir, "--format", "onnx", "--out", tmp_path / "out")
    assert line.endswith("needs onnxscript; install the extra `onnx`: pip install 'mtl-freeze[onnx]'")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trunk", "options", "step", "call"),
    [
        ("resnet18", {}, 1, "'resnet18', num_classes=0, "),
        ("tf_efficientnet_lite0", {"drop_path_rate": 0.1}, 32, "num_classes=0, drop_path_rate=0.1, "),
        ("convnext_atto", {}, 1, "'convnext_atto', num_classes=0, "),
        ("vit_tiny_patch16_224", {}, None, "num_classes=0, img_size=(64, 64), "),
        ("test_vit", {"dynamic_img_size": True}, 16, "img_size=(64, 64), dynamic_img_size=True"),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 2},
            None,
            "img_size=(64, 64), embed_dim=24",
        ),
    ],
)
def test_trunks_export_in_every_format(
    trunk: str, options: dict[str, Any], step: int | None, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {"depth": {"type": "depth"}, "object": {"type": "classification", "num_classes": 10}}
    setup = tiny_parts(
        tmp_path, trunk={"name": trunk, "options": options}, tasks=tasks, data=DATA, phases=[{"name": "a", "steps": 1}]
    )
    run_dir = train(setup, quiet=True).run_dir
    model, out = load(run_dir), tmp_path / "out"
    assert call in export(run_dir, "timm", out)["call"]
    images = some_images(2, 64, 64)
    with monkeypatch.context() as there:
        loaded = run_card(out, there)["trunk"]
        prepared = model.network.prepare(images.permute(0, 2, 3, 1))
        assert torch.equal(loaded(prepared), model.network.trunk(prepared))
        assert isinstance(loaded, type(timm.create_model(trunk, **options)))
    assert export(run_dir, "torch", out, "--force")["size_step"] == step
    program = torch.export.load(out / "model.pt2").module()
    if trunk in ("resnet18", "test_vit"):
        assert export(run_dir, "onnx", out, "--force", "--split")["size_step"] == (32 if step == 1 else step)
    record = export(run_dir, "onnx", out, "--force")
    assert record["size_step"] == step
    session = onnxruntime.InferenceSession(out / "model.onnx")
    sizes = [(64, 64), *([(128, 96)] if step else []), *([(75, 101)] if step == 1 else [])]
    for height, width in sizes:
        images = some_images(3, height, width)
        expected = model(images)
        found = dict(zip(record["outputs"], session.run(None, {"images": images.numpy()}), strict=True))
        for outputs in (program(images), found):
            for task, output in expected.items():
                assert difference(torch.as_tensor(outputs[task]), output) <= 1e-4
    if step is None or step > 1:
        other = some_images(2, 64 + 8, 64)
        with pytest.raises(Exception, match=r"(?i)shape|guard|size|dimension"):
            program(other)
        with pytest.raises(Exception, match=r"(?i)shape|dimension"):
            session.run(None, {"images": other.numpy()})


@pytest.mark.slow
def test_a_run_with_every_task_type_exports(tmp_path: Path) -> None:
    run_dir = mtl.train(every_type_config(tmp_path), quiet=True).run_dir
    record = export(run_dir, "onnx", tmp_path / "out", "--size", "64", "96")
    assert [*record["outputs"]] == [*EVERY_TYPE] and record["image_size"] == [64, 96]
    card = (tmp_path / "out/README.md").read_text()
    assert "The run's images were of 32 x 48 pixels" in card and "- tags: 0 big, 1 red" in card
    images = some_images(3, 64, 96)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    found = dict(zip(record["outputs"], session.run(None, {"images": images.numpy()}), strict=True))
    for task, output in load(run_dir)(images).items():
        assert difference(torch.as_tensor(found[task]), output) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trunk", "heads"),
    [
        ("test_resnet", ["dpt", "bins", "mlp"]),
        ("test_resnet", ["upernet", {"name": "linear_bn", "options": {"levels": "all"}}, "attention_pool"]),
        ("test_resnet", ["segformer", "deeplabv3plus", "linear"]),
        ("test_vit", ["dpt", "linear_bn", "attention_pool"]),
        ("test_vit", ["segformer", "fpn", "mlp"]),
    ],
)
def test_heads_export_as_programs_and_in_parts(trunk: str, heads: list[Any], tmp_path: Path) -> None:
    tasks = {
        "segmentation": {"type": "segmentation", "num_classes": 13, "head": heads[0]},
        "depth": {"type": "depth", "head": heads[1]},
        "object": {"type": "classification", "num_classes": 10, "head": heads[2]},
    }
    setup = tiny_parts(tmp_path, trunk={"name": trunk}, tasks=tasks, data=DATA, phases=[{"name": "a", "steps": 1}])
    run_dir = train(setup, quiet=True).run_dir
    model, images = load(run_dir), some_images(3, 64, 64)
    # One form of each: both are traced alike, whole and in parts.
    for form, options in (("torch", ["--split"]), ("onnx", [])):
        record = export(run_dir, form, tmp_path / "out", "--force", *options)
        assert max(value for check in record["parity"]["checks"] for value in check["differences"].values()) < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    found = dict(zip(record["outputs"], session.run(None, {"images": images.numpy()}), strict=True))
    for task, output in model(images).items():
        assert difference(torch.as_tensor(found[task]), output) <= 1e-4
