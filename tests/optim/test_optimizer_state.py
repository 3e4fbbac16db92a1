"""Optimizer state from phase to phase: against one torch optimizer that lives through all of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.config.optim import OptimizerConfig
from mtl.freeze import enforce, plan_freeze, trainable_parameters
from mtl.optim.optimizer_state import OptimizerState
from mtl.optim.optimizers import build_optimizer, group_parameters, optimizer_names

NAMES = ["trunk.weight", "trunk.bias", "head.weight", "head.bias"]
SGD = OptimizerConfig(name="sgd", options={"momentum": 0.9})
ADAM, ADAMW = OptimizerConfig(name="adam"), OptimizerConfig(name="adamw")
EACH = pytest.mark.parametrize("config", [SGD, ADAM, ADAMW], ids=["sgd", "adam", "adamw"])

# An optimizer's kind: its class, and what of its options is switched on.
ADAMW_KIND = "torch.optim.adamw:AdamW"
SGD_KIND = "torch.optim.sgd:SGD[momentum]"


class Tiny(nn.Module):
    """Parameters trunk.weight, trunk.bias, head.weight, head.bias."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(2, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).tanh())


def backward(model: nn.Module, step: int) -> None:
    """Leaves gradients that nothing but the weights and the number of the step decide."""
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(step))
    (model(x) - 1).square().sum().backward()


