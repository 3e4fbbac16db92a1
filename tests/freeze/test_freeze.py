"""Freezing: the plan as tables written out by hand, what enforcing it does, and the same training done without it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.optim import SGD, AdamW, Optimizer

from mtl.freeze import FreezeError, enforce, is_frozen, plan_freeze, trainable_parameters, untrainable_parameters
from mtl.patterns import PatternError


def bits(tensor: Tensor) -> bytes:
    """A tensor's bytes: -0.0 differs from 0.0, NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(module: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in module.state_dict().items()}


class Tiny(nn.Module):
    """Three parameters: trunk.weight, trunk.bias, head.weight."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(1, 1)
        self.head = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


class Normed(nn.Module):
    """A trunk of Linear, BatchNorm and Dropout; a head of Dropout, Linear and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


class Owner(nn.Module):
    """A buffer of its own, and a child: held for the buffer's sake, while the child trains."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.child = nn.Linear(1, 1)


def saved(model: nn.Module) -> nn.Module:
    """A model as it comes back from a file that torch has written."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
TRUNK_STATISTICS = tuple(f"trunk.1.{name}" for name in STATISTICS)
HEAD_STATISTICS = tuple(f"head.2.{name}" for name in STATISTICS)


def batches(num_steps: int, num_features: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        yield torch.randn(6, num_features, generator=generator)


def train(
    model: nn.Module, optimizer: Optimizer, num_steps: int = 5, forward: Callable[[Tensor], Tensor] | None = None
) -> None:
    for x in batches(num_steps, 3):
        optimizer.zero_grad()
        ((forward or model)(x) - 1).square().mean().backward()
        optimizer.step()


# --- the plan


@pytest.mark.parametrize(
    ("patterns", "frozen", "trainable", "held"),
    [
        ([], [], ["trunk.weight", "trunk.bias", "head.weight"], []),
        (["trunk"], ["trunk.weight", "trunk.bias"], ["head.weight"], ["trunk"]),
        (["head"], ["head.weight"], ["trunk.weight", "trunk.bias"], ["head"]),
        (["trunk.bias"], ["trunk.bias"], ["trunk.weight", "head.weight"], []),
        (["trunk", "!trunk.bias"], ["trunk.weight"], ["trunk.bias", "head.weight"], []),
        (["**.weight"], ["trunk.weight", "head.weight"], ["trunk.bias"], ["head"]),
        (["~k.w"], ["trunk.weight"], ["trunk.bias", "head.weight"], []),
        (["**"], ["trunk.weight", "trunk.bias", "head.weight"], [], ["", "trunk", "head"]),
        (["trunk", "head", "!head"], ["trunk.weight", "trunk.bias"], ["head.weight"], ["trunk"]),
    ],
)
def test_the_plan_of_three_parameters_is_this_table(
    patterns: list[str], frozen: list[str], trainable: list[str], held: list[str]
) -> None:
    plan = plan_freeze(Tiny(), patterns)
    assert plan.patterns == tuple(patterns)
    assert list(plan.names.frozen) == frozen
    assert list(plan.names.trainable) == trainable
    assert list(plan.held_in_eval) == held


@pytest.mark.parametrize(
    ("patterns", "frozen", "frozen_buffers", "held"),
    [
        ([], (), (), ()),
        (
            ["trunk"],
            ("trunk.0.weight", "trunk.1.weight", "trunk.1.bias"),
            TRUNK_STATISTICS,
            ("trunk", "trunk.0", "trunk.1", "trunk.2"),
        ),
        (
            ["head"],
            ("head.1.weight", "head.2.weight", "head.2.bias"),
            HEAD_STATISTICS,
            ("head", "head.0", "head.1", "head.2"),
        ),
        (["trunk.0"], ("trunk.0.weight",), (), ("trunk.0",)),
        (["trunk.1"], ("trunk.1.weight", "trunk.1.bias"), TRUNK_STATISTICS, ("trunk.1",)),
        (["trunk.1.weight"], ("trunk.1.weight",), (), ()),
        (["trunk.1.weight", "trunk.1.bias"], ("trunk.1.weight", "trunk.1.bias"), TRUNK_STATISTICS, ("trunk.1",)),
        (["~running", "~batches"], (), TRUNK_STATISTICS + HEAD_STATISTICS, ("trunk.1", "head.2")),
        (
            ["trunk", *[f"!{name}" for name in TRUNK_STATISTICS]],
            ("trunk.0.weight", "trunk.1.weight", "trunk.1.bias"),
            (),
            ("trunk.0",),
        ),
        (["trunk", "!trunk.1.weight"], ("trunk.0.weight", "trunk.1.bias"), TRUNK_STATISTICS, ("trunk.0", "trunk.1")),
    ],
)
def test_the_plan_with_buffers_is_this_table(
    patterns: list[str], frozen: tuple[str, ...], frozen_buffers: tuple[str, ...], held: tuple[str, ...]
) -> None:
    model = Normed()
    plan = plan_freeze(model, patterns)
    assert plan.names.frozen == frozen
    assert plan.names.frozen_buffers == frozen_buffers
    assert plan.held_in_eval == held
    assert {*plan.names.trainable} == {name for name, _ in model.named_parameters()} - {*frozen}
    assert {*plan.names.free_buffers} == {*TRUNK_STATISTICS, *HEAD_STATISTICS} - {*frozen_buffers}


def test_planning_does_not_touch_the_module() -> None:
    model = Normed()
    model.trunk.eval()
    before = all_bits(model)
    plan_freeze(model, ["head"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [model.trunk.training, model.head.training] == [False, True]
    assert all_bits(model) == before


def test_trainable_parameters_are_the_modules_own_tensors_each_once() -> None:
    model = Tiny()
    assert trainable_parameters(model, plan_freeze(model, ["trunk.weight"])) == {
        "trunk.bias": model.trunk.bias,
        "head.weight": model.head.weight,
    }
    model.head.weight = model.trunk.weight
    assert list(trainable_parameters(model, plan_freeze(model, []))) == ["trunk.weight", "trunk.bias"]


@pytest.mark.parametrize(
    ("patterns", "trunk", "head"),
    [([], False, False), (["trunk"], True, False), (["trunk.weight"], False, False), (["**"], True, True)],
)
def test_a_module_is_frozen_when_no_parameter_below_it_trains(patterns: list[str], trunk: bool, head: bool) -> None:
    plan = plan_freeze(Tiny(), patterns)
    assert (is_frozen(plan, "trunk"), is_frozen(plan, "head")) == (trunk, head)


def test_a_name_that_only_starts_alike_does_not_make_a_module_trainable() -> None:
    model = nn.ModuleDict({"trunk": nn.Linear(1, 1), "trunk2": nn.Linear(1, 1)})
    plan = plan_freeze(model, ["trunk"])
    assert plan.names.frozen == ("trunk.weight", "trunk.bias")
    assert is_frozen(plan, "trunk")
    assert not is_frozen(plan, "trunk2")


# --- what is refused


@pytest.mark.parametrize(
    ("patterns", "inside", "outside"),
    [
        (["trunk.weight"], "trunk.weight", "head.weight"),
        (["head"], "head.weight", "trunk.weight"),
        (["**", "!trunk"], "head.weight", "trunk.weight"),
    ],
)
def test_a_freeze_that_splits_tied_tensors_names_both(patterns: list[str], inside: str, outside: str) -> None:
    model = Tiny()
    model.head.weight = model.trunk.weight
    with pytest.raises(
        FreezeError, match=rf"^{inside} is frozen, but it is the same tensor as {outside}, which is not"
    ):
        plan_freeze(model, patterns)


def test_tied_tensors_may_be_frozen_by_both_names_or_by_none() -> None:
    model = Tiny()
    model.head.weight = model.trunk.weight
    assert plan_freeze(model, ["**.weight"]).names.frozen == ("trunk.weight", "head.weight")
    assert plan_freeze(model, ["trunk.bias"]).names.trainable == ("trunk.weight", "head.weight")


def test_a_freeze_that_splits_a_tied_buffer_names_both() -> None:
    model = nn.ModuleDict({"a": nn.BatchNorm1d(2), "b": nn.BatchNorm1d(2)})
    model["b"].running_mean = model["a"].running_mean
    with pytest.raises(FreezeError, match=r"^a\.running_mean is frozen, but it is the same tensor as b\.running_mean"):
        plan_freeze(model, ["a"])


def test_a_module_reached_by_two_paths_is_frozen_by_both_or_refused() -> None:
    shared = nn.Linear(1, 1)
    model = nn.ModuleDict({"a": shared, "b": shared})
    with pytest.raises(FreezeError, match=r"^a\.weight is frozen, but it is the same tensor as b\.weight"):
        plan_freeze(model, ["a"])
    plan = plan_freeze(model, ["a", "b"])
    assert plan.names.frozen == ("a.weight", "a.bias", "b.weight", "b.bias")
    enforce(model, plan)
    model.train()
    assert not shared.training


@pytest.mark.parametrize(
    ("patterns", "frozen", "free"),
    [
        (["trunk.1.running_mean"], "trunk.1.running_mean", "trunk.1.num_batches_tracked, trunk.1.running_var"),
        (["trunk", "!trunk.1.running_var"], "trunk.1.num_batches_tracked, trunk.1.running_mean", "trunk.1.running_var"),
    ],
)
def test_a_freeze_that_splits_the_statistics_of_a_norm_is_refused(patterns: list[str], frozen: str, free: str) -> None:
    with pytest.raises(FreezeError, match=f"^{frozen} frozen, but not {free}: a forward updates all statistics"):
        plan_freeze(Normed(), patterns)


def test_a_pattern_that_selects_nothing_is_refused_with_near_misses() -> None:
    with pytest.raises(PatternError, match=r"pattern 'trnk' matches nothing \(nearest: trunk"):
        plan_freeze(Tiny(), ["trnk"])


# --- enforcing it


def test_enforcing_sets_requires_grad_by_plan_in_both_directions() -> None:
    model = Tiny()
    model.head.requires_grad_(False)
    enforce(model, plan_freeze(model, ["trunk.weight"]))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == {
        "trunk.weight": False,
        "trunk.bias": True,
        "head.weight": True,
    }


def test_enforcing_leaves_no_gradient_anywhere() -> None:
    model = Tiny()
    model(torch.ones(2, 1)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    enforce(model, plan_freeze(model, ["trunk"]))
    assert [parameter.grad for parameter in model.parameters()] == [None, None, None]


@pytest.mark.parametrize(
    "call",
    [
        lambda _: None,
        lambda model: model.train(),
        lambda model: model.eval().train(),
        lambda model: model.trunk.train(),
        lambda model: model.trunk[1].train(),
        lambda model: [module.train() for module in model.modules()],
        lambda model: model.trunk.train(True).train(mode=True),
    ],
    ids=["none", "model", "eval and back", "sub", "child", "every module", "chained"],
)
def test_a_held_module_stays_in_eval_through_any_call_of_train(call: Callable[[Normed], object]) -> None:
    model = Normed()
    enforce(model, plan_freeze(model, ["trunk"]))
    call(model)
    assert [module.training for module in model.trunk.modules()] == [False] * 4
    assert [module.training for module in model.head.modules()] == [True] * 4
    assert model.training


def test_train_of_a_held_module_returns_it_and_still_reaches_children_that_are_not_held() -> None:
    model = nn.Sequential(Owner())
    enforce(model, plan_freeze(model, ["0.scale"]))
    assert not model[0].training
    assert model[0].child.training
    assert model[0].train(False) is model[0]
    assert not model[0].child.training
    model.train()
    assert not model[0].training
    assert model[0].child.training


def test_the_next_plan_releases_what_it_does_not_hold() -> None:
    model = Normed()
    enforce(model, plan_freeze(model, ["trunk"]))
    enforce(model, plan_freeze(model, ["head"]))
    assert [module.training for module in model.trunk.modules()] == [True] * 4
    assert [module.training for module in model.head.modules()] == [False] * 4
    model.eval()
    model.train()
    assert [module.training for module in model.trunk.modules()] == [True] * 4
    assert [module.training for module in model.head.modules()] == [False] * 4
    enforce(model, plan_freeze(model, []))
    model.head.eval()
    assert not any(module.training for module in model.head.modules())
    model.head.train()
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_everything_frozen_holds_the_whole_model() -> None:
    model = Normed()
    enforce(model, plan_freeze(model, ["**"]))
    model.train()
    assert not any(module.training for module in model.modules())
    before = all_bits(model)
    assert not model(torch.randn(6, 3)).requires_grad
    assert all_bits(model) == before


def test_dropout_rests_inside_a_frozen_part_and_works_elsewhere() -> None:
    model = nn.ModuleDict(
        {
            "frozen": nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Dropout(0.5))),
            "partly": nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)),
            "other": nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8)),
            "alone": nn.Dropout(0.5),
        }
    )
    enforce(model, plan_freeze(model, ["frozen", "partly.0.weight"]))
    model.train()
    ones = torch.ones(4, 8)
    assert torch.equal(model["frozen"][1](ones), ones)
    assert torch.equal(model["frozen"](ones), model["frozen"](ones))
    for dropout in (model["partly"][1], model["other"][0], model["alone"]):
        assert {*dropout(ones).unique().tolist()} == {0.0, 2.0}


