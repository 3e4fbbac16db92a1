"""One way into a phase's freeze."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import mtl
from mtl.freeze import plan_freeze
from mtl.phases.enter import entered


def small() -> nn.Module:
    return nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "head": nn.Linear(3, 1)})


@pytest.mark.parametrize("fails", [False, True])
def test_a_block_has_the_freeze_and_leaves_no_gradient(fails: bool) -> None:
    model = small()
    model["head"].weight.grad = torch.ones(1, 3)
    images = torch.randn(4, 3)
    try:
        with entered(model, plan_freeze(model, ["trunk"])):
            assert model["head"].weight.grad is None
            assert not model["trunk"][1].training
            model["head"](model["trunk"](images)).sum().backward()
            assert model["head"].weight.grad is not None
            assert model["trunk"][0].weight.grad is None
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert all(parameter.grad is None for parameter in model.parameters())
    # Until another phase is entered.
    assert not model.train()["trunk"][1].training
    with entered(model, plan_freeze(model, ["head"])):
        assert model["trunk"][1].training


def test_nothing_else_in_the_package_enforces_a_freeze() -> None:
    folder = Path(mtl.__file__).parent
    callers = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "enforce"
    }
    assert callers == {"phases/enter.py"}