class Run:
    """A model that trains phase by phase, as a run does it."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model: nn.Module = Tiny()
        self.moments = OptimizerState()
        self.num_steps = 0
        self.given: list[str] = []
        self.name_of: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}

    def begin(self, freeze: Sequence[str], config: OptimizerConfig = ADAMW) -> Optimizer:
        plan = plan_freeze(self.model, list(freeze))
        enforce(self.model, plan)
        parameters = trainable_parameters(self.model, plan)
        groups = group_parameters(parameters, dict.fromkeys(parameters, 0.05), {"trunk.weight": 0.1})
        optimizer = build_optimizer(config, groups)
        self.given = self.moments.apply(optimizer, self.name_of)
        return optimizer

    def train(self, optimizer: Optimizer, num_steps: int) -> None:
        for _ in range(num_steps):
            optimizer.zero_grad()
            backward(self.model, self.num_steps)
            optimizer.step()
            self.num_steps += 1

    def phase(self, freeze: Sequence[str], num_steps: int, config: OptimizerConfig = ADAMW) -> Optimizer:
        optimizer = self.begin(freeze, config)
        self.train(optimizer, num_steps)
        self.moments.collect(optimizer, self.name_of)
        return optimizer

    def states(self, optimizer: Optimizer) -> dict[str, dict[str, bytes]]:
        """The optimizer state by parameter and key, as bytes."""
        return {
            self.name_of[parameter]: {key: bits(value) for key, value in state.items()}
            for parameter, state in optimizer.state.items()
            if state
        }

    def weights(self) -> dict[str, bytes]:
        return {name: bits(tensor) for name, tensor in self.model.state_dict().items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


# --- a parameter that is thawed again


@EACH
def test_a_parameter_thawed_again_continues_with_the_state_in_which_it_was_frozen(config: OptimizerConfig) -> None:
    run = Run()
    keys = {"momentum_buffer"} if config is SGD else {"step", "exp_avg", "exp_avg_sq"}
    first = run.states(run.phase([], 3, config))
    assert {name: set(state) for name, state in first.items()} == dict.fromkeys(NAMES, keys)
    second = run.states(run.phase(["trunk"], 4, config))
    assert set(second) == {"head.weight", "head.bias"}

    thawed = run.begin(["head.bias"], config)
    assert sorted(run.given) == sorted(NAMES[:3])
    expected = {name: (first if name.startswith("trunk") else second)[name] for name in NAMES[:3]}
    assert run.states(thawed) == expected
    assert any(any(state["momentum_buffer" if config is SGD else "exp_avg"]) for state in expected.values())
    run.train(thawed, 2)
    run.moments.collect(thawed, run.name_of)
    third = run.states(thawed)

    # Frozen once more, over two phases, and thawed: still as it was when it last trained.
    run.phase(["trunk"], 3, config)
    fifth = run.states(run.phase(["trunk"], 1, config))
    again = run.states(run.begin([], config))
    assert again == {name: (third if name.startswith("trunk") else fifth)[name] for name in NAMES}
    assert again["trunk.weight"] != first["trunk.weight"]


def test_the_steps_that_a_parameter_has_trained_are_counted_over_all_phases() -> None:
    run = Run()
    for freeze, num_steps in [(["trunk.weight"], 3), (["head.bias"], 2), (["trunk"], 1)]:
        run.phase(freeze, num_steps)
    optimizer = run.begin([])
    counts = {name: optimizer.state[run.model.get_parameter(name)]["step"].item() for name in NAMES}
    assert counts == {"trunk.weight": 2, "trunk.bias": 5, "head.weight": 6, "head.bias": 4}


@EACH
@pytest.mark.parametrize("boundary", [0, 1, 4, 6])
def test_a_boundary_between_equal_freezes_leaves_training_as_it_was_to_the_bit(
    config: OptimizerConfig, boundary: int
) -> None:
    whole, cut = Run(), Run()
    whole.phase(["trunk.bias"], 6, config)
    cut.phase(["trunk.bias"], boundary, config)
    cut.phase(["trunk.bias"], 6 - boundary, config)
    assert cut.weights() == whole.weights()
    assert cut.weights() != Run().weights()


@EACH
def test_freezing_by_plan_gives_the_bits_of_training_only_the_rest_by_hand(config: OptimizerConfig) -> None:
    by_plan, by_hand = Run(), Run()
    by_plan.phase(["trunk"], 5, config)
    kind: Any = getattr(torch.optim, optimizer_names()[config.name])
    by_hand.train(
        kind(
            by_hand.model.get_submodule("head").parameters(),
            lr=0.05,
            weight_decay=0.0,
            fused=config is not SGD,
            **config.options,
        ),
        5,
    )
    assert by_plan.weights() == by_hand.weights()
    assert by_plan.weights()["head.weight"] != Run().weights()["head.weight"]


@given(
    phases=st.lists(st.tuples(st.sets(st.sampled_from(NAMES), min_size=1), st.integers(0, 3)), min_size=1, max_size=6),
    config=st.sampled_from([SGD, ADAM, ADAMW]),
)
@settings(max_examples=60, derandomize=True)
def test_phases_are_one_optimizer_that_skips_what_is_frozen(
    phases: list[tuple[set[str], int]], config: OptimizerConfig
) -> None:
    run, reference = Run(), Run()
    kind: Any = getattr(torch.optim, optimizer_names()[config.name])
    own = dict(reference.model.named_parameters())
    decayed, others = [own["trunk.weight"]], [own[name] for name in NAMES[1:]]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    through_all = kind(groups, lr=0.05, fused=config is not SGD, **config.options)
    num_trained = dict.fromkeys(NAMES, 0)
    for trainable, num_steps in phases:
        before = run.weights()
        run.phase([name for name in NAMES if name not in trainable], num_steps, config)
        assert all(run.weights()[name] == before[name] for name in NAMES if name not in trainable)
        for _ in range(num_steps):
            through_all.zero_grad()
            backward(reference.model, reference.num_steps)
            reference.num_steps += 1
            for name in NAMES:
                if name not in trainable:
                    own[name].grad = None
            through_all.step()
        for name in trainable:
            num_trained[name] += num_steps
        assert run.weights() == reference.weights()
        kept = next(iter(run.moments.state_dict().values()))
        if config is SGD:
            assert set(kept) == {name for name, number in num_trained.items() if number}
        else:
            steps = {name: state["step"].item() for name, state in kept.items()}
            assert steps == {name: number for name, number in num_trained.items() if number}


# --- what is not carried


def test_there_is_no_state_at_first_nor_of_what_never_trained() -> None:
    run = Run()
    assert run.states(run.begin([])) == {}
    assert run.given == []
    run.phase(["trunk"], 2)
    assert set(run.states(run.begin([]))) == {"head.weight", "head.bias"}


def test_what_is_forgotten_begins_again_and_the_rest_continues() -> None:
    run = Run()
    before = run.states(run.phase([], 2))
    run.moments.drop(["trunk.weight", "head.bias", "not.there"])
    after = run.states(run.begin([]))
    assert after == {name: before[name] for name in ("trunk.bias", "head.weight")}


def test_forgetting_everything_trains_as_a_new_optimizer_does() -> None:
    forgetful, new = Run(), Run()
    for run in (forgetful, new):
        run.phase([], 3)
    forgetful.moments.drop(NAMES)
    new.moments = OptimizerState()
    keeping = Run()
    keeping.phase([], 3)
    for run in (forgetful, new, keeping):
        run.phase([], 2)
    assert forgetful.weights() == new.weights()
    assert forgetful.weights() != keeping.weights()


def test_forgetting_reaches_the_state_of_every_kind_of_optimizer() -> None:
    run = Run()
    run.phase([], 1, ADAMW)
    run.phase([], 1, SGD)
    run.moments.drop(["trunk.weight"])
    assert {kind: sorted(kept) for kind, kept in run.moments.state_dict().items()} == {
        ADAMW_KIND: ["head.bias", "head.weight", "trunk.bias"],
        SGD_KIND: ["head.bias", "head.weight", "trunk.bias"],
    }


def test_keep_only_drops_all_others() -> None:
    run = Run()
    before = run.states(run.phase([], 2))
    run.moments.retain({"trunk.weight", "not.there"})
    assert run.states(run.begin([])) == {"trunk.weight": before["trunk.weight"]}


def test_what_was_given_is_no_longer_kept_and_the_rest_is() -> None:
    run = Run()
    run.phase([], 2)
    run.begin(["trunk"])
    assert [sorted(kept) for kept in run.moments.state_dict().values()] == [["trunk.bias", "trunk.weight"]]


def test_state_stays_apart_per_kind_of_optimizer() -> None:
    run = Run()
    of_adamw = run.states(run.phase([], 3, ADAMW))
    of_sgd = run.phase([], 2, SGD)
    assert run.given == []
    assert {key for state in run.states(of_sgd).values() for key in state} == {"momentum_buffer"}
    assert run.states(run.begin([], ADAMW)) == of_adamw
    assert run.states(run.begin([], SGD)) == run.states(of_sgd)


@EACH
def test_what_is_thawed_trains_next_to_what_has_moments_already(config: OptimizerConfig) -> None:
    run = Run()
    run.phase(["trunk"], 2, config)
    before = run.weights()
    run.phase([], 2, config)
    assert all(run.weights()[each] != before[each] for each in NAMES)


@EACH
def test_a_first_step_that_overflows_leaves_no_moments_that_were_never_written(config: OptimizerConfig) -> None:
    # Memory that was used before, so that what is not written is not zero by luck.
    del [torch.full((4096,), 1e30) for _ in range(64)][:]
    parameter = torch.nn.Parameter(torch.ones(4096))
    optimizer = build_optimizer(config, [{"params": [parameter], "lr": 0.1, "weight_decay": 0.0}])
    scaler = torch.amp.GradScaler("cpu")
    for value in (float("inf"), 2.0):
        parameter.grad = torch.full_like(parameter, value)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    assert len(parameter.detach().unique()) == 1 and bool(parameter.isfinite().all())


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("adamw", {"amsgrad": True}, {}),
        ("adamw", {}, {"fused": True}),
        ("sgd", {"momentum": 0.9}, {}),
        ("sgd", {}, {"momentum": 0.9}),
        ("adamw", {}, {"amsgrad": True}),
        ("rmsprop", {}, {"momentum": 0.9}),
        ("rmsprop", {}, {"centered": True}),
    ],
)
def test_a_phase_with_other_options_of_the_same_optimizer_can_be_trained(
    name: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    run = Run()
    run.phase([], 2, OptimizerConfig(name=name, options=before))
    middle = run.weights()
    run.phase([], 2, OptimizerConfig(name=name, options=after))
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    assert all(run.weights()[each] != middle[each] for each in NAMES)


# --- saved and loaded


@pytest.mark.parametrize("name", sorted(optimizer_names()))
def test_a_boundary_changes_no_bit_with_any_optimizer(name: str) -> None:
    whole, cut = Run(), Run()
    for run, lengths in ((whole, [5]), (cut, [2, 3])):
        for length in lengths:
            enforce(run.model, plan_freeze(run.model, []))
            groups = group_parameters(dict(run.model.named_parameters()), dict.fromkeys(NAMES, 0.01), {})
            optimizer = build_optimizer(OptimizerConfig(name=name), groups)
            run.moments.apply(optimizer, run.name_of)
            run.train(optimizer, length)
            run.moments.collect(optimizer, run.name_of)
    assert cut.weights() == whole.weights()


@EACH
def test_moments_that_were_saved_and_loaded_continue_as_if_they_had_not_been(config: OptimizerConfig) -> None:
    run, other = Run(), Run()
    for each in (run, other):
        each.phase([], 2, config)
        each.phase(["trunk"], 2, config)
    file = io.BytesIO()
    torch.save(run.moments.state_dict(), file)
    file.seek(0)
    run.moments = OptimizerState()
    run.moments.load_state_dict(torch.load(file, weights_only=True))
    for each in (run, other):
        each.phase([], 2, config)
    assert run.weights() == other.weights()
    assert run.moments.state_dict().keys() == other.moments.state_dict().keys()


def test_a_state_dict_has_the_class_then_the_name_then_the_key_and_can_be_changed_without_harm() -> None:
    run = Run()
    run.phase(["trunk", "head.bias"], 2)
    state = run.moments.state_dict()
    assert {kind: {name: set(each) for name, each in kept.items()} for kind, kept in state.items()} == {
        ADAMW_KIND: {"head.weight": {"step", "exp_avg", "exp_avg_sq"}}
    }
    state[ADAMW_KIND]["head.weight"].clear()
    state.clear()
    assert run.moments.state_dict()[ADAMW_KIND]["head.weight"]["step"].item() == 2


def test_loading_replaces_all_that_was_kept() -> None:
    run, empty = Run(), OptimizerState()
    run.phase([], 1)
    run.moments.load_state_dict(empty.state_dict())
    assert run.states(run.begin([])) == {}


def test_taking_in_the_middle_of_a_phase_leaves_its_course_as_it_was() -> None:
    run, other = Run(), Run()
    for each in (run, other):
        optimizer = each.begin([])
        each.train(optimizer, 2)
        if each is run:
            each.moments.collect(optimizer, each.name_of)
        each.train(optimizer, 2)
        each.moments.collect(optimizer, each.name_of)
        each.phase(["trunk"], 2)
        each.phase([], 2)
    assert run.weights() == other.weights()


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 3, 1, 1), (1, 3, 2, 2)])
def test_moments_have_the_strides_of_their_parameters_even_if_saved_in_others(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    parameter = nn.Parameter(values.to(memory_format=torch.channels_last))
    saved = {"step": torch.tensor(3.0), "exp_avg": values + 1, "exp_avg_sq": values.abs() + 2}
    assert all(saved[key].stride() != parameter.stride() for key in ("exp_avg", "exp_avg_sq"))
    moments = OptimizerState()
    moments.load_state_dict({ADAMW_KIND: {"conv": saved}})
    optimizer = build_optimizer(ADAMW, [{"params": [parameter], "lr": 0.1, "weight_decay": 0.0}])
    assert moments.apply(optimizer, {parameter: "conv"}) == ["conv"]
    state = optimizer.state[parameter]
    assert state["step"].item() == 3
    for key in ("exp_avg", "exp_avg_sq"):
        assert state[key].stride() == parameter.stride()
        assert torch.equal(state[key], saved[key])
