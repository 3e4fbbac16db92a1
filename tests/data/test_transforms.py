"""The built-in transforms on small maps, and what holds for every pipeline."""

from __future__ import annotations

import json
import math
import pickle
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torchvision import tv_tensors
from torchvision.transforms import v2

from mtl.config.transform import TransformsConfig
from mtl.data import DataError
from mtl.data.transforms import Pipeline, build_transforms
from mtl.tasks.base import LabelKind

KINDS: Mapping[str, LabelKind] = {
    "mask": "mask",
    "depth": "depth",
    "normals": "normals",
    "points": "points",
    "class": "class",
    "tags": "tags",
    "age": "numbers",
}
FLIP = {"name": "flip", "options": {"p": 1.0}}
ALL: list[Any] = [
    "flip",
    "scale",
    {"name": "rotation", "options": {"degrees": 30.0}},
    {"name": "colour", "options": {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1}},
    "random_resized_crop",
]


def pipeline(entries: Sequence[Any], size: tuple[int, int]) -> Pipeline:
    return build_transforms(TransformsConfig.model_validate({"train": entries}).train, size, "data.transform.train")


def sample(height: int = 20, width: int = 24, seed: int = 0, channels: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=draw)
    normals = functional.normalize(torch.randn(3, height, width, generator=draw), dim=0)
    normals[:, :2, :3] = 0
    return image, {
        "mask": torch.randint(0, 13, (height, width), generator=draw),
        "depth": torch.rand(1, height, width, generator=draw) + 1,
        "normals": normals,
        "points": torch.tensor([[0.15, 0.2, 1], [0.85, 0.5, 2], [0.2, 0.2, 0]]) * torch.tensor([width, height, 1]),
        "class": torch.tensor(3),
        "tags": torch.tensor([1.0, float("nan"), 0.0]),
        "age": torch.tensor(31.5),
    }


def same(a: tuple[Tensor, Mapping[str, Tensor]], b: tuple[Tensor, Mapping[str, Tensor]]) -> bool:
    """Whether two samples have the same bits."""
    first, second = {"image": a[0], **a[1]}, {"image": b[0], **b[1]}
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and value.numpy().tobytes() == second[name].numpy().tobytes()
        for name, value in first.items()
    )


# Hand tables


def test_a_flip_by_hand() -> None:
    image = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    labels = {
        "mask": torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 8, 7], [255, 5, 4, 3]]),
        "depth": torch.tensor([[[1.0, 2, 3, 4], [5, 6, 7, 8], [0, 1, 0, 2], [0.5, float("nan"), 1, 1]]]),
        "normals": torch.zeros(3, 4, 4),
        "points": torch.tensor([[0.5, 0.5, 1], [3.0, 2.0, 2.0], [1.0, 1.0, 0.0]]),
    }
    labels["normals"][:, 0, 0] = torch.tensor([0.6, 0.0, -0.8])
    labels["normals"][:, 3, 2] = torch.tensor([-0.48, 0.6, 0.64])
    flipped, found = pipeline([FLIP], (4, 4))(image, labels, KINDS, 0)
    assert flipped.tolist() == [[[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8], [15, 14, 13, 12]]]
    assert found["mask"].tolist() == [[3, 2, 1, 0], [7, 6, 5, 4], [7, 8, 9, 8], [3, 4, 5, 255]]
    assert found["depth"].nan_to_num(-1).tolist() == [[[4, 3, 2, 1], [8, 7, 6, 5], [2, 0, 1, 0], [1, 1, -1, 0.5]]]
    expected = torch.zeros(3, 4, 4)
    expected[:, 0, 3] = torch.tensor([-0.6, 0.0, -0.8])
    expected[:, 3, 1] = torch.tensor([0.48, 0.6, 0.64])
    assert torch.equal(found["normals"], expected)
    assert found["points"].tolist() == [[3.5, 0.5, 1], [1, 2, 2], [3, 1, 0]]