def test_statistics_of_a_frozen_norm_do_not_move_over_real_steps_and_those_of_a_training_one_do() -> None:
    model = Normed()
    plan = plan_freeze(model, ["trunk"])
    enforce(model, plan)
    before = all_bits(model)
    train(model, SGD(trainable_parameters(model, plan).values(), lr=0.1))
    after = all_bits(model)
    moved = {name for name in after if after[name] != before[name]}
    assert moved == {"head.1.weight", "head.2.weight", "head.2.bias", *HEAD_STATISTICS}
    assert model.head[2].num_batches_tracked == 5


def test_statistics_taken_back_by_name_move_under_frozen_weights() -> None:
    model = Normed()
    plan = plan_freeze(model, ["**", *[f"!{name}" for name in TRUNK_STATISTICS]])
    enforce(model, plan)
    before = all_bits(model)
    model(torch.randn(6, 3) + 2)
    after = all_bits(model)
    assert {name for name in after if after[name] != before[name]} == {*TRUNK_STATISTICS}


def test_a_frozen_head_passes_gradient_to_a_training_trunk() -> None:
    model = Tiny()
    with torch.no_grad():
        model.trunk.weight.fill_(2.0)
        model.trunk.bias.fill_(1.0)
        model.head.weight.fill_(3.0)
    plan = plan_freeze(model, ["head"])
    enforce(model, plan)
    optimizer = SGD(trainable_parameters(model, plan).values(), lr=0.5)
    model(torch.tensor([[4.0]])).sum().backward()
    # y = 3 (2x + 1) at x = 4: dy/dweight = 3 * 4, dy/dbias = 3.
    assert model.trunk.weight.grad.item() == 12.0
    assert model.trunk.bias.grad.item() == 3.0
    assert model.head.weight.grad is None
    optimizer.step()
    assert [p.item() for p in model.parameters()] == [2.0 - 0.5 * 12.0, 1.0 - 0.5 * 3.0, 3.0]


