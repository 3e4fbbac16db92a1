"""The network: any timm trunk of the main families, pyramids for dense heads, a pooled vector for the others."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from mtl.config import SettingError, TrunkConfig
from mtl.freeze import enforce, plan_freeze
from mtl.model import MultiTaskModel, set_output_bias
from mtl.model.build import build_trunk
from mtl.model.heads import enlarge
from mtl.model.network import Normalize
from mtl.model.trunk import feature_shape, pyramid_levels, read_features
from mtl.tasks import Classification, Depth, Normals, Segmentation, Task

TASKS: dict[str, Task] = {
    "segmentation": Segmentation(13),
    "depth": Depth(),
    "normals": Normals(),
    "object": Classification(10),
}
FAMILIES = [
    "resnet18",
    "tf_efficientnet_lite0",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mobilenetv3_small_050",
    "regnetx_002",
    "pvt_v2_b0",
    "mixer_s16_224",
    "eva02_tiny_patch14_224",
    "hiera_tiny_224",
    "densenet121",
]


def images(size: int, number: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (number, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", [*FAMILIES[:5], *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[5:])]
)
def test_a_trunk_of_any_family_gives_every_head_its_output_and_gets_gradient_back(name: str) -> None:
    size = 224 if name == "hiera_tiny_224" else 64
    model = MultiTaskModel(TrunkConfig(name=name), TASKS, size)
    outputs = model(images(size))
    assert {task: tuple(output.shape) for task, output in outputs.items()} == {
        "segmentation": (2, 13, size, size),
        "depth": (2, 1, size, size),
        "normals": (2, 3, size, size),
        "object": (2, 10),
    }
    sum(output.square().mean() for output in outputs.values()).backward()
    for part, module in [("trunk", model.trunk), *model.heads.items()]:
        reached = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in module.parameters()]
        assert any(reached), f"no gradient reaches {part}"


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("size", [37, 50, 96])
def test_odd_image_sizes_give_outputs_of_that_size(name: str, size: int) -> None:
    model = MultiTaskModel(TrunkConfig(name=name), {"depth": Depth()}, size).eval()
    with torch.no_grad():
        assert model(images(size))["depth"].shape == (2, 1, size, size)


def test_the_trunk_is_the_timm_module_and_keeps_its_names() -> None:
    model = MultiTaskModel(TrunkConfig(name="resnet18"), TASKS, 32)
    own = {name.removeprefix("trunk.") for name, _ in model.named_parameters() if name.startswith("trunk.")}
    assert own == {name for name, _ in timm.create_model("resnet18", num_classes=0).named_parameters()}
    assert "heads.depth.out.bias" in dict(model.named_parameters())


@pytest.mark.parametrize(
    "name, levels",
    [
        ("resnet18", [1, 2, 3, 4]),
        ("tf_efficientnet_lite0", [1, 2, 3, 4]),
        ("convnext_atto", [0, 1, 2, 3]),
        ("vit_tiny_patch16_224", [2, 5, 8, 11]),
        ("mixer_s16_224", [1, 3, 5, 7]),
    ],
)
def test_pyramid_levels(name: str, levels: list[int]) -> None:
    assert pyramid_levels(timm.create_model(name, num_classes=0)) == levels


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "convnext_atto"])
def test_the_pooled_vector_is_what_timm_itself_computes(name: str) -> None:
    trunk = build_trunk(TrunkConfig(name=name), 64).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = read_features(trunk, x, pyramid_levels(trunk), pooled=True)
        assert features.pooled is not None
        torch.testing.assert_close(features.pooled, trunk(x), rtol=1e-5, atol=1e-5)


def test_reading_the_shape_leaves_the_trunk_as_it_was() -> None:
    trunk = build_trunk(TrunkConfig(name="resnet18"), 32)
    trunk.layer1.eval()  # type: ignore[operator, union-attr]
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    modes = [module.training for module in trunk.modules()]
    shape = feature_shape(trunk, [1, 2, 3, 4], 32)
    assert (shape.pyramid, shape.pooled) == ([64, 128, 256, 512], 512)
    assert modes == [module.training for module in trunk.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())


def test_features_that_no_head_reads_are_not_computed() -> None:
    vector = MultiTaskModel(TrunkConfig(name="resnet18"), {"object": Classification(10)}, 32)
    dense = MultiTaskModel(TrunkConfig(name="tf_efficientnet_lite0"), {"depth": Depth()}, 32)
    assert vector.levels == []
    ran = []
    dense.trunk.conv_head.register_forward_hook(lambda *_: ran.append("conv_head"))  # type: ignore[union-attr]
    dense(images(32))
    assert not ran


def test_a_frozen_trunk_is_run_without_recording_and_heads_still_train() -> None:
    model = MultiTaskModel(TrunkConfig(name="resnet18"), {"object": Classification(10)}, 32)
    records: list[bool] = []
    model.trunk.conv1.register_forward_hook(lambda *_: records.append(torch.is_grad_enabled()))  # type: ignore[union-attr]
    model.trunk.requires_grad_(False)
    assert model.trunk_is_frozen
    model(images(32))["object"].sum().backward()
    assert all(parameter.grad is None for parameter in model.trunk.parameters())
    assert all(parameter.grad is not None for parameter in model.heads.parameters())
    model.trunk.layer4.requires_grad_(True)  # type: ignore[union-attr]
    assert not model.trunk_is_frozen
    model(images(32))
    assert records == [False, True]


def test_a_trunk_is_frozen_if_no_parameter_of_it_requires_a_gradient() -> None:
    model = MultiTaskModel(TrunkConfig(name="resnet18"), {"object": Classification(10)}, 32)
    enforce(model, plan_freeze(model, ["trunk", "!trunk.bn1.bias"]))
    assert not model.trunk_is_frozen
    enforce(model, plan_freeze(model, ["trunk"]))
    assert model.trunk_is_frozen
    with pytest.raises(AttributeError):
        model.trunk_is_frozen = False  # type: ignore[misc]
    model.trunk = nn.Identity()
    assert model.trunk_is_frozen


@pytest.mark.parametrize("device", [None, "meta"])
def test_example_inputs_are_blank_images_of_the_model_s_size(device: str | None) -> None:
    model = MultiTaskModel(TrunkConfig(name="resnet18"), {"object": Classification(10)}, 40)
    inputs = model.example_inputs(3, device)
    assert (inputs.shape, inputs.dtype, inputs.device.type) == ((3, 40, 40, 3), torch.uint8, device or "cpu")
    assert device == "meta" or not inputs.any()


def test_normalisation_is_the_textbook_formula_and_keeps_the_stored_layout() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pictures = images(8)
    result = Normalize(mean, std)(pictures)
    expected = (pictures.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    torch.testing.assert_close(result.double(), expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_grey_images_are_given_to_all_three_channels() -> None:
    result = Normalize((0.5,) * 3, (0.5,) * 3)(images(8)[..., :1])
    assert result.shape == (2, 3, 8, 8) and torch.equal(result[:, 0], result[:, 2])


def test_normalisation_follows_the_weights() -> None:
    lite = MultiTaskModel(TrunkConfig(name="tf_efficientnet_lite0", weights="packaged"), {"depth": Depth()}, 32)
    resnet = MultiTaskModel(TrunkConfig(name="resnet18"), {"depth": Depth()}, 32)
    black = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    assert lite.normalize(black)[0, :, 0, 0].tolist() == pytest.approx([-1, -1, -1])
    assert resnet.normalize(black)[0, :, 0, 0].tolist() == pytest.approx(
        [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    )


def test_heads_start_close_to_the_constant_prediction() -> None:
    model = MultiTaskModel(TrunkConfig(name="resnet18"), {"depth": Depth(), "object": Classification(3)}, 32).eval()
    set_output_bias(model.heads["depth"], torch.tensor([1.5]))
    set_output_bias(model.heads["object"], torch.tensor([0.0, -1.0, -2.0]))
    with torch.no_grad():
        outputs = model(images(32))
    assert (outputs["depth"] - 1.5).abs().max() < 0.5
    assert (outputs["object"] - torch.tensor([0.0, -1.0, -2.0])).abs().max() < 0.5


def test_an_unknown_trunk_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"timm knows no model 'resnt18'; nearest: resnet18"):
        build_trunk(TrunkConfig(name="resnt18"), 32)


def test_options_that_timm_does_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match=r"timm cannot build 'resnet18' with \{'colour': 3\}.*colour"):
        build_trunk(TrunkConfig(name="resnet18", options={"colour": 3}), 32)


@pytest.mark.parametrize(
    ("name", "size", "options", "fitting"),
    [
        ("test_vit", 50, {}, [48, 64, 160]),
        ("vit_tiny_patch16_224", 8, {}, [16, 224]),
        ("hiera_tiny_224", 50, {}, [32, 64, 224]),
        ("vit_tiny_patch16_224", 64, {"img_size": 224}, [224]),
        pytest.param("maxvit_tiny_tf_224", 100, {}, [96, 128, 224], marks=pytest.mark.slow),
        pytest.param("xcit_nano_12_p16_224", 100, {}, [96, 112, 224], marks=pytest.mark.slow),
        pytest.param("convnext_atto", 16, {}, [32, 224], marks=pytest.mark.slow),
    ],
)
def test_a_size_that_the_trunk_does_not_take_is_blamed_with_sizes_that_fit(
    name: str, size: int, options: dict[str, int], fitting: list[int]
) -> None:
    config = TrunkConfig(name=name, options=options)
    with torch.device("meta"):
        with pytest.raises(SettingError) as caught:
            MultiTaskModel(config, {"depth": Depth()}, size)
        assert caught.value.key == "data.image_size"
        start = f"{name!r} takes no images of {size} x {size} pixels; sizes that fit: {', '.join(map(str, fitting))} ("
        assert caught.value.message.startswith(start)
        for each in fitting:
            MultiTaskModel(config, {"depth": Depth()}, each)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_every_convolution_of_trunk_and_heads_computes_in_the_layout_asked_for(
    name: str, layout: torch.memory_format
) -> None:
    model = MultiTaskModel(TrunkConfig(name=name), TASKS, 64, layout)
    seen = []

    def look(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        if min(output.shape[1:]) > 1:  # a tensor of one channel or pixel has both layouts at once
            seen.append(output.is_contiguous(memory_format=layout))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(look)
    model(images(64, number=2))
    assert len(seen) > 20 and all(seen)


@pytest.mark.parametrize(
    ("old", "new"), [((4, 4), (16, 16)), ((3, 7), (5, 64)), ((1, 1), (9, 2)), ((8, 8), (8, 8)), ((9, 5), (4, 3))]
)
def test_maps_are_enlarged_as_torch_does_it(old: tuple[int, int], new: tuple[int, int]) -> None:
    ours = torch.randn(2, 3, *old, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    expected = torch.nn.functional.interpolate(theirs, size=new, mode="bilinear", align_corners=False)
    found = enlarge(ours, new)
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    # The matrix is computed in float32.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5)