def test_a_flip_swaps_left_and_right_points_with_their_visibility() -> None:
    points = torch.tensor([[1.0, 1, 1], [3, 1, 2], [2, 3, 1], [0.5, 2, 0]])
    flip = {"name": "flip", "options": {"p": 1.0, "pairs": [[0, 1], [3, 2]]}}
    _, found = pipeline([flip], (4, 4))(torch.zeros(1, 4, 4), {"points": points}, KINDS, 0)
    assert found["points"].tolist() == [[1, 1, 2], [3, 1, 1], [3.5, 2, 0], [2, 3, 1]]


def test_a_quarter_turn_by_hand() -> None:
    """Counter-clockwise: what was at the right is at the top."""
    turn = {"name": "torchvision.transforms.v2:RandomRotation", "options": {"degrees": [90, 90]}}
    labels = {
        "mask": torch.tensor([[1, 2], [3, 4]]),
        "normals": torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 2, 2),
        "points": torch.tensor([[2.0, 1.0, 1.0]]),
    }
    _, found = pipeline([turn], (2, 2))(torch.zeros(1, 2, 2), labels, KINDS, 0)
    assert found["mask"].tolist() == [[2, 4], [1, 3]]
    assert torch.allclose(found["normals"], torch.tensor([0.0, 1, 0]).view(3, 1, 1).expand(3, 2, 2), atol=1e-6)
    # On the right edge it was outside, so it is not visible; it is now at the top edge.
    assert torch.allclose(found["points"], torch.tensor([[1.0, 0.0, 0.0]]), atol=1e-6)


def test_what_a_rotation_brings_in_from_outside_is_no_label() -> None:
    image = torch.full((1, 9, 9), 200, dtype=torch.uint8)
    labels = {
        "mask": torch.full((9, 9), 4),
        "depth": torch.full((1, 9, 9), 2.0),
        "normals": torch.tensor([0.0, 0, -1]).view(3, 1, 1).repeat(1, 9, 9),
        "points": torch.tensor([[0.2, 0.2, 1], [4.5, 4.5, 1]]),
    }
    turn = {"name": "rotation", "options": {"degrees": 45.0, "ignore": -1}}
    turned, found = pipeline([turn], (9, 9))(image, labels, KINDS, 2)
    outside = found["mask"] == -1
    assert 4 < outside.sum() < 40
    assert (found["mask"][~outside] == 4).all()
    assert torch.equal(found["depth"][0] == 0, outside)
    assert torch.equal((found["normals"] == 0).all(dim=0), outside)
    assert found["points"][:, 2].tolist() == [0, 1]
    assert turned[0, 0, 0] == 0
    assert turned[0, 4, 4] == 200


def test_a_mask_of_8_bits_is_filled_with_255_and_one_that_cannot_hold_it_is_refused() -> None:
    turn = pipeline([{"name": "rotation", "options": {"degrees": 45.0}}], (9, 9))
    image, mask = torch.zeros(3, 9, 9, dtype=torch.uint8), torch.ones(9, 9)
    _, found = turn(image, {"mask": mask.byte()}, KINDS, 2)
    assert found["mask"].unique().tolist() == [1, 255]
    with pytest.raises(DataError, match=r"^data\.transform\.train\.0: 255, the class of pixels from outside"):
        turn(image, {"mask": mask.to(torch.int8)}, KINDS, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_depth_is_divided_by_the_factor_in_its_own_type(dtype: torch.dtype) -> None:
    scale = pipeline([{"name": "scale", "options": {"factors": [1.25]}}], (8, 8))
    labels = {"depth": torch.full((1, 8, 8), 2.5, dtype=dtype)}
    labels["depth"][:, :, 4:] = 0
    _, found = scale(torch.zeros(3, 8, 8), labels, KINDS, 0)
    assert found["depth"].dtype == dtype
    assert found["depth"].unique().tolist() == [0, 2]


def test_each_factor_is_drawn_and_1_leaves_everything() -> None:
    scale = pipeline(["scale"], (20, 24))
    image, labels = sample()
    results = [scale(image, labels, KINDS, seed) for seed in range(40)]
    depth = labels["depth"]
    factors = [each for each in (1.0, 1.2, 1.5) for _, found in results if _is_divided(depth, found["depth"], each)]
    assert len(factors) == 40
    assert all(factors.count(factor) >= 5 for factor in (1.0, 1.2, 1.5))
    assert sum(same(result, (image, labels)) for result in results) == factors.count(1.0)


def _is_divided(before: Tensor, after: Tensor, factor: float) -> bool:
    return bool(torch.isin(after, before / factor).all())


def test_a_resize_takes_the_value_at_each_centre() -> None:
    mask = torch.arange(6).expand(3, 6).contiguous()
    _, found = pipeline([], (1, 2))(torch.zeros(1, 3, 6), {"mask": mask}, KINDS, None)
    assert found["mask"].tolist() == [[1, 4]]
    _, found = pipeline(["resize"], (3, 9))(torch.zeros(1, 3, 6), {"mask": mask}, KINDS, None)
    assert found["mask"][0].tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float32])