def test_a_copy_of_a_held_model_is_held_itself_and_independent() -> None:
    model = Normed()
    enforce(model, plan_freeze(model, ["trunk"]))
    twin = copy.deepcopy(model)
    assert all_bits(twin) == all_bits(model)
    twin.train()
    twin.trunk[1].train()
    assert [module.training for module in twin.trunk.modules()] == [False] * 4
    assert all(module.training for module in twin.head.modules())
    assert [p.requires_grad for p in twin.parameters()] == [False] * 3 + [True] * 3
    enforce(twin, plan_freeze(twin, []))
    model.train()
    assert all(module.training for module in twin.modules())
    assert [module.training for module in model.trunk.modules()] == [False] * 4


def test_train_of_a_copy_reaches_the_children_of_the_copy_only() -> None:
    model = nn.Sequential(Owner())
    enforce(model, plan_freeze(model, ["0.scale"]))
    twin = copy.deepcopy(model)
    twin.eval()
    assert not twin[0].child.training
    assert model[0].child.training
    model.eval()
    twin.train()
    assert twin[0].child.training
    assert not model[0].child.training


def test_a_held_model_can_be_pickled_and_is_held_when_it_comes_back() -> None:
    model = Normed()
    enforce(model, plan_freeze(model, ["trunk"]))
    twin = pickle.loads(pickle.dumps(model))
    assert all_bits(twin) == all_bits(model)
    twin.train()
    assert [module.training for module in twin.trunk.modules()] == [False] * 4
    assert all(module.training for module in twin.head.modules())


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_a_copy_of_a_held_model_holds_what_is_put_into_it_and_leaves_the_original_alone(
    make_copy: Callable[[Normed], Normed],
) -> None:
    model = Normed()
    enforce(model, plan_freeze(model, ["trunk"]))
    twin = make_copy(model)
    twin.trunk[1] = nn.SyncBatchNorm(4)
    twin.train()
    model.eval()
    assert modes(twin) == {"": True, **HELD_TRUNK, **TRAINING_HEAD}
    assert not any(modes(model).values())
    copy.deepcopy(twin.trunk).train()
    assert modes(twin) == {"": True, **HELD_TRUNK, **TRAINING_HEAD}


