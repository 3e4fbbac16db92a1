"""Teachers: their embedding against timm by hand, what they are made of, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from mtl.cli import main
from mtl.config import ConfigError, RunConfig, SettingError, TeacherConfig
from mtl.model.teachers import Teacher, build_teachers
from mtl.phases.setup import build_meta_setup
from mtl.training.run import train
from mtl.training.setup import assemble
from runs import TINY, read_model, small_config, small_parts


def config_of(teacher: dict[str, Any], **data: Any) -> RunConfig:
    tasks = {"like": {"type": "distill", "teacher": teacher}}
    phases = [{"name": "all", "epochs": 1}]
    data = {**TINY["data"], **data}
    return RunConfig.model_validate({**TINY, "data": data, "tasks": tasks, "balance": "mean", "phases": phases})


def build(teacher: dict[str, Any], channels: int = 3, **data: Any) -> Teacher:
    return build_teachers(config_of(teacher, **data), channels, with_weights=True)["like"]


def weights_of(name: str, file: Path, **options: Any) -> torch.nn.Module:
    """A timm model with random weights and statistics, which are also saved to a file."""
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=0, **options).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(0.5 + torch.rand(buffer.shape))
    save_file(dict(model.state_dict()), file)
    return model


def by_hand(model: torch.nn.Module, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    pixels = (images.numpy().astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    with torch.no_grad():
        embedding: Tensor = model(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())
    return embedding


def test_an_embedding_is_timms_of_the_image_normalised_as_the_teacher_was_trained(tmp_path: Path) -> None:
    model = weights_of("test_efficientnet", tmp_path / "w.safetensors")
    teacher = build({"name": "test_efficientnet", "weights": str(tmp_path / "w.safetensors")})
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    expected = by_hand(model, images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    found = teacher(images)
    assert found.shape == (4, teacher.width) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher(images.float()), found)


def test_a_teacher_of_a_fixed_size_sees_images_resized_to_it(tmp_path: Path) -> None:
    model = weights_of("test_vit", tmp_path / "w.safetensors")
    teacher = build({"name": "test_vit", "weights": str(tmp_path / "w.safetensors")})
    assert teacher.size == (160, 160)
    images = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    large = functional.interpolate(images.permute(0, 3, 1, 2).float(), (160, 160), mode="bilinear", antialias=True)
    expected = by_hand(model, large.permute(0, 2, 3, 1), (0.5,) * 3, (0.5,) * 3)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-5)
    smaller = build({"name": "test_vit", "weights": "none", "options": {"img_size": [32, 48]}})
    assert smaller.size == (32, 48) and smaller(images).shape == (2, 64)


def test_grey_images_are_shown_to_each_of_three_channels() -> None:
    teacher = build({"name": "test_resnet", "weights": "none"}, channels=1)
    grey = torch.randint(0, 256, (2, 32, 32, 1), dtype=torch.uint8)
    assert torch.equal(teacher(grey), teacher(grey.expand(-1, -1, -1, 3)))


def test_autocast_changes_no_bit_of_an_embedding() -> None:
    teacher = build({"name": "test_resnet", "weights": "none"})
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(images), teacher(images))
        inside = teacher(images)
    assert torch.equal(inside, teacher(images))


def test_random_weights_follow_from_the_seed_alone_and_leave_random_numbers_as_they_were() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = build({"name": "test_resnet", "weights": "none"})
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    other = build({"name": "test_resnet", "weights": "none"})
    assert one.digest() == other.digest()


def test_a_teacher_never_asks_for_gradients_and_is_in_eval_mode() -> None:
    teacher = build({"name": "test_resnet", "weights": "none"})
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_width_is_found_on_the_meta_device_without_weights(name: str) -> None:
    config = config_of({"name": name, "weights": "nowhere.safetensors"})
    setup = build_meta_setup(config)
    assert all(parameter.is_meta for parameter in setup.root.parameters())
    expected = timm.create_model(name, num_classes=0).num_features
    assert setup.tasks["like"].num_outputs == setup.teachers["like"].width == expected


# The trunk of a run


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run whose best weights are not its last ones, which itself learned from a teacher of the same kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        like = {"type": "distill", "teacher": {"name": "test_resnet", "weights": "none"}}
        tasks = {"object": TINY["tasks"]["object"], "like": like}
        # The second phase spoils what the first one has learned.
        phases = [{"name": "a", "epochs": 1, "lr": 1e-3}, {"name": "b", "epochs": 1, "lr": 3.0}]
        data = {**TINY["data"], "image_size": 48}
        parts = small_parts(tmp_path_factory.mktemp("old"), tasks=tasks, phases=phases, data=data, seed=4)
        return train(parts, quiet=True).run_dir


def test_the_teacher_of_a_run_is_its_trunk_with_its_best_weights(old: Path) -> None:
    best, last = (read_model(old / "checkpoints" / name) for name in ("best", "last"))
    assert not torch.equal(best["trunk.conv1.0.weight"], last["trunk.conv1.0.weight"])
    teacher = build({"run": str(old)})
    state = teacher.trunk.state_dict()
    assert {f"trunk.{name}" for name in state} == {name for name in best if name.startswith("trunk.")}
    assert all(torch.equal(tensor, best[f"trunk.{name}"]) for name, tensor in state.items())
    assert teacher.size == (48, 48)


def test_the_embedding_of_a_runs_trunk_is_what_its_heads_read(old: Path) -> None:
    own = small_config(old.parent.parent, **load_yaml(old / "config.yaml"))
    setup = assemble_file(own)
    model = setup.model.eval()
    model.load_state_dict(
        {name: tensor for name, tensor in read_model(old / "checkpoints/best").items() if name in model.state_dict()}
    )
    images = setup.val.batch(torch.arange(6)).images
    with torch.no_grad():
        pooled = model.encode(images).pooled
    assert pooled is not None and torch.equal(build({"run": str(old)})(images), pooled)


def load_yaml(file: Path) -> dict[str, Any]:
    import yaml

    written: dict[str, Any] = yaml.safe_load(file.read_text())
    return written


def assemble_file(file: Path) -> Any:
    from mtl.config import load_config

    return assemble(load_config(file), quiet=True)


def test_a_run_that_has_no_best_weights_gives_its_last_ones(old: Path, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last").symlink_to((old / "checkpoints/last").resolve())
    state = build({"run": str(tmp_path / "run")}).trunk.state_dict()
    last = read_model(old / "checkpoints/last")
    assert all(torch.equal(tensor, last[f"trunk.{name}"]) for name, tensor in state.items())


# Mistakes


@pytest.mark.parametrize(
    ("teacher", "key", "message"),
    [
        ({"name": "test_resnt", "weights": "none"}, "name", r"timm knows no model 'test_resnt'; nearest: test_resnet"),
        ({"name": "resnet18.mine", "weights": "none"}, "name", r"timm knows no weights 'resnet18.mine'"),
        ({"name": "test_resnet", "weights": "gone.pth"}, "weights", r"no such file: gone.pth \(choices: hub, packaged"),
        ({"name": "test_resnet", "weights": "packaged"}, "weights", r"packaged holds weights of tf_efficientnet_lite0"),
        (
            {"name": "test_resnet", "weights": "none", "options": {"pretrained": True}},
            "options",
            r"'pretrained' is no option here: set tasks\.like\.teacher\.weights instead",
        ),
        (
            {"name": "test_resnet", "weights": "none", "options": {"in_chans": 4}},
            "options",
            r"the teacher takes images of 4 channels, and those of scenes have 3",
        ),
        (
            {"name": "test_vit", "weights": "none", "options": {"img_size": 77}},
            "options",
            r"'test_vit' takes no images of 77 x 77 pixels; sizes that fit: 64, 80, 160",
        ),
        ({"name": "test_vit", "weights": "none", "options": {"img_size": "big"}}, "options", r"expected a number, or"),
        ({"run": "nowhere"}, "run", r"nowhere is not there; expected the directory of a run, such as runs/scenes"),
    ],
)
def test_a_mistake_is_named_at_the_teachers_key(teacher: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as error:
        build(teacher)
    assert error.value.key == f"tasks.like.teacher.{key}"


def test_a_run_without_a_checkpoint_or_with_a_damaged_one_is_named(old: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(SettingError, match=r"run has no checkpoints; expected the directory of a run"):
        build({"run": str(run)})
    (run / "checkpoints").mkdir()
    with pytest.raises(SettingError, match=r"run has no checkpoint yet; its first one comes with its first validation"):
        build({"run": str(run)})
    best = run / "checkpoints/best"
    best.mkdir()
    with pytest.raises(SettingError, match=r"best is no checkpoint: it has no model\.safetensors"):
        build({"run": str(run)})
    for file in (old / "checkpoints/best").iterdir():
        (best / file.name).write_bytes(file.read_bytes())
    (best / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(SettingError, match=r"cannot be read") as error:
        build({"run": str(run)})
    assert error.value.key == "tasks.like.teacher.run"


def test_a_run_on_images_of_other_channels_is_refused(old: Path) -> None:
    with pytest.raises(SettingError, match=r"the teacher takes images of 3 channels, and those of scenes have 5"):
        build({"run": str(old)}, channels=5)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({}, r"expected name, a timm model, or run, a run's directory"),
        ({"name": "resnet18", "run": "runs/old", "weights": "hub"}, r"expected name or run, not both"),
        ({"run": "runs/old", "weights": "hub"}, r"expected weights and options only with name"),
        ({"run": "runs/old", "options": {"in_chans": 1}}, r"expected weights and options only with name"),
        ({"name": "resnet18"}, r"expected weights with a name: hub, packaged, the path of a checkpoint, or none"),
        ({"nam": "resnet18"}, r"unknown key; nearest: name"),
    ],
)
def test_the_keys_of_a_teacher_are_checked_before_anything_is_loaded(
    tmp_path: Path, teacher: dict[str, Any], message: str
) -> None:
    from mtl.config import load_config

    tasks = {"like": {"type": "distill", "teacher": teacher}}
    with pytest.raises(ConfigError, match=message) as error:
        load_config(small_config(tmp_path, tasks=tasks, balance="mean"))
    assert all("tasks.like.teacher" in line for line in error.value.mistakes)


def test_what_a_run_saves_of_its_teacher_can_be_read_again() -> None:
    for written in ({"run": "runs/old"}, {"name": "resnet18", "weights": "none"}):
        own = TeacherConfig.model_validate(written)
        assert TeacherConfig.model_validate(own.model_dump(mode="json", exclude_none=True)) == own


def test_a_label_for_a_teachers_task_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    like = {"type": "distill", "label": "depth", "teacher": {"name": "test_resnet", "weights": "none"}}
    assert main(["plan", str(small_config(tmp_path, tasks={"like": like}, balance="mean"))]) == 2
    assert "tasks.like.label: expected no label: what is learned is the teacher's" in capsys.readouterr().err


def test_files_of_weights_may_hold_the_teacher_under_a_prefix(tmp_path: Path) -> None:
    weights_of("test_resnet", tmp_path / "plain.safetensors")
    state = load_file(tmp_path / "plain.safetensors")
    save_file({f"backbone.{name}": tensor for name, tensor in state.items()}, tmp_path / "inside.safetensors")
    one, other = (
        build({"name": "test_resnet", "weights": str(tmp_path / f"{name}.safetensors")}) for name in ("plain", "inside")
    )
    assert one.digest() == other.digest()
