"""Depthwise convolutions whose weight gradient is a sum of shifted products."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import Tensor, nn

from mtl.model.depthwise import ProductConv2d, ProductConv2dSame, depthwise_layers, use_products, weight_gradient
from mtl.model.prefix import Prefix
from mtl.model.trunk import Features

LAYERS = {
    "5 x 5": lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6),
    "strided": lambda: nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False),
    "dilated, not square": lambda: nn.Conv2d(6, 6, (3, 5), (1, 2), (4, 2), (2, 1), groups=6),
    "padded as TensorFlow does": lambda: Conv2dSame(6, 6, 5, 2, groups=6),
}


def both(layer: nn.Module, channels_last: bool = False) -> list[tuple[Tensor, list[Tensor]]]:
    """The output of a layer, and the gradients of its input and its parameters: by torch, then with products."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 6, 9, 7, generator=generator)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = nn.Sequential(layer).to(memory_format=layout)
    images = images.contiguous(memory_format=layout).requires_grad_()
    found = []
    for names in ((), ("0",)):
        use_products(model, names)
        output = model(images)
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        found.append((output, list(torch.autograd.grad(output, [images, *model.parameters()], gradient))))
    return found


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_all_but_the_weight_gradient_is_torchs_to_the_bit(layer: object, channels_last: bool) -> None:
    module = layer()  # type: ignore[operator]
    (output, (of_images, of_weight, *rest)), (own, (own_of_images, own_of_weight, *own_rest)) = both(
        module, channels_last
    )
    assert torch.equal(output, own) and output.stride() == own.stride()
    assert torch.equal(of_images, own_of_images)
    assert all(map(torch.equal, rest, own_rest))
    assert own_of_weight.stride() == module.weight.stride()
    torch.testing.assert_close(own_of_weight, of_weight, rtol=1e-5, atol=1e-5)
    assert type(module) in (ProductConv2d, ProductConv2dSame)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[tuple[int, ...], ...]:
    pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    return draw(pair(1, 8)), draw(pair(1, 5)), draw(pair(1, 3)), draw(pair(0, 4)), draw(pair(1, 3))


@given(geometries(), st.booleans())
def test_the_weight_gradient_is_that_of_torch_in_float64(
    geometry: tuple[tuple[int, ...], ...], channels_last: bool
) -> None:
    size, kernel, stride, padding, dilation = geometry
    reach = [(taps - 1) * apart + 1 for taps, apart in zip(kernel, dilation, strict=True)]
    assume(all(pixels + 2 * zeros >= own for pixels, zeros, own in zip(size, padding, reach, strict=True)))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    weight = torch.zeros(3, 1, *kernel, dtype=torch.float64, requires_grad=True)
    output = nn.functional.conv2d(images, weight, None, stride, padding, dilation, 3)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(output, weight, gradient)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images, gradient = (each.contiguous(memory_format=layout) for each in (images, gradient))
    own = weight_gradient(images, gradient, kernel, stride, padding, dilation)
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_in_float32_it_is_as_near_to_float64_as_torchs_own() -> None:
    generator = torch.Generator().manual_seed(0)
    images, gradient = (torch.randn(16, 64, 3, 3, generator=generator) for _ in range(2))
    weight = torch.zeros(64, 1, 5, 5, requires_grad=True)
    truth = torch.autograd.grad(
        nn.functional.conv2d(images.double(), weight.double(), None, 1, 2, 1, 64), weight, gradient.double()
    )[0].double()
    by_torch = torch.autograd.grad(nn.functional.conv2d(images, weight, None, 1, 2, 1, 64), weight, gradient)[0]
    own = weight_gradient(images, gradient, (5, 5), (1, 1), (2, 2), (1, 1))
    assert (own - truth).abs().max() <= 2 * (by_torch - truth).abs().max() + 1e-6


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_gradients_of_gradients_are_right_too(layer: object) -> None:
    module = layer()  # type: ignore[operator]
    module.double()
    model = nn.Sequential(module)
    use_products(model, ["0"])
    images = torch.randn(1, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    values = [images, *(parameter.detach().clone().requires_grad_() for parameter in module.parameters())]
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        return output

    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)


def test_under_autocast_without_a_gradient_and_frozen_it_is_torchs_own() -> None:
    layer = LAYERS["5 x 5"]()
    model = nn.Sequential(layer)
    images = torch.randn(2, 6, 9, 7, requires_grad=True)
    outputs: dict[tuple[str, ...], list[Tensor]] = {}
    for names in ((), ("0",)):
        use_products(model, names)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = model(images)
        layer.weight.requires_grad_(False)
        frozen = model(images)
        layer.weight.requires_grad_(True)
        outputs[names] = [narrow, frozen]
        assert [type(each.grad_fn).__name__ for each in outputs[names]] == ["ConvolutionBackward0"] * 2
        with torch.no_grad():
            outputs[names].append(model(images))
    assert all(map(torch.equal, *outputs.values()))


def test_only_depthwise_layers_of_known_classes_change_and_only_those_that_are_named() -> None:
    class Own(nn.Conv2d):
        pass

    model = nn.ModuleDict(
        {
            "dense": nn.Conv2d(4, 4, 3),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "widening": nn.Conv2d(4, 8, 3, groups=4),
            "one": nn.Conv2d(1, 1, 3),
            "mirrored": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4),
            "same": nn.Conv2d(4, 4, 3, padding="same", groups=4),
            "own": Own(4, 4, 3, groups=4),
            "a": nn.Conv2d(4, 4, 3, groups=4),
            "b": Conv2dSame(4, 4, 3, groups=4),
        }
    )
    before = {name: type(module) for name, module in model.items()}
    assert list(depthwise_layers(model)) == ["a", "b"]
    use_products(model, ["b", "dense"])
    assert {name: type(module) for name, module in model.items()} == before | {"b": ProductConv2dSame}
    copied = copy.deepcopy(model)
    assert copied["b"].weight is not model["b"].weight and type(copied["b"]) is ProductConv2dSame
    assert model.state_dict().keys() == copied.state_dict().keys()
    use_products(model, [])
    assert {name: type(module) for name, module in model.items()} == before


def test_a_prefix_is_found_and_replayed_as_with_torchs_own() -> None:
    torch.manual_seed(0)
    trunk = timm.create_model("test_efficientnet", num_classes=0).eval()
    frozen = ("conv_stem", "bn1", "blocks.0", "blocks.1")
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))

    def read(images: Tensor) -> Features:
        return Features([], trunk(images))

    images = torch.rand(4, 3, 64, 64)
    found = {}
    for own in (False, True):
        use_products(trunk, depthwise_layers(trunk) if own else ())
        prefix = Prefix.record(trunk, read, images)
        pooled = prefix.replay(prefix.compute(images)).pooled
        assert pooled is not None
        found[own] = (prefix.modules, prefix.readers if hasattr(prefix, "readers") else (), pooled.detach())
    assert found[True][0] == found[False][0] != ()
    assert torch.equal(found[True][2], found[False][2])