# --- what is put into the model once it is frozen


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


HELD_TRUNK = {"trunk": False, "trunk.0": False, "trunk.1": False, "trunk.2": False}
TRAINING_HEAD = {"head": True, "head.0": True, "head.1": True, "head.2": True}


def adapter() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)))


def beside(model: Normed) -> None:
    model.trunk.append(adapter())


def inside(model: Normed) -> None:
    model.trunk[1].adapter = adapter()


def in_place(model: Normed) -> None:
    model.trunk[1] = adapter()


def whole(model: Normed) -> None:
    model.trunk = adapter()


def synchronised(model: Normed) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def wrapped(model: Normed) -> None:
    model.trunk[1] = checkpoint_wrapper(nn.BatchNorm1d(4))
    model.trunk[0] = checkpoint_wrapper(model.trunk[0])


def compiled(model: Normed) -> None:
    model.trunk = torch.compile(model.trunk, backend="eager")


def parametrised(model: Normed) -> None:
    parametrize.register_parametrization(model.trunk[0], "weight", nn.Dropout(0.5))


def scripted(model: Normed) -> None:
    model.trunk = torch.jit.script(model.trunk)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "put", [beside, inside, in_place, whole, synchronised, wrapped, compiled, parametrised, scripted]
)
@pytest.mark.parametrize("call", [lambda model: model.train(), lambda model: [m.train() for m in model.modules()]])
def test_whatever_is_put_into_a_frozen_part_stays_in_eval_too(
    put: Callable[[Normed], None], call: Callable[[Normed], object]
) -> None:
    model = Normed()
    enforce(model, plan_freeze(model, ["trunk"]))
    put(model)
    call(model)
    assert not any(module.training for module in model.trunk.modules())
    assert all(module.training for module in model.head.modules())
    enforce(model, plan_freeze(model, []))
    assert all(module.training for module in model.modules())


