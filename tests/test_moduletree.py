"""Depth groups of real timm trunks: complete, disjoint, from input to output, tokens and bare parameters included."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from mtl.moduletree import depth_groups, describe

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


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_are_a_partition_from_stem_to_last_norm(name: str) -> None:
    trunk = on_meta(name)
    groups = depth_groups(trunk)
    number, first, last = EXPECTED[name]
    assert len(groups) == number
    assert first in groups[0] and last in groups[-1]
    flat = [parameter for group in groups for parameter in group]
    assert sorted(flat) == sorted(name for name, _ in trunk.named_parameters())


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_model_without_timm_s_groups_is_cut_at_its_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = on_meta(name)
    monkeypatch.delattr(type(trunk), "group_matcher")
    groups = depth_groups(trunk)
    flat = [parameter for group in groups for parameter in group]
    assert sorted(flat) == sorted(name for name, _ in trunk.named_parameters())
    assert len(groups) >= 4
    bare = {name for name, _ in trunk.named_parameters(recurse=False)}
    assert bare <= {*groups[0]}, "tokens and position embeddings belong to the first group"


def test_a_description_names_children_in_order_and_classes_with_their_bases() -> None:
    tree = describe(nn.ModuleDict({"trunk": on_meta("resnet18")}))
    assert tree.children[""] == ["trunk"]
    assert list(tree.children["trunk"])[:5] == ["conv1", "bn1", "act1", "maxpool", "layer1"]
    assert list(tree.classes["trunk.bn1"])[:2] == ["BatchNorm2d", "_BatchNorm"]
    assert tree.depth_groups("trunk")[0] == ["trunk.conv1.weight", "trunk.bn1.weight", "trunk.bn1.bias"]


def test_a_module_without_parameters_has_no_groups() -> None:
    assert depth_groups(nn.ReLU()) == []