@pytest.mark.parametrize("entry", [None, FLIP, "scale", "random_resized_crop"])
def test_a_mask_of_any_type_keeps_its_type_and_its_exact_numbers(dtype: torch.dtype, entry: Any) -> None:
    most = 2**60 + 1 if dtype == torch.int64 else 1
    mask = torch.full((10, 10), most, dtype=dtype)
    _, found = pipeline([entry] if entry else [], (7, 5))(torch.zeros(3, 10, 10), {"mask": mask}, KINDS, 1)
    assert torch.equal(found["mask"], torch.full((7, 5), most, dtype=dtype))


# Images


def test_an_image_that_needs_no_change_passes_through_untouched() -> None:
    image, labels = sample()
    result, found = pipeline([], (20, 24))(image, labels, KINDS, None)
    assert result is image
    assert all(found[name] is label for name, label in labels.items())


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_any_image_keeps_its_type_and_gets_the_size(channels: int, dtype: torch.dtype) -> None:
    image, labels = sample(channels=channels)
    entries = [each for each in ALL if channels in (1, 3) or not isinstance(each, dict) or each["name"] != "colour"]
    for order in (entries, entries[::-1], []):
        result, found = pipeline(order, (10, 8))(image.to(dtype), labels, KINDS, 5)
        assert result.dtype == dtype
        assert result.shape == (channels, 10, 8)
        assert 0 <= result.min() <= result.max() <= 255
        assert found["mask"].shape == (10, 8)
        assert found["depth"].shape == (1, 10, 8)
        assert found["normals"].shape == (3, 10, 8)
        assert found["points"].shape == (3, 3)
        assert all(type(value) is Tensor for value in [result, *found.values()])


def test_colours_of_an_image_with_two_channels_are_refused() -> None:
    image, labels = sample(channels=2)
    expected = r"^data\.transform\.train\.1: `colour` changes images of 1 or 3 channels, got one of 2"
    with pytest.raises(DataError, match=expected):
        pipeline(["flip", ALL[3]], (20, 24))(image, labels, KINDS, 0)


def test_colours_are_those_of_torchvision_and_the_same_for_bytes_and_floats() -> None:
    image, labels = sample()
    only = {"name": "colour", "options": {"brightness": 0.4}}
    result, found = pipeline([only], (20, 24))(image, labels, KINDS, 7)
    known = (result > 0) & (result < 255)
    factor = float((result[known].double() * image[known]).sum() / image[known].double().square().sum())
    assert 0.6 <= factor <= 1.4 and abs(factor - 1) > 0.02
    assert (v2.functional.adjust_brightness(image, factor).int() - result).abs().max() <= 1
    floats, _ = pipeline([only], (20, 24))(image.float(), labels, KINDS, 7)
    assert (floats - result).abs().max() <= 1
    assert same((image, found), (image, labels))