def test_a_frozen_norm_that_is_converted_stays_in_eval_where_all_around_it_trains() -> None:
    model = Normed()
    enforce(model, plan_freeze(model, ["type:BatchNorm1d"]))
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.train()
    assert {name for name, training in modes(model).items() if not training} == {"trunk.1", "head.2"}
    assert isinstance(model.trunk[1], nn.SyncBatchNorm)
    model.trunk.train()
    assert not model.trunk[1].training


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_a_part_that_is_replaced_whole_keeps_the_modes_of_what_was_there() -> None:
    model = Normed()
    enforce(model, plan_freeze(model, ["trunk.1"]))
    model.trunk = torch.jit.script(model.trunk)
    model.train()
    assert modes(model) == {"": True, **HELD_TRUNK, "trunk": True, "trunk.0": True, "trunk.2": True, **TRAINING_HEAD}


def test_what_is_put_into_a_module_that_is_held_for_a_buffer_s_sake_has_the_mode_asked_for() -> None:
    model = nn.Sequential(Owner())
    enforce(model, plan_freeze(model, ["0.scale"]))
    model[0].adapter = adapter()
    model[0].child = adapter()
    model.train()
    assert modes(model)["0"] is False
    assert all(module.training for name in ("adapter", "child") for module in getattr(model[0], name).modules())
    model.eval()
    assert not any(modes(model).values())


