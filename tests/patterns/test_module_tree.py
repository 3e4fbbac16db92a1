"""Depth groups of real timm trunks: a partition of parameters and buffers by every name, from input to output."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

from mtl.patterns import partition
from mtl.patterns.module_tree import depth_groups, describe

EXPECTED = {  # number of groups, something in the first, something in the last
    "resnet18": (9, "conv1.weight", "layer4.1.conv2.weight"),
    "tf_efficientnet_lite0": (17, "conv_stem.weight", "conv_head.weight"),
    "convnext_atto": (14, "stem.0.weight", "head.norm.weight"),
    "vit_tiny_patch16_224": (13, "cls_token", "norm.weight"),
    "deit_tiny_distilled_patch16_224": (13, "dist_token", "norm.weight"),
    "swin_tiny_patch4_window7_224": (13, "patch_embed.proj.weight", "norm.weight"),
    "mixer_s16_224": (9, "stem.proj.weight", "norm.weight"),
    "cait_xxs24_224": (25, "pos_embed", "norm.weight"),
}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        trunk: nn.Module = timm.create_model(name, num_classes=0)
    return trunk


def names_in(module: nn.Module) -> list[str]:
    """Every name of every parameter and buffer."""
    tensors = [module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)]
    return sorted(name for each in tensors for name, _ in each)


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_are_a_partition_from_stem_to_last_norm(name: str) -> None:
    trunk = on_meta(name)
    groups = depth_groups(trunk)
    number, first, last = EXPECTED[name]
    assert len(groups) == number
    assert first in groups[0] and last in groups[-1]
    assert sorted(name for group in groups for name in group) == names_in(trunk)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_model_without_timm_s_groups_is_cut_at_its_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = on_meta(name)
    monkeypatch.delattr(type(trunk), "group_matcher")
    groups = depth_groups(trunk)
    assert sorted(name for group in groups for name in group) == names_in(trunk)
    assert len(groups) >= 4
    bare = {name for name, _ in trunk.named_parameters(recurse=False)}
    assert bare <= {*groups[0]}, "tokens and position embeddings belong to the first group"


def test_a_description_names_children_in_order_and_classes_with_their_bases() -> None:
    tree = describe(nn.ModuleDict({"trunk": on_meta("resnet18")}))
    assert tree.children[""] == ["trunk"]
    assert list(tree.children["trunk"])[:5] == ["conv1", "bn1", "act1", "maxpool", "layer1"]
    assert list(tree.classes["trunk.bn1"])[:2] == ["BatchNorm2d", "_BatchNorm"]
    depths = tree.depths("trunk")
    assert [depths[f"trunk.{name}"] for name in ("conv1.weight", "bn1.running_var", "layer1.1", "fc")] == [0, 0, 2, 8]


def test_a_module_without_parameters_has_no_groups() -> None:
    assert depth_groups(nn.ReLU()) == []


# With BatchNorm, with tensors under several names, with tables in modules without parameters, with blur filters.
FEW = ["resnet18", "coat_tiny", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "tresnet_m"]
MANY = [
    *("beit_base_patch16_224", "cait_xxs24_224", "coat_lite_tiny", "convnext_atto", "coatnet_0_rw_224"),
    *("davit_tiny", "densenet121", "dla34", "dpn68", "edgenext_xx_small", "efficientvit_b0", "fastvit_t8"),
    *("gcvit_xxtiny", "ghostnet_100", "hiera_tiny_224", "hrnet_w18_small", "inception_v3", "levit_128s"),
    *("mambaout_femto", "maxvit_tiny_tf_224", "mobilenetv3_small_100", "mobilevit_xs", "nasnetalarge", "pit_ti_224"),
    *("regnetx_002", "repvit_m0_9", "swinv2_tiny_window8_256", "tiny_vit_5m_224", "twins_svt_small", "vgg11_bn"),
    *("vit_small_patch14_dinov2", "volo_d1_224", "xception41", "xcit_nano_12_p16_224"),
]


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(each, marks=pytest.mark.slow) for each in MANY)])
def test_the_first_groups_and_all_without_the_last_ones_are_the_same_parameters_and_buffers(name: str) -> None:
    root = nn.ModuleDict({"trunk": on_meta(name)})
    tree, groups = describe(root), depth_groups(root["trunk"])
    tensors = dict(root.named_parameters(remove_duplicate=False)) | dict(root.named_buffers(remove_duplicate=False))
    parameters = [name for name, _ in root.named_parameters(remove_duplicate=False)]
    buffers = [name for name, _ in root.named_buffers(remove_duplicate=False)]
    assert sorted(f"trunk.{name}" for group in groups for name in group) == sorted(tensors)
    for number in range(1, len(groups)):
        first = partition([f"trunk@first:{number}"], parameters, buffers, tree)
        rest = partition(["trunk", f"!trunk@last:{len(groups) - number}"], parameters, buffers, tree)
        assert (first.frozen, first.frozen_buffers) == (rest.frozen, rest.frozen_buffers)
        frozen = {*first.frozen, *first.frozen_buffers}
        assert frozen == {f"trunk.{name}" for group in groups[:number] for name in group}
        free = {id(tensor) for name, tensor in tensors.items() if name not in frozen}
        assert free.isdisjoint(id(tensors[name]) for name in frozen), "the line cuts through no tied tensor"


@pytest.mark.parametrize("name", FEW)
def test_the_groups_of_parameters_are_timm_s_own(name: str) -> None:
    trunk = on_meta(name)
    own = dict(trunk.named_parameters())
    of_timm = group_parameters(trunk, trunk.group_matcher(coarse=False)).values()  # type: ignore[operator]
    assert [[name for name in group if name in own] for group in depth_groups(trunk)] == [list(g) for g in of_timm]


class Rotary(nn.Module):
    """Buffers where a timm trunk has them: next to parameters, in a module without any, before, between and after."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Buffer(torch.zeros(2), persistent=False)
        self.norm_in = nn.BatchNorm1d(2, affine=False)
        self.stem = nn.Linear(2, 2)
        self.rope = nn.BatchNorm1d(2, affine=False, track_running_stats=True)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in "ab"
        )
        self.norm_out = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2, affine=False))


def test_a_buffer_is_in_the_group_of_the_parameters_next_to_it() -> None:
    groups = depth_groups(Rotary())
    assert [sorted({name.removesuffix(".running_mean") for name in group if "mean" in name}) for group in groups] == [
        ["norm_in", "rope"],
        ["blocks.0.0", "blocks.0.2"],
        ["blocks.1.0", "blocks.1.2", "norm_out.1"],
    ]
    assert "table" in groups[0]


def test_names_are_those_inside_wrappers_and_the_groups_are_the_same() -> None:
    trunk = on_meta("resnet18")
    groups = depth_groups(trunk)
    trunk.layer1[0] = torch.compile(trunk.layer1[0])  # type: ignore[operator,index]
    assert depth_groups(torch.compile(trunk)) == groups  # type: ignore[arg-type]


def test_a_tensor_that_torch_does_not_register_is_in_the_group_of_its_module() -> None:
    tree = describe(nn.ModuleDict({"trunk": on_meta("resnet18")}))
    plain = ["trunk.layer4.1.seen", "trunk.layer1.0.bn1.seen", "trunk.seen", "trunk.layer4.1.extra.0.weight"]
    assert partition(["trunk@first:2"], [], plain, tree).frozen_buffers == ("trunk.layer1.0.bn1.seen", "trunk.seen")
    assert partition(["trunk", "!trunk@last:7"], [], plain, tree).frozen_buffers == (
        "trunk.layer1.0.bn1.seen",
        "trunk.seen",
    )
