"""The order of images of several data sets: exact shares, whole passes, pure functions of seed and epoch."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mtl.config.mixed import MixConfig
from mtl.data.orders import Mixed, Shuffled
from mtl.data.samplers import training_shares

NAMES = ("a", "b", "c", "d")


def order_of(sizes: list[int], **mix: Any) -> Mixed:
    named = dict(zip(NAMES, sizes, strict=False))
    starts = {name: sum(sizes[:place]) for place, name in enumerate(named)}
    return Mixed(named, starts, MixConfig.model_validate(mix), 1)


def counts_of(order: Mixed, batch: torch.Tensor) -> list[int]:
    return [
        int(((batch >= order.starts[n]) & (batch < order.starts[n] + size)).sum()) for n, size in order.sizes.items()
    ]


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)
by = st.sampled_from(["proportional", "uniform", "temperature", "round_robin", "weights"])


@st.composite
def orders(draw: st.DrawFn) -> Mixed:
    own, word = draw(sizes), draw(by)
    mix: dict[str, Any] = {"by": word, "epoch": draw(st.sampled_from(["longest", "shortest", "sum", "steps"]))}
    if word == "temperature":
        mix["temperature"] = draw(st.floats(1, 8))
    if word == "weights":
        mix["weights"] = {
            name: draw(st.sampled_from([0.1, 1.0, 2.5, 7.0])) for name, _ in zip(NAMES, own, strict=False)
        }
    if word != "round_robin":
        mix["batches"] = draw(st.sampled_from(["mixed", "single"]))
    if mix["epoch"] == "steps":
        mix["steps"] = draw(st.integers(1, 12))
    return order_of(own, **mix)


@given(orders(), st.integers(1, 17), st.integers(0, 99), st.integers(0, 5))
def test_batches_are_full_and_of_the_asked_shares(order: Mixed, size: int, seed: int, epoch: int) -> None:
    batches = order.batches(size, seed, epoch)
    assert len(batches) == order.num_batches(size) and {len(batch) for batch in batches} == {size}
    shares = list(order.mix.shares(order.sizes).values())
    assert sum(shares) == 1
    drawn = [0] * len(shares)
    for number, batch in enumerate(batches, 1):
        counts = counts_of(order, batch)
        drawn = [before + count for before, count in zip(drawn, counts, strict=True)]
        assert sum(counts) == size
        if order.mix.is_single:
            assert sorted(counts) == [0] * (len(counts) - 1) + [size]
        else:
            assert all(abs(count - share * size * number) < 2 for count, share in zip(drawn, shares, strict=True))
    unit = size if order.mix.is_single else 1
    total = len(batches) * size
    assert all(abs(count - share * total) < 2 * unit for count, share in zip(drawn, shares, strict=True))


@given(orders(), st.integers(1, 17), st.integers(0, 99))
def test_every_image_of_a_set_is_drawn_as_often_as_every_other(order: Mixed, size: int, seed: int) -> None:
    drawn = Counter[int]()
    for epoch in range(4):
        for batch in order.batches(size, seed, epoch):
            drawn.update(batch.tolist())
        for name, number in order.sizes.items():
            times = [drawn[order.starts[name] + place] for place in range(number)]
            assert max(times) - min(times) <= 1
    assert set(drawn) <= set(range(order.num_images))


@given(orders(), st.integers(1, 17), st.integers(0, 99), st.integers(0, 9))
def test_the_order_is_a_function_of_seed_and_epoch(order: Mixed, size: int, seed: int, epoch: int) -> None:
    one, other = order.batches(size, seed, epoch), order.batches(size, seed, epoch)
    assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))
    skip = len(one) // 2
    rest = training_shares(order, size, seed, epoch, skip)
    assert all(torch.equal(left, right[0]) for left, right in zip(one[skip:], rest, strict=True))


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ({"by": "proportional"}, 18),  # 180 images
        ({"by": "proportional", "epoch": "shortest"}, 18),
        ({"by": "uniform"}, 30),  # the 100 of a are through once after 300
        ({"by": "uniform", "epoch": "shortest"}, 6),  # the 20 of c after 60
        ({"by": "uniform", "epoch": "sum"}, 18),
        ({"by": "round_robin"}, 30),
        ({"by": "weights", "weights": {"a": 1, "b": 1, "c": 2}}, 40),  # a has a quarter
        ({"by": "weights", "weights": {"a": 0.1, "b": 0.2, "c": 0.7}}, 100),
        ({"by": "weights", "weights": {"a": 0.1, "b": 0.2, "c": 0.7}, "epoch": "shortest"}, 2),  # 20 / 0.7 = 28.6
        ({"by": "uniform", "epoch": "steps", "steps": 7}, 7),
    ],
)
def test_the_length_of_an_epoch(mix: dict[str, Any], expected: int) -> None:
    assert order_of([100, 60, 20], **mix).num_batches(10) == expected


def test_shares_are_exact() -> None:
    sizes = {"a": 900, "b": 100}
    assert MixConfig(by="proportional").shares(sizes) == {"a": Fraction(9, 10), "b": Fraction(1, 10)}
    assert MixConfig(by="weights", weights={"a": 0.1, "b": 0.2}).shares(sizes) == {
        "a": Fraction(1, 3),
        "b": Fraction(2, 3),
    }
    by_temperature = MixConfig(by="temperature", temperature=2).shares(sizes)
    assert [float(share) for share in by_temperature.values()] == pytest.approx([30 / 40, 10 / 40])
    assert MixConfig(by="temperature", temperature=1).shares(sizes)["a"] == Fraction(9, 10)


def test_round_robin_takes_turns_and_single_batches_are_shuffled() -> None:
    turns = order_of([30, 20], by="round_robin")
    assert [counts_of(turns, batch)[0] for batch in turns.batches(5, 0, 3)] == [5, 0] * 6
    single = order_of([30, 20], by="uniform", batches="single")
    seen = [[counts_of(single, batch)[0] for batch in single.batches(5, 0, epoch)] for epoch in range(2)]
    assert sorted(seen[0]) == sorted(seen[1]) == [0] * 6 + [5] * 6 and seen[0] != seen[1]


def test_one_data_set_is_shuffled_without_the_last_batch() -> None:
    batches = Shuffled(23).batches(5, 1, 2)
    assert [len(batch) for batch in batches] == [5] * 4 and len(set(torch.cat(list(batches)).tolist())) == 20
    assert [len(batch) for batch in Shuffled(3).batches(5, 1, 2)] == [3]


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"by": "temperature"}, "Input should have temperature, which by: temperature needs"),
        ({"by": "uniform", "temperature": 2}, "Input should have temperature only with by: temperature"),
        ({"by": "weights"}, "Input should have weights, which by: weights needs"),
        ({"epoch": "steps"}, "Input should have steps, which epoch: steps needs"),
        ({"steps": 3}, "Input should have steps only with epoch: steps"),
        ({"by": "round_robin", "batches": "mixed"}, "Input should have batches: single, if any, with round_robin"),
    ],
)
def test_what_does_not_go_together_is_refused(mix: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MixConfig.model_validate(mix)