def test_a_train_of_the_instance_s_own_is_still_called_and_comes_back() -> None:
    model = Normed()
    calls: list[bool] = []

    def own(mode: bool = True) -> nn.Module:
        calls.append(mode)
        return Normed.train(model, mode)

    model.train = own  # type: ignore[method-assign]
    enforce(model, plan_freeze(model, ["trunk"]))
    model.eval()
    assert calls == [True, False]
    enforce(model, plan_freeze(model, []))
    assert model.train is own
    assert all(module.training for module in model.modules())


def test_a_held_model_compiles_as_one_graph_and_trains_the_same() -> None:
    model = Normed()
    enforce(model, plan_freeze(model, ["trunk"]))
    model.head[0].p = 0.0
    x = torch.randn(6, 3)
    one_graph = torch.compile(model, backend="eager", fullgraph=True)
    one_graph.train()
    assert torch.equal(one_graph(x), model(x))
    assert modes(model) == {"": True, **HELD_TRUNK, **TRAINING_HEAD}


# --- properties


class Tree(nn.Module):
    """A fixed tree with every kind of module that matters to a freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.1))
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)}) for _ in "ab"])
        self.plain_norm = nn.BatchNorm1d(2, affine=False)
        self.heads = nn.ModuleDict({"depth": nn.Linear(2, 1), "drop": nn.Sequential(nn.Dropout(0.1))})
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer("scale", torch.ones(1), persistent=False)


TREE_PATTERNS = [
    "stem", "stem.0", "stem.1", "stem.1.weight", "stem.1.running_mean", "blocks", "blocks.0", "blocks.1.fc.bias",
    "blocks.*.norm", "**.norm.bias", "~running", "~num_batches", "plain_norm", "heads", "heads.depth.weight",
    "temperature", "scale", "**.bias", "**.weight", "**",
]  # fmt: skip
PATTERN_LISTS = st.lists(
    st.builds(lambda pattern, takes_back: "!" * takes_back + pattern, st.sampled_from(TREE_PATTERNS), st.booleans()),
    max_size=6,
)


@given(PATTERN_LISTS)
@settings(derandomize=True, database=None, max_examples=200)
def test_any_plan_is_a_partition_and_enforcing_it_makes_it_so(patterns: list[str]) -> None:
    model = Tree()
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    try:
        plan = plan_freeze(model, patterns)
    except (PatternError, FreezeError):
        reject()
    names = plan.names
    assert sorted([*names.frozen, *names.trainable]) == sorted(parameters)
    assert sorted([*names.frozen_buffers, *names.free_buffers]) == sorted(buffers)

    held = {*plan.held_in_eval}
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        own_trainable = {start + n for n, _ in module.named_parameters(recurse=False)} & {*names.trainable}
        own_frozen_buffers = {start + n for n, _ in module.named_buffers(recurse=False)} & {*names.frozen_buffers}
        tensors = {start + n for n, _ in [*module.named_parameters(), *module.named_buffers()]}
        if path in held:
            # The one reason to hold a module that trains: its forward would move a buffer that is frozen by name.
            assert not own_trainable or own_frozen_buffers
        elif tensors:
            assert not tensors <= {*names.frozen, *names.frozen_buffers}
            assert not own_frozen_buffers

    enforce(model, plan)
    model.train()
    assert {name for name, p in parameters.items() if p.requires_grad} == {*names.trainable}
    assert {path for path, module in model.named_modules() if not module.training} == held
    assert set(trainable_parameters(model, plan)) == {*names.trainable}


NEVER_REFUSED = st.lists(
    st.sampled_from([pattern for pattern in TREE_PATTERNS if "running" not in pattern and "batches" not in pattern]),
    max_size=4,
)


@given(NEVER_REFUSED, NEVER_REFUSED)
@settings(derandomize=True, database=None, max_examples=60)
def test_enforcing_a_plan_forgets_the_plan_before(first: list[str], second: list[str]) -> None:
    model, fresh = Tree(), Tree()
    plans = [plan_freeze(model, first), plan_freeze(model, second)]
    for plan in plans:
        enforce(model, plan)
    enforce(fresh, plans[1])
    for each in (model, fresh):
        each.train()
    assert [m.training for m in model.modules()] == [m.training for m in fresh.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in fresh.parameters()]


# --- reference

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "SGD with momentum": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda parameters: AdamW(parameters, lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_frozen_trunk_trains_the_same_bits_as_leaving_it_out_by_hand(
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
) -> None:
    by_plan = Normed()
    by_hand = copy.deepcopy(by_plan)
    start = all_bits(by_plan)

    plan = plan_freeze(by_plan, ["trunk"])
    enforce(by_plan, plan)
    torch.manual_seed(5)
    train(by_plan, make_optimizer(trainable_parameters(by_plan, plan).values()))

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            features = by_hand.trunk(x)
        return by_hand.head(features)

    by_hand.trunk.eval()
    torch.manual_seed(5)
    train(by_hand, make_optimizer(by_hand.head.parameters()), forward=forward)

    assert all_bits(by_plan) == all_bits(by_hand)
    assert all_bits(by_plan)["head.1.weight"] != start["head.1.weight"]


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_frozen_head_trains_the_same_bits_as_a_head_of_constants(
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(2)
        return nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(3, 4), nn.Tanh()), "head": nn.Linear(4, 2)})

    by_plan, by_hand = make(), make()
    start = all_bits(by_plan)

    plan = plan_freeze(by_plan, ["head"])
    enforce(by_plan, plan)
    train(
        by_plan,
        make_optimizer(trainable_parameters(by_plan, plan).values()),
        forward=lambda x: by_plan["head"](by_plan["trunk"](x)),
    )

    weight, bias = by_hand["head"].weight.detach().clone(), by_hand["head"].bias.detach().clone()
    train(
        by_hand,
        make_optimizer(by_hand["trunk"].parameters()),
        forward=lambda x: functional.linear(by_hand["trunk"](x), weight, bias),
    )

    assert all_bits(by_plan) == all_bits(by_hand)
    assert all_bits(by_plan)["trunk.0.weight"] != start["trunk.0.weight"]


class Remembers(nn.Module):
    """Drops a cache whenever its mode is set, as timm's LeViT does with its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Remembers:
        super().train(mode)
        self.cache = {}
        return self


