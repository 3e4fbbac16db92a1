"""`type:norm`: every normalisation layer of torch, timm and torchvision, and nothing else."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType

import pytest
import timm.layers
import timm.models
import torch
import torchvision.ops
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import create_norm, create_norm_act
from torch import nn

from mtl.patterns import PatternError, partition, select
from mtl.patterns.module_tree import describe, named_buffers, named_parameters
from mtl.patterns.norms import is_norm

# Modules whose name has a norm in it, and that are none: blocks and heads with a norm among other layers, blocks of the
# networks without norms, and NASNet's cell, which is "normal" and no "reduction".
NO_NORMS = {
    *("ClNormMlpClassifierHead", "NormMlpClassifierHead", "ConvNormAct", "ConvBnAct", "SeparableConvNormAct"),
    *("GlobalResponseNormMlp", "ConvBNAct", "LightConvBNAct", "ConvBN", "NormFreeBlock", "NormFreeNet", "ConvNorm"),
    *("NormLinear", "LinearNorm", "EvaBlockPostNorm", "DownsampleNormFirst", "ConvMlpWithNorm", "NormalCell"),
    *("ActConvBn", "BnAct", "BnActConv2d", "Conv2dNorm", "NormMlp"),
    *("Conv2dNormActivation", "Conv3dNormActivation", "ConvNormActivation"),
}
# By hand: the layers of torch that normalise.
OF_TORCH = {
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"),
    *("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LazyInstanceNorm1d", "LazyInstanceNorm2d"),
    *("LazyInstanceNorm3d", "SyncBatchNorm", "GroupNorm", "LayerNorm", "RMSNorm", "LocalResponseNorm"),
    *("CrossMapLRN2d",),
}


def modules_of(package: ModuleType) -> Iterator[ModuleType]:
    yield package
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        yield importlib.import_module(found.name)


def layers_of(package: ModuleType) -> set[type[nn.Module]]:
    """The classes of layers that a package defines."""
    return {
        kind
        for module in modules_of(package)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__.startswith(package.__name__)
    }


def test_the_norms_of_torch_are_these() -> None:
    kinds = [kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    assert {kind.__name__ for kind in kinds if is_norm(kind)} == OF_TORCH


@pytest.mark.filterwarnings("ignore")  # timm's former names warn
@pytest.mark.parametrize("package", [timm.layers, timm.models, torchvision.ops], ids=lambda package: package.__name__)
def test_a_layer_is_a_norm_if_its_name_says_so(package: ModuleType) -> None:
    layers = layers_of(package)
    named = {kind for kind in layers if re.search(r"(?i)norm|(?-i:BN|Bn|Abn|ABN|LRN)", kind.__name__)}
    norms = {kind for kind in layers if is_norm(kind)}
    assert {kind.__name__ for kind in named - norms} <= NO_NORMS
    assert {kind.__name__ for kind in norms - named} == set()
    assert not {kind.__name__ for kind in norms} & NO_NORMS
    assert norms


def test_every_layer_that_timm_offers_as_a_norm_is_one() -> None:
    offered = {*create_norm._NORM_MAP.values(), *create_norm_act._NORM_ACT_MAP.values()}
    kinds = {kind for kind in offered if isinstance(kind, type)}
    assert len(kinds) > 20
    assert {kind for kind in kinds if not is_norm(kind)} == set()


def test_a_subclass_of_a_norm_is_one_and_an_affine_layer_is_none() -> None:
    class Own(timm.layers.LayerNorm2d):
        pass

    assert is_norm(Own)
    assert not is_norm(timm.models.mlp_mixer.Affine)
    assert not is_norm(nn.Linear) and not is_norm(nn.Identity) and not is_norm(timm.layers.LayerScale)


# Of each trunk, by hand: what a name has in it if it is a tensor of a norm.
TRUNKS = {
    "resnet18": r"bn\d|downsample\.1",
    "tf_efficientnet_lite0": r"bn\d",
    "vit_tiny_patch16_224": r"norm\d?",
    "convnextv2_atto": r"norm|grn|stem\.1|downsample\.0|head\.norm",
    "swin_tiny_patch4_window7_224": r"norm\d?",
    "resnetv2_50x1_bit": r"norm\d?",  # GroupNormAct
}


@pytest.mark.parametrize("name", TRUNKS)
def test_the_norms_of_a_trunk_are_those_that_its_names_tell(name: str) -> None:
    with torch.device("meta"):
        root = nn.ModuleDict({"trunk": timm.create_model(name, num_classes=0), "heads": nn.Linear(2, 2)})
    parameters, buffers = list(named_parameters(root)), list(named_buffers(root))
    tensors = "weight|bias|running_mean|running_var|num_batches_tracked"
    expression = re.compile(rf"trunk\.(.*\.)?({TRUNKS[name]})\.({tensors})")
    split = partition(["type:norm"], parameters, buffers, describe(root))
    assert split.frozen == tuple(each for each in parameters if expression.fullmatch(each))
    assert split.frozen_buffers == tuple(each for each in buffers if expression.fullmatch(each))
    assert 0 < len(split.frozen) < len(parameters)


def test_a_norm_with_tensors_of_its_own_is_selected_whole_and_taken_back() -> None:
    root = nn.Sequential(
        nn.Linear(4, 4),
        timm.layers.FilterResponseNormTlu2d(4),
        timm.layers.EvoNorm2dB0(4),
        timm.layers.FrozenBatchNormAct2d(4),
        timm.layers.SplitBatchNorm2d(4),
        timm.layers.SimpleNorm2d(4),
    )
    tree, parameters, buffers = describe(root), list(named_parameters(root)), list(named_buffers(root))
    split = partition(["type:norm"], parameters, buffers, tree)
    assert split.trainable == ("0.weight", "0.bias") and split.free_buffers == ()
    assert "1.tau" in split.frozen and "4.aux_bn.0.running_var" in split.frozen_buffers
    assert "3.weight" in split.frozen_buffers, "a frozen norm holds its weight as a buffer"
    assert partition(["**", "!type:norm"], parameters, buffers, tree).frozen == ("0.weight", "0.bias")


def test_a_model_without_norms_is_named_in_the_error_and_so_is_the_nearest_name() -> None:
    root = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(PatternError, match=r"pattern 'type:norm' matches nothing: no module is a 'norm'$"):
        select(["type:norm"], list(named_parameters(root)), describe(root))
    root.append(nn.LayerNorm(2))
    with pytest.raises(PatternError, match=r"no module is a 'Norm'; nearest: norm"):
        select(["type:Norm"], list(named_parameters(root)), describe(root))


LAYERS = {
    "norm": [nn.BatchNorm2d, nn.LayerNorm, timm.layers.RmsNorm, timm.layers.BatchNormAct2d, timm.layers.EvoNorm2dS0a],
    "other": [nn.Linear, nn.PReLU, timm.layers.LayerScale, timm.layers.GluMlp],
}


@settings(max_examples=50, derandomize=True)
@given(st.recursive(st.sampled_from(sorted(LAYERS)), lambda inner: st.lists(inner, min_size=1, max_size=4)), st.data())
def test_in_any_tree_the_tensors_below_norms_are_selected(shape: str | list[object], data: st.DataObject) -> None:
    norms, others = set[str](), set[str]()

    def build(part: str | list[object], path: str) -> nn.Module:
        if isinstance(part, list):
            return nn.Sequential(*(build(each, f"{path}{place}.") for place, each in enumerate(part)))  # type: ignore[arg-type]
        kind = data.draw(st.sampled_from(LAYERS[part]))
        layer: nn.Module = kind(16, 2) if kind is nn.Linear else kind(16)
        (norms if part == "norm" else others).update(f"{path}{name}" for name in layer.state_dict())
        return layer

    root = build(shape, "")
    names = [*named_parameters(root), *named_buffers(root)]
    if not norms:
        with pytest.raises(PatternError, match="no module is a 'norm'"):
            select(["type:norm"], names, describe(root))
    else:
        assert set(select(["type:norm"], names, describe(root)).names) == norms
    assert norms | others == set(names)