def test_an_image_is_resized_as_torchvision_does() -> None:
    image, _ = sample(178, 218)
    result, _ = pipeline([], (64, 64))(image, {}, KINDS, None)
    assert torch.equal(result, v2.Resize([64, 64])(tv_tensors.Image(image)).as_subclass(Tensor))


def test_the_parts_of_a_random_resized_crop_have_the_area_and_the_shape_that_are_asked_for() -> None:
    crop = pipeline([{"name": "random_resized_crop", "options": {"scale": [0.2, 0.5], "ratio": [0.5, 1.0]}}], (16, 16))
    corners = torch.tensor([[0, 0, 1], [100, 0, 1], [0, 100, 1]]).double()
    for seed in range(200):
        _, found = crop(torch.zeros(3, 100, 100), {"points": corners}, KINDS, seed)
        points = found["points"]
        wide, tall = (1600 / float(points[place, axis] - points[0, axis]) for place, axis in ((1, 0), (2, 1)))
        assert 0.18 < wide * tall / 1e4 < 0.52
        assert 0.48 < wide / tall < 1.03
        left, top = -float(points[0, 0]) * wide / 16, -float(points[0, 1]) * tall / 16
        assert -1e-4 <= left <= 100 - wide + 1e-4
        assert -1e-4 <= top <= 100 - tall + 1e-4


# What holds for every list, sample and seed


LISTS = st.lists(st.sampled_from([*ALL, "resize"]), max_size=4)
SIZES = st.tuples(st.integers(8, 30), st.integers(8, 30))


@settings(max_examples=60)
@given(LISTS, SIZES, SIZES, st.integers(0, 2**63))
def test_labels_only_ever_hold_what_they_may(
    entries: list[Any], before: tuple[int, int], after: tuple[int, int], seed: int
) -> None:
    image, labels = sample(*before, seed % 1000)
    _, found = pipeline(entries, after)(image, labels, KINDS, seed)
    assert set(found["mask"].flatten().tolist()) <= {*labels["mask"].flatten().tolist(), 255}
    length = found["normals"].norm(dim=0)
    assert bool(((length == 0) | ((length - 1).abs() < 1e-5)).all())
    assert bool(((found["depth"] >= 0) & (found["depth"] <= 2)).all())
    if not any("rotation" in str(entry) for entry in entries):
        assert bool((found["depth"] > 0).all())
        assert 255 not in found["mask"]
    x, y, visible = found["points"].unbind(1)
    inside = (x >= 0) & (x < after[1]) & (y >= 0) & (y < after[0])
    assert not bool((visible[~inside] > 0).any())
    for name in ("class", "tags", "age"):
        assert found[name] is labels[name] or same((image, {"": found[name]}), (image, {"": labels[name]}))


@settings(max_examples=30)
@given(LISTS, st.integers(0, 2**63))
def test_the_result_depends_on_image_labels_and_seed_alone(entries: list[Any], seed: int) -> None:
    image, labels = sample()
    kept = (image.clone(), {name: label.clone() for name, label in labels.items()})
    first = pipeline(entries, (16, 12))(image, labels, KINDS, seed)
    torch.rand(3), np.random.rand(2), random.random()
    again = pipeline(entries, (16, 12))
    again(image, labels, KINDS, 1)
    assert same(again(image, labels, KINDS, seed), first)
    assert same((image, labels), kept)


def test_a_worker_that_receives_a_pipeline_makes_the_same_of_a_sample() -> None:
    made = pipeline([*ALL, {"name": "torchvision.transforms.v2:GaussianBlur", "options": {"kernel_size": 3}}], (16, 12))
    image, labels = sample()
    assert same(pickle.loads(pickle.dumps(made))(image, labels, KINDS, 4), made(image, labels, KINDS, 4))


def random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@pytest.mark.parametrize("entry", [*ALL, "torchvision.transforms.v2:AutoAugment"])
def test_random_states_of_the_process_stay_as_they_are(entry: Any) -> None:
    before = random_states()
    for seed in range(5):
        pipeline([entry], (12, 12))(*sample()[:1], {}, KINDS, seed)
    assert random_states() == before