def test_a_held_module_s_own_train_method_is_still_called() -> None:
    model = nn.ModuleDict({"trunk": Remembers(), "head": nn.Linear(1, 1)})
    enforce(model, plan_freeze(model, ["trunk"]))
    model["trunk"].cache = {"a": torch.ones(1)}  # type: ignore[assignment]
    model.eval()
    assert model["trunk"].cache == {} and not model["trunk"].training  # type: ignore[comparison-overlap]
    model["trunk"].cache = {"a": torch.ones(1)}  # type: ignore[assignment]
    model.train()
    assert model["trunk"].cache == {} and not model["trunk"].training and model["head"].training  # type: ignore[comparison-overlap]


def test_a_trainable_part_inside_a_held_module_keeps_the_mode_asked_for() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0].adapter = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    enforce(model, plan_freeze(model, ["0", "!0.adapter"]))
    assert not model[0].training and model[0].adapter.training and model[0].adapter[0].training
    model.eval()
    assert not model[0].adapter.training
    model.train()
    assert not model[0].training and model[0].adapter[0].training


def test_parameters_that_a_model_keeps_fixed_are_listed_and_whole_numbers_never_train() -> None:
    model = nn.Module()
    model.table = nn.Parameter(torch.ones(2), requires_grad=False)
    model.count = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    model.weight = nn.Parameter(torch.ones(2))
    assert untrainable_parameters(model) == ["table", "count"]
    enforce(model, plan_freeze(model, []))
    assert (model.table.requires_grad, model.count.requires_grad) == (True, False)
    assert list(trainable_parameters(model, plan_freeze(model, ["table"]))) == ["weight"]


def test_one_pattern_alone_is_a_list_of_one() -> None:
    model = nn.ModuleDict({"trunk": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    assert plan_freeze(model, "trunk") == plan_freeze(model, ["trunk"])
