"""Eval mode for a while: every module gets its mode back, and frozen parts are not walked through."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mtl.freeze import enforce, plan_freeze
from mtl.model.trunk import in_eval_mode


class Noting(nn.Sequential):
    """Overrides `train`, as models do that keep something in eval mode."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.calls: list[bool] = []

    def train(self, mode: bool = True) -> Noting:
        self.calls.append(mode)
        super().train(mode)
        return self


def trees() -> st.SearchStrategy[nn.Module]:
    leaves = st.builds(nn.Dropout)
    return st.recursive(leaves, lambda parts: st.lists(parts, max_size=3).flatmap(_wrapped), max_leaves=8)


def _wrapped(parts: list[nn.Module]) -> st.SearchStrategy[nn.Module]:
    return st.sampled_from([nn.Sequential, Noting]).map(lambda kind: kind(*parts))


@given(trees(), st.data())
def test_all_is_in_eval_mode_inside_and_as_it_was_afterwards(tree: nn.Module, data: st.DataObject) -> None:
    for part in tree.modules():
        part.training = data.draw(st.booleans())
        if isinstance(part, Noting):
            part.calls.clear()
    before = [part.training for part in tree.modules()]
    with in_eval_mode(tree):
        assert not any(part.training for part in tree.modules())
    assert [part.training for part in tree.modules()] == before
    for part in tree.modules():
        # A parent that overrides `train` calls its children's as well.
        if isinstance(part, Noting) and (part.training or part is tree):
            assert part.calls[0] is False and part.calls[-1] is True


def test_a_frozen_part_is_not_walked_through() -> None:
    model = nn.ModuleDict({"trunk": Noting(nn.Linear(2, 2)), "head": Noting(nn.Linear(2, 2))})
    enforce(model, plan_freeze(model, ["trunk"]))
    trunk, head = model["trunk"], model["head"]
    assert isinstance(trunk, Noting) and isinstance(head, Noting)
    trunk.calls.clear()
    head.calls.clear()
    with in_eval_mode(model):
        assert not any(part.training for part in model.modules())
    assert trunk.calls == [] and head.calls == [False, True]
    assert not trunk.training and head.training
