"""`mtl.load`: a trained model by itself."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

import mtl
from mtl.checkpoint.files import CheckpointError
from mtl.checkpoint.run_files import RunFileError
from mtl.config import SettingError
from mtl.data import DataError
from mtl.results.evaluate import evaluate
from mtl.results.report.run import read_run
from mtl.results.trained import TrainedModel, load
from once import made_once
from pages import code_block
from runs import read_metrics, read_model, tiny_config
from trained_runs import CLASSES, NUM, SIZE, TAGS, every_type_config, tiny_run


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "rooms-run", tiny_run)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> Path:
        return mtl.train(every_type_config(folder), quiet=True).run_dir

    return made_once(tmp_path_factory, "every-run", make)


def some_images(num: int = 2, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randint(0, 256, (num, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_loaded_model_has_the_best_weights_and_is_in_eval_mode(rooms: Path) -> None:
    model = mtl.load(rooms)
    saved = read_model(rooms / "checkpoints/best")
    own = {name: tensor for name, tensor in saved.items() if name.startswith(("trunk.", "heads."))}
    assert equal(model.network.state_dict(), own)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    state = json.loads((rooms / "checkpoints/best/state.json").read_text())
    assert (model.origin.step, model.origin.checkpoint, model.origin.phase) == (state["step"], "best", "finetune")
    assert model.class_names["object"][9] == "ankle boot" and model.class_names["depth"] == []


@pytest.mark.parametrize("which", ["last", "7", 12])
def test_other_checkpoints_are_loaded_by_name_or_step(rooms: Path, which: str | int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(rooms, run, symlinks=True)
    (last,) = {(run / "checkpoints/last").resolve()}
    steps = sorted(int(each.name[5:]) for each in (run / "checkpoints").glob("step-*"))
    if which == "7":
        which = str(steps[0])
    expected = last if which == "last" else run / f"checkpoints/step-{int(which):08d}"
    saved = read_model(expected)
    model = load(run, which)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.network.state_dict().items())


def test_loading_draws_no_random_numbers(rooms: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    mtl.load(rooms)
    assert torch.equal(torch.get_rng_state(), before)


def test_images_are_taken_as_whole_numbers_or_floats(rooms: Path) -> None:
    model, images = mtl.load(rooms), some_images()
    outputs = model(images)
    assert {name: tuple(output.shape[1:]) for name, output in outputs.items()} == {
        "segmentation": (13, 32, 32),
        "depth": (1, 32, 32),
        "normals": (3, 32, 32),
        "object": (10,),
    }
    for name, output in model(images / 255).items():
        torch.testing.assert_close(output, outputs[name], rtol=1e-4, atol=1e-4)
    assert equal(model(images, ["depth"]), {"depth": outputs["depth"]})
    assert equal(outputs, model.network(images.permute(0, 2, 3, 1)))


def saved_by_torch(model: TrainedModel) -> TrainedModel:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded: TrainedModel = torch.load(stream, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_by_torch],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_predict_the_same_bits(every: Path, copied: Any) -> None:
    model, images = mtl.load(every), some_images(2, (32, 48))
    other = copied(model)
    assert equal(model(images), other(images))
    assert other.origin == model.origin and other.predict(images[0])["kind"] == model.predict(images[0])["kind"]


def test_the_model_can_be_exported_by_torch(rooms: Path) -> None:
    model, images = mtl.load(rooms), some_images()
    exported = torch.export.export(model, (images,)).module()
    for name, output in exported(images).items():
        torch.testing.assert_close(output, model(images)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", ["rooms", "every"])
def test_an_evaluation_has_the_bits_of_the_validation_in_training(run: str, request: pytest.FixtureRequest) -> None:
    run_dir: Path = request.getfixturevalue(run)
    model = mtl.load(run_dir)
    found = evaluate(model)
    (row,) = (r for r in read_metrics(run_dir) if "val/score" in r and r["step"] == model.origin.step)
    logged = {name: value for name, value in row.items() if name.startswith("val/") and name != "val/best_score"}
    flat = {f"val/{task}/{name}": value for task, own in found.metrics.items() for name, value in own.items()}
    same = flat | {"val/score": found.score}
    assert same.keys() == logged.keys()
    assert {name: value for name, value in same.items() if value == value} == {
        name: value for name, value in logged.items() if value is not None
    }


def test_a_test_split_is_measured(every: Path) -> None:
    found = evaluate(mtl.load(every), "test")
    assert found.num_images == NUM // 3 and found.metrics["kind"].keys() == {"accuracy"}


# --- predictions


def test_predictions_are_in_units_and_at_the_images_own_size(every: Path, tmp_path: Path) -> None:
    model = mtl.load(every)
    pixels = np.random.default_rng(1).integers(0, 256, (37, 61, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = model.predict(tmp_path / "a.png")
    assert found.keys() == model.tasks.keys()
    assert found["kind"]["class"] in CLASSES
    assert sum(found["kind"]["probabilities"].values()) == pytest.approx(1)
    assert found["tags"].keys() == set(TAGS) and isinstance(found["age"], float) and len(found["pose"]) == 2
    assert found["parts"].shape == (37, 61) and found["parts"].dtype == torch.int64
    assert found["depth"].shape == found["bins"].shape == (1, 37, 61) and found["depth"].min() > 0
    assert found["bins"].min() >= 0.5 and found["bins"].max() <= 9
    assert found["edges"].shape == (37, 61) and 0 <= found["edges"].min() <= found["edges"].max() <= 1
    lengths = found["normals"].norm(dim=0)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    assert found["joints"].shape == (2, 3) and (found["joints"][:, 0] <= 61).all()
    json.dumps({name: value for name, value in found.items() if not isinstance(value, Tensor)})


def test_the_code_of_the_documentation_runs(rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/scenes").symlink_to(rooms)
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    shown: dict[str, Any] = {"images": some_images()}
    exec(code_block("docs/trained_models.md", "python"), shown)
    assert shown["outputs"].keys() == shown["model"].tasks.keys() and len(shown["found"]) == 2


def test_what_is_predicted_at_the_networks_size_is_what_metrics_count(every: Path) -> None:
    model, image = mtl.load(every), some_images(1, (32, 48))
    outputs, (found,) = model(image), model.predict([image[0]])
    assert torch.equal(found["parts"], outputs["parts"].argmax(dim=1)[0])
    assert torch.equal(found["depth"], outputs["depth"][0].exp())
    assert found["age"] == 10 * float(outputs["age"].double())
    expected = functional.softmax(outputs["kind"].double(), dim=1)[0]
    assert list(found["kind"]["probabilities"].values()) == expected.tolist()


def test_a_file_an_open_picture_and_a_tensor_give_the_same(every: Path, tmp_path: Path) -> None:
    model = mtl.load(every)
    pixels = np.random.default_rng(2).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    with Image.open(tmp_path / "a.png") as opened:
        first, *others = model.predict([tmp_path / "a.png", str(tmp_path / "a.png"), opened, tensor], batch_size=3)
    for other in others:
        for name, value in first.items():
            same = torch.allclose(value, other[name]) if isinstance(value, Tensor) else True
            assert same, name
        assert other["kind"]["class"] == first["kind"]["class"]


def test_predictions_are_tensors_that_training_can_use(every: Path) -> None:
    found = mtl.load(every).predict(some_images(1, (32, 48))[0])
    for value in found.values():
        if isinstance(value, Tensor):
            assert not value.is_inference() and value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.gpu
def test_a_model_on_a_gpu_predicts_what_one_on_the_cpu_does(every: Path) -> None:
    images = list(some_images(3, (32, 48)))
    here, there = mtl.load(every).predict(images), mtl.load(every, device="cuda").predict(images)
    for own, other in zip(here, there, strict=True):
        torch.testing.assert_close(own["depth"], other["depth"], rtol=1e-3, atol=1e-3)
        assert own["age"] == pytest.approx(other["age"], rel=1e-3)


def test_grey_transparent_and_deep_images_are_taken(every: Path) -> None:
    model, grey = mtl.load(every), some_images(1)[0, :1]
    with_alpha = torch.cat([grey.expand(3, -1, -1), grey])
    deep = Image.fromarray(grey[0].numpy().astype(np.uint16) * 257)
    first, *others = model.predict([grey, grey.expand(3, -1, -1), with_alpha, deep], ["age"])
    assert all(other["age"] == pytest.approx(first["age"], abs=0.05) for other in others)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("nothing.png", "nothing.png: No such file"),
        ("text.png", "text.png: "),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), "a tensor: expected an image of 3 channels, got 2"),
        (torch.full((3, 8, 8), 255.0), "a tensor: expected floats from 0 to 1, got 255 to 255"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), "a tensor: expected an image, got one without pixels"),
        (torch.zeros(8, 8, dtype=torch.uint8), "a tensor: expected an image"),
    ],
)
def test_what_is_no_image_is_named(every: Path, tmp_path: Path, picture: Any, message: str) -> None:
    (tmp_path / "text.png").write_text("no picture")
    own = tmp_path / picture if isinstance(picture, str) else picture
    with pytest.raises(DataError, match=message):
        mtl.load(every).predict([own])


def test_a_task_that_there_is_not_is_named(rooms: Path) -> None:
    with pytest.raises(SettingError, match=r"no task 'deph'; there are: segmentation, depth, .*nearest: depth"):
        mtl.load(rooms).predict(some_images()[0], ["deph"])


# --- what is no run


def broken(rooms: Path, folder: Path, name: str, content: str | None) -> Path:
    shutil.copytree(rooms, folder, symlinks=True)
    file = folder / name
    file.unlink()
    if content is not None:
        file.write_text(content)
    return folder


def test_what_cannot_be_loaded_is_named(rooms: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match=r"tinny is no run: it has no config.yaml; nearest: tiny"):
        mtl.load(rooms.parent / "tinny")
    with pytest.raises(CheckpointError, match=r"has no checkpoint bes; there are: best, last, 12, 10; nearest: best"):
        mtl.load(rooms, "bes")
    with pytest.raises(RunFileError, match=r"data\.json: tasks: this key is missing"):
        mtl.load(broken(rooms, tmp_path / "a", "data.json", '{"digests": {}, "channels": 3}'))
    state = rooms / "checkpoints/best/state.json"
    folder = Path("checkpoints") / (rooms / "checkpoints/best").readlink()
    with pytest.raises(CheckpointError, match="damaged"):
        mtl.load(broken(rooms, tmp_path / "b", str(folder / "state.json"), state.read_text()[:-50]))
    with pytest.raises(CheckpointError, match="damaged"):
        mtl.load(broken(rooms, tmp_path / "c", str(folder / "model.safetensors"), "x"))


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path, rooms: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "data.json"):
        shutil.copy(rooms / name, run)
    with pytest.raises(CheckpointError, match="run has no checkpoints; expected the directory of a run"):
        mtl.load(run)


def test_a_run_that_is_not_finished_is_loaded_where_it_is_asked_for(tmp_path: Path, rooms: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(rooms, run, symlinks=True)
    audit = json.loads((run / "audit.json").read_text())
    audit["phases"][1]["completed"] = False
    (run / "audit.json").write_text(json.dumps(audit))
    with pytest.raises(CheckpointError, match=r"run is not finished: phase 'finetune' did not end; .* --which best"):
        mtl.load(run)
    assert mtl.load(run, "best").origin.step == mtl.load(rooms).origin.step
    (run / "audit.json").unlink()
    with pytest.raises(CheckpointError, match=r"run is not finished: it has no audit.json"):
        mtl.load(run)


def test_averaged_weights_are_loaded_where_there_were_any(tmp_path: Path) -> None:
    file = tiny_config(tmp_path, optim={"ema_decay": 0.5}, phases=[{"name": "a", "steps": 3, "lr": 1e-2}])
    model = load(mtl.train(file, quiet=True).run_dir)
    (row,) = (r for r in read_metrics(model.origin.run_dir) if "val/score" in r)
    assert evaluate(model).score == row["val/score"]


def test_numbers_of_the_whole_run_are_no_metrics_of_a_task_in_its_report(rooms: Path) -> None:
    assert "val/best_score" in read_metrics(rooms)[-1]
    assert read_run(rooms).metrics.keys() == {"segmentation", "depth", "normals", "object"}
