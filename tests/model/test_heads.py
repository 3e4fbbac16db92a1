"""Heads: every one on conv pyramids and plain ViTs, whole gradients, references in float64, and mistakes."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mtl.audit import GradientAudit
from mtl.config import HeadConfig, SettingError, TrunkConfig
from mtl.model import Features, FeatureShape, MultiTaskModel, set_output_bias
from mtl.model.heads import HEADS
from mtl.model.heads.attention_pool import AttentionPoolHead
from mtl.model.heads.bins import BinsHead
from mtl.model.heads.deeplabv3plus import DeepLabV3PlusHead
from mtl.model.heads.fpn import FpnHead
from mtl.model.heads.linear_bn import LinearBnHead
from mtl.model.heads.smp import halved
from mtl.model.reachability import reached_parameters
from mtl.model.trunk import feature_shape, features_from, pyramid_levels
from mtl.tasks import Classification, Depth, Segmentation, Task

SMP = ("dpt", "upernet", "segformer", "deeplabv3plus")
SMALL = {name: {"width": 8} for name in SMP} | {"mlp": {"hidden": 8}, "bins": {"num_bins": 8}}
# Levels at strides 4 to 32, at odd and unequal sizes too; and four equal levels with tokens, in odd and even numbers.
CASES: list[tuple[str, int | tuple[int, int]]] = [("test_resnet", (37, 70)), ("test_vit", 48), ("test_vit", (32, 64))]


def model_of(
    name: str, trunk: str = "test_resnet", size: int | tuple[int, int] = 64, task: Task | None = None, **options: Any
) -> MultiTaskModel:
    """A model with one task `t`, whose head has this name, with small options if there are none."""
    torch.manual_seed(0)
    own = HeadConfig(name=name, options=options or SMALL.get(name, {}))
    kind = HEADS.get(name)
    task = task or (Depth() if kind is None or kind.output == "dense" else Classification(3))
    return MultiTaskModel(TrunkConfig(name=trunk), {"t": task}, size, heads={"t": own})


def images(model: MultiTaskModel, number: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, *model.image_size, 3), dtype=torch.uint8, generator=generator, device="cpu")


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("trunk", "size"), CASES)
def test_two_audited_steps_train_every_parameter_of_every_head(
    name: str, trunk: str, size: int | tuple[int, int]
) -> None:
    model = model_of(name, trunk, size)
    expected = (2, 1, *model.image_size) if HEADS[name].output == "dense" else (2, 3)
    own = {parameter for parameter, _ in model.named_parameters() if parameter.startswith("heads.")}
    assert own <= reached_parameters(model)["t"]
    # No weight decay: what no gradient moves does not move. No momentum: nor does what got noise for a gradient.
    optimizer = torch.optim.SGD(model.heads.parameters(), lr=0.1)
    audit = GradientAudit(model, freeze=["trunk"], optimizers=[optimizer])
    model.trunk.requires_grad_(False).eval()
    with audit.phase("two steps"):
        for _ in range(2):
            output = model(images(model))["t"]
            assert tuple(output.shape) == expected
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
            (output * weights).sum().backward()
            audit.after_backward()
            for parameter, tensor in model.heads.named_parameters():
                assert tensor.grad is not None and tensor.grad.abs().max() > 1e-6, parameter
            optimizer.step()
            audit.after_step()
            optimizer.zero_grad()
    assert audit.report.ok, audit.report.violations


@pytest.mark.parametrize("name", HEADS)
def test_a_head_runs_in_half_precision_and_in_channels_last(name: str) -> None:
    model = model_of(name).to(memory_format=torch.channels_last).train()
    x = model.prepare(images(model)).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = model.heads["t"](model.read(x), model.image_size)
    output.float().square().mean().backward()
    assert output.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.heads.parameters())


@pytest.mark.parametrize("name", HEADS)
def test_initial_weights_follow_from_the_seed_and_copies_compute_the_same(name: str) -> None:
    model, again = model_of(name, "test_vit", 32).eval(), model_of(name, "test_vit", 32)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    with torch.no_grad():
        expected = model(images(model))["t"]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(images(model))["t"], expected)
    with torch.device("meta"):
        assert model_of(name, "test_vit", 32).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", [name for name in HEADS if name != "bins"])
def test_training_starts_close_to_the_constant(name: str) -> None:
    dense = HEADS[name].output == "dense"
    model = model_of(name, "test_vit", 32, Segmentation(3) if dense else Classification(3)).eval()
    constant = torch.tensor([0.5, -1.0, -3.0])
    set_output_bias(model.heads["t"], constant)
    with torch.no_grad():
        output = model(images(model))["t"]
    assert (output - constant.view(1, 3, *([1, 1] if dense else []))).abs().max() < 0.6


def test_each_head_reads_what_it_says_and_the_trunk_computes_no_more() -> None:
    tasks: dict[str, Task] = {"dense": Depth(), "vector": Classification(3), "tokens": Classification(2)}
    heads = {"dense": None, "vector": HeadConfig(name="mlp"), "tokens": HeadConfig(name="attention_pool")}
    model = MultiTaskModel(TrunkConfig(name="test_vit"), tasks, 32, heads=heads).eval()
    for active, kinds in (
        (["dense"], {"pyramid"}),
        (["vector"], {"pooled"}),
        (["tokens"], {"tokens"}),
        (["dense", "tokens"], {"pyramid", "tokens"}),
        (None, {"pyramid", "pooled", "tokens"}),
    ):
        with torch.no_grad():
            features = model.encode(images(model), active)
            assert model.reads(active) == features.kinds == kinds
            alone, together = model.decode(features, (32, 32), active), model(images(model))
        assert all(torch.equal(output, together[task]) for task, output in alone.items())
        rebuilt = features_from(features.tensors(), features.kinds)
        assert all(a is b for a, b in zip(rebuilt.tensors(), features.tensors(), strict=True))


def test_tokens_are_those_that_the_trunk_pools_class_token_first() -> None:
    model = model_of("attention_pool", "test_vit", 32).eval()
    with torch.no_grad():
        tokens = model.encode(images(model)).tokens
        final = model.trunk.forward_features(model.prepare(images(model)))  # type: ignore[operator]
    assert tokens is not None and torch.equal(tokens, final)
    assert tokens.shape[1] == 1 + (32 // 16) ** 2
    assert model_of("attention_pool", "test_resnet").reads(None) == {"pyramid"}


@pytest.mark.parametrize(
    ("trunk", "size", "tokens", "strides", "plain"),
    [
        ("test_resnet", (64, 32), None, (4, 8, 16, 32), False),
        ("test_vit", 48, 64, (16, 16, 16, 16), True),
    ],
)
def test_the_shape_says_what_a_head_can_read(
    trunk: str, size: int | tuple[int, int], tokens: int | None, strides: tuple[int, ...], plain: bool
) -> None:
    model = model_of("fpn", trunk, size)
    shape = feature_shape(model.trunk, pyramid_levels(model.trunk), size)
    assert (shape.tokens, shape.strides, shape.is_plain) == (tokens, strides, plain)
    height, width = model.image_size
    assert shape.sizes == tuple((-(-height // stride), -(-width // stride)) for stride in strides)


SHAPE = FeatureShape([6, 8], 8, 8, (4, 8), ((4, 6), (2, 3)))


def test_attention_pool_is_the_attention_of_torch_with_one_query() -> None:
    torch.manual_seed(0)
    head = AttentionPoolHead(SHAPE, 3, num_heads=2).double()
    reference = nn.MultiheadAttention(8, 2, batch_first=True).double()
    for parameter in (*head.parameters(), reference.in_proj_bias):
        nn.init.normal_(parameter)
    with torch.no_grad():
        # Ours has neither a map of the query nor one of the result, which would be linear maps of linear maps.
        reference.in_proj_weight.copy_(torch.cat([torch.eye(8), head.key.weight, head.value.weight]))
        reference.in_proj_bias.copy_(torch.cat([torch.zeros(16), head.value.bias]))
        reference.out_proj.weight.copy_(torch.eye(8))
        reference.out_proj.bias.zero_()
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    normed = functional.layer_norm(tokens, [8], head.norm.weight, head.norm.bias)
    pooled, _ = reference(head.query.expand(2, 1, 8), normed, normed)
    expected = head.out(head.pooled_norm(pooled[:, 0]))
    torch.testing.assert_close(head(Features([], None, tokens), (8, 8)), expected)


@pytest.mark.parametrize("separable", [False, True])
def test_fpn_smooths_after_each_sum_or_twice_after_the_last_one(separable: bool) -> None:
    torch.manual_seed(0)
    shape = FeatureShape([6, 8, 9], 9, None, (4, 8, 16), ((8, 6), (4, 3), (2, 2)))
    pyramid = [torch.randn(2, c, h, w) for c, (h, w) in zip(shape.pyramid, shape.sizes, strict=True)]

    def smoothed(maps: torch.Tensor, *layers: nn.Module) -> torch.Tensor:
        *convolutions, norm, _ = layers
        assert isinstance(norm, nn.BatchNorm2d)
        if len(convolutions) == 2:
            # One filter for each pair of channels, of rank 1 in them.
            channels, mixing = (conv.weight for conv in convolutions)
            weight = torch.einsum("chw,oc->ochw", channels[:, 0], mixing[:, :, 0, 0])  # type: ignore[index]
        else:
            weight = convolutions[0].weight  # type: ignore[assignment]
        maps = functional.conv2d(maps, weight, padding=1)
        maps = functional.batch_norm(maps, None, None, norm.weight, norm.bias, training=True)
        return maps.clamp(min=0)

    for smooth in ("finest", "levels"):
        head = FpnHead(shape, 5, width=7, smooth=smooth, separable=separable).train()  # type: ignore[arg-type]
        fine, middle, coarse = (lateral(maps) for lateral, maps in zip(head.lateral, pyramid, strict=True))
        merged = middle + functional.interpolate(coarse, (4, 3))
        if smooth == "levels":
            merged = smoothed(merged, *head.smooth[1])  # type: ignore[misc]
        merged = fine + functional.interpolate(merged, (8, 6))
        if smooth == "levels":
            merged = smoothed(merged, *head.smooth[0])  # type: ignore[misc]
        else:
            merged = smoothed(smoothed(merged, *head.smooth[:3]), *head.smooth[3:])
        expected = functional.interpolate(head.out(merged), (16, 12), mode="bilinear", align_corners=False)
        torch.testing.assert_close(head(Features(pyramid, None), (16, 12)), expected, rtol=1e-4, atol=1e-5)


def test_fpn_cannot_smooth_levels_that_are_not_there() -> None:
    one = FeatureShape([6], 6, None, (8,), ((4, 6),))
    assert FpnHead(one, 3)(Features([torch.randn(2, 6, 4, 6)], None), (8, 12)).shape == (2, 3, 8, 12)
    with pytest.raises(ValueError, match="this trunk has one; expected finest"):
        FpnHead(one, 3, smooth="levels")


@pytest.mark.parametrize("levels", ["last", "all"])
def test_linear_bn_is_a_linear_map_of_normalised_positions(levels: str) -> None:
    torch.manual_seed(0)
    head = LinearBnHead(SHAPE, 3, levels=levels).double().train()  # type: ignore[arg-type]
    pyramid = [torch.randn(2, 6, 4, 6, dtype=torch.float64), torch.randn(2, 8, 2, 3, dtype=torch.float64)]
    if levels == "last":
        read = pyramid[-1]
    else:
        up = functional.interpolate(pyramid[1], (4, 6), mode="bilinear", align_corners=False)
        read = torch.cat([pyramid[0], up], dim=1)
    mean = read.mean((0, 2, 3), keepdim=True)
    normed = (read - mean) / (read.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    weight = head.out.weight[:, :, 0, 0]
    expected = torch.einsum("bchw,oc->bohw", normed, weight) + head.out.bias.view(1, 3, 1, 1)
    torch.testing.assert_close(head(Features(pyramid, None), tuple(read.shape[-2:])), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("space", ["log", "linear"])
def test_bins_give_the_expectation_of_their_centres_in_the_space_of_the_task(space: str) -> None:
    head = BinsHead(SHAPE, 1, num_bins=3, min=1.0, max=4.0, space=space).double()  # type: ignore[arg-type]
    centres = torch.tensor([0.0, 0.6931471805599453, 1.3862943611198906] if space == "log" else [1.0, 2.5, 4.0])
    torch.testing.assert_close(head.centres, centres.double(), rtol=0, atol=1e-6)
    nn.init.zeros_(head.out.weight)
    with torch.no_grad():
        head.out.bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    output = head(Features([torch.zeros(1), torch.randn(2, 8, 2, 3).double()], None), (2, 3))
    assert output.shape == (2, 1, 2, 3)
    expected = 0.2 * centres[0] + 0.3 * centres[1] + 0.5 * centres[2]
    torch.testing.assert_close(output, expected.double().expand(2, 1, 2, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("constant", [-2.2, -0.4, 0.0, 1.1, 2.29])
def test_bins_start_from_the_constant_with_every_bin_in_play(constant: float) -> None:
    model = model_of("bins", "test_vit", 32, num_bins=64).eval()
    head = model.heads["t"]
    set_output_bias(head, torch.tensor([constant]))
    assert isinstance(head, BinsHead)
    expectation = (head.get_parameter("out.bias").detach().softmax(0) * head.centres).sum()
    assert float(expectation) == pytest.approx(constant, abs=1e-5)
    with torch.no_grad():
        assert (model(images(model))["t"] - constant).abs().max() < 0.3


def test_bins_that_cannot_give_the_constant_are_refused() -> None:
    head = BinsHead(SHAPE, 1, min=0.1, max=2.0)
    with pytest.raises(ValueError, match=r"bins from -2.303 to 0.6931 cannot give .* output, 1.5; set min, max and"):
        set_output_bias(head, torch.tensor([1.5]))


def test_levels_that_were_rounded_are_brought_to_factors_of_two_and_others_are_left_alone() -> None:
    exact = [torch.randn(1, 2, 8, 16), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 2, 4)]
    assert all(a is b for a, b in zip(halved(exact), exact, strict=True))
    odd = halved([torch.randn(1, 2, 10, 13), torch.randn(1, 2, 5, 7), torch.randn(1, 2, 3, 4)])
    assert [tuple(level.shape[-2:]) for level in odd] == [(12, 16), (6, 8), (3, 4)]


@pytest.mark.parametrize("patch", [8, 14, 16])
def test_dpt_takes_the_levels_of_a_vit_of_any_patch_size(patch: int) -> None:
    options = {"patch_size": patch, "img_size": 3 * patch}
    heads = {"t": HeadConfig(name="dpt", options={"width": 8})}
    model = MultiTaskModel(TrunkConfig(name="test_vit", options=options), {"t": Depth()}, 3 * patch, heads=heads)
    assert model(images(model))["t"].shape == (2, 1, 3 * patch, 3 * patch)


@pytest.mark.parametrize("stride", [8, 16])
def test_deeplab_takes_a_dilated_trunk_at_its_own_ratio(stride: int) -> None:
    heads = {"t": HeadConfig(name="deeplabv3plus", options={"width": 8})}
    trunk = TrunkConfig(name="resnet26", options={"output_stride": stride})
    with torch.device("meta"):
        model = MultiTaskModel(trunk, {"t": Depth()}, 64, heads=heads)
        assert model(images(model).to("meta"))["t"].shape == (2, 1, 64, 64)
    assert isinstance(model.heads["t"], DeepLabV3PlusHead)
    assert model.heads["t"].ratio == stride // 4


@pytest.mark.parametrize(
    ("task", "head", "key", "message"),
    [
        (Depth(), {"name": "mpl"}, "tasks.t.head.name", "no head 'mpl'; there are: linear, .*; nearest: mlp"),
        (
            Depth(),
            {"name": "mlp"},
            "tasks.t.head.name",
            "mlp gives an output per image, the task has an output per pixel; heads that fit: fpn, linear_bn, bins",
        ),
        (Classification(3), {"name": "fpn"}, "tasks.t.head.name", "heads that fit: linear, mlp, attention_pool$"),
        (Segmentation(3), {"name": "bins"}, "tasks.t.head", "bins: expected a task with one output, depth, got 3"),
        (
            Classification(3),
            {"name": "attention_pool", "options": {"num_heads": 5}},
            "tasks.t.head",
            "attention_pool: expected num_heads that divide the trunk's 96 channels, got 5",
        ),
        (Depth(), {"name": "bins", "options": {"min": 3.0, "max": 2.0}}, "tasks.t.head.options", "min below its max"),
        (Depth(), {"name": "fpn", "options": {"widht": 3}}, "tasks.t.head.options", "widht"),
    ],
)
def test_a_mistake_is_blamed_on_the_head(task: Task, head: dict[str, Any], key: str, message: str) -> None:
    with torch.device("meta"), pytest.raises(SettingError, match=message) as caught:
        MultiTaskModel(TrunkConfig(name="test_resnet"), {"t": task}, 64, heads={"t": HeadConfig(**head)})
    assert caught.value.key == key


def test_attention_over_a_single_position_is_refused() -> None:
    with pytest.raises(SettingError, match=r"the trunk's last map has one position, so that .*; use linear or mlp"):
        model_of("attention_pool", "test_resnet", 32)


@pytest.mark.parametrize("name", SMP)
def test_without_the_extra_the_heads_that_need_it_name_it_and_others_work(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "segmentation_models_pytorch"
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    # As the import system marks a module that cannot be found.
    monkeypatch.setitem(sys.modules, package, None)
    with torch.device("meta"):
        with pytest.raises(SettingError, match=f"{name} needs segmentation-models-pytorch, .* the extra `heads`:") as e:
            model_of(name)
        assert e.value.key == "tasks.t.head.name"
        model_of("fpn")
