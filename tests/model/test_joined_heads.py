"""Linear heads as one product: the outputs and gradients of each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mtl.config import ConfigError, load_config
from mtl.model.heads.joined import joinable, joined_outputs
from mtl.model.heads.linear import LinearHead
from mtl.model.trunk import Features, FeatureShape
from mtl.phases.setup import build_meta_setup
from runs import small_parts, tiny_config

WIDTH = 7


def heads_of(sizes: Sequence[int]) -> nn.ModuleDict:
    shape = FeatureShape([], WIDTH)
    heads = {f"task{number}": LinearHead(shape, size) for number, size in enumerate(sizes)}
    for parameter in nn.ModuleDict(heads).parameters():
        nn.init.normal_(parameter)
    return nn.ModuleDict(heads).double()


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=6), num=st.integers(1, 4), seed=st.integers(0, 99))
def test_outputs_and_gradients_are_those_of_each_head(sizes: list[int], num: int, seed: int) -> None:
    torch.manual_seed(seed)
    heads = heads_of(sizes)
    pooled = torch.randn(num, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = {name: torch.randn(num, head.out.out_features, dtype=torch.float64) for name, head in heads.items()}
    leaves = [pooled, *heads.parameters()]

    def gradients(outputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(torch.stack([(outputs[n] * weights[n]).sum() for n in heads]).sum(), leaves)

    alone = {name: head(Features([], pooled), (1, 1)) for name, head in heads.items()}
    joined = joined_outputs(dict(heads.items()), pooled)
    assert list(joined) == list(alone)
    for name, output in alone.items():
        torch.testing.assert_close(joined[name], output, rtol=0, atol=1e-12)
    for got, expected in zip(gradients(joined), gradients(alone), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_only_plain_linear_heads_are_joined() -> None:
    class Own(LinearHead):
        pass

    heads = heads_of([2, 3, 4])
    heads["own"] = Own(FeatureShape([], WIDTH), 2)
    heads["task1"].out = nn.utils.parametrizations.weight_norm(heads["task1"].out)
    assert joinable(dict(heads.items())) == ["task0", "task2"]


CLASSES = {"type": "classification", "num_classes": 10, "label": "object", "head": {"name": "linear"}}


def test_other_heads_are_run_next_to_them_and_one_alone_by_itself(tmp_path: Path) -> None:
    tasks = {"a": CLASSES, "b": CLASSES, "depth": {"type": "depth"}}
    setup = small_parts(tmp_path, "join_heads=true", tasks=tasks, phases=[{"name": "a", "steps": 1}])
    model, batch = setup.model, setup.train.batch(torch.arange(3))
    features = model.encode(batch.images)
    for names in (["a", "b", "depth"], ["b", "a"], ["a"], ["a", "depth"]):
        joined = model.decode_joined(features, batch.size, names)
        alone = model.decode(features, batch.size, names)
        assert joined.keys() == alone.keys() == set(names)
        for name in names:
            torch.testing.assert_close(joined[name], alone[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tasks", "there"),
    [
        ({"a": CLASSES, "depth": {"type": "depth"}}, "only that of 'a' is one"),
        ({"depth": {"type": "depth"}}, "there is none"),
    ],
)
def test_fewer_than_two_linear_heads_are_refused(tasks: dict[str, object], there: str, tmp_path: Path) -> None:
    config = load_config(tiny_config(tmp_path, tasks=tasks, join_heads=True))
    with pytest.raises(ConfigError, match=f"join_heads: expected at least two `linear` heads.*; {there}"):
        build_meta_setup(config)