def test_other_seeds_are_other_results() -> None:
    image, labels = sample()
    for entry in ALL[1:]:
        results = [pipeline([entry], (16, 16))(image, labels, KINDS, seed)[0] for seed in range(8)]
        assert len({result.numpy().tobytes() for result in results}) > (2 if entry == "scale" else 7), entry


def test_every_bit_of_a_seed_counts() -> None:
    image, labels = sample()
    crop = pipeline(["random_resized_crop"], (16, 16))
    seeds = [0, *(2**bit for bit in range(0, 70, 3)), -1]
    assert len({crop(image, labels, KINDS, seed)[0].numpy().tobytes() for seed in seeds}) == len(seeds)


def test_half_of_the_images_are_flipped() -> None:
    image, _ = sample()
    flip = pipeline(["flip"], (20, 24))
    flipped = sum(not torch.equal(flip(image, {}, KINDS, seed)[0], image) for seed in range(400))
    assert abs(flipped - 200) < 4 * math.sqrt(400 / 4)
    never = pipeline([{"name": "flip", "options": {"p": 0.0}}], (20, 24))
    assert all(torch.equal(never(image, {}, KINDS, seed)[0], image) for seed in range(20))


@pytest.mark.parametrize(
    ("entries", "is_random"),
    [
        ([], False),
        (["resize"], False),
        ([FLIP], False),
        ([{"name": "flip", "options": {"p": 0.0}}], False),
        *[([entry], True) for entry in ALL],
        (["torchvision.transforms.v2:RandomGrayscale"], True),
        ([{"name": "torchvision.transforms.v2:CenterCrop", "options": {"size": 8}}], False),
    ],
)
def test_whether_a_pipeline_draws_is_known(entries: list[Any], is_random: bool) -> None:
    made = pipeline(entries, (16, 12))
    assert made.is_random is is_random
    image, labels = sample()
    if is_random:
        with pytest.raises(ValueError, match=r"data\.transform\.train draws at random and needs a seed"):
            made(image, labels, KINDS, None)
    else:
        first = made(image, labels, KINDS, None)
        assert all(same(made(image, labels, KINDS, seed), first) for seed in range(4))


def test_a_description_says_all_that_changes_results() -> None:
    lists: list[list[Any]] = [[], ["flip"], [FLIP], ["flip", FLIP]]
    descriptions = [pipeline(entries, size).describe() for entries in lists for size in ((8, 8), (8, 9))]
    texts = [json.dumps(each, sort_keys=True) for each in descriptions]
    assert len(set(texts)) == len(texts)
    assert pipeline(["flip"], (8, 8)).describe() in descriptions


# Mistakes


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        ("mask", torch.zeros(20, 23), r"mask: expected mask of shape \(20, 24\), since the image has it, got \(20,"),
        ("depth", torch.zeros(20, 24), r"depth: expected depth of shape \(1, 20, 24\)"),
        ("normals", torch.zeros(1, 20, 24), r"normals: expected normals of shape \(3, 20, 24\)"),
        ("points", torch.zeros(3, 2), r"points: expected points of shape \(k, 3\), got \(3, 2\)"),
    ],
)
def test_a_label_that_does_not_fit_the_image_is_named(name: str, label: Tensor, message: str) -> None:
    image, _ = sample()
    with pytest.raises(DataError, match=f"^{message}"):
        pipeline([], (20, 24))(image, {name: label}, KINDS, None)


def test_a_pair_of_points_that_are_not_there_is_named() -> None:
    flip = {"name": "flip", "options": {"p": 1.0, "pairs": [[0, 3]]}}
    image, labels = sample()
    with pytest.raises(DataError, match=r"^data\.transform\.train\.0: pairs: expected points 0 to 2, got 3"):
        pipeline([flip], (20, 24))(image, labels, KINDS, 0)
