"""The moving average of what is trained: its values by hand, what it follows, and that swapping loses no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtl.optim.ema import Ema
from mtl.training.run import train
from runs import read_metrics, tiny_parts


def parameters_of(**values: float) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.tensor([value])) for name, value in values.items()}


def put(parameter: nn.Parameter, value: float | Tensor) -> None:
    """Changes a parameter in place, as an optimizer does."""
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(value))


def bits(tensors: dict[str, Any]) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


@settings(max_examples=40, derandomize=True)
@given(decay=st.floats(0.01, 0.999), num_steps=st.integers(0, 30), seed=st.integers(0, 1000))
def test_the_average_is_that_of_a_loop_by_hand(decay: float, num_steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 2), "b": (5,), "c": ()}
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    expected = {name: parameter.detach().double() for name, parameter in parameters.items()}
    ema = Ema(decay)
    ema.follow(parameters)
    for _ in range(num_steps):
        for name, parameter in parameters.items():
            put(parameter, parameter + torch.randn(shapes[name], generator=generator))
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
        ema.update()
    assert list(ema.averages()) == list(shapes)
    for name, average in ema.averages().items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_three_steps_by_hand_give_this_average() -> None:
    parameters = parameters_of(a=8.0)
    ema = Ema(0.5)
    ema.follow(parameters)
    averages = []
    for value in (0.0, 2.0, 5.0):
        put(parameters["a"], value)
        ema.update()
        averages.append(ema.averages()["a"].item())
    assert averages == [4.0, 3.0, 4.0]


def test_following_and_updating_leave_the_parameters_as_they_are() -> None:
    parameters = parameters_of(a=1.0, b=-2.0)
    before = bits(parameters)
    ema = Ema(0.9)
    ema.follow(parameters)
    ema.update()
    assert bits(parameters) == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters.values())


def test_only_followed_parameters_are_averaged_and_swapped() -> None:
    parameters = parameters_of(trains=0.0, frozen=0.1)
    frozen = bits({"frozen": parameters["frozen"]})
    ema = Ema(0.5)
    ema.follow({"trains": parameters["trains"]})
    put(parameters["trains"], 4.0)
    ema.update()
    assert list(ema.averages()) == ["trains"]
    with ema.swapped_in():
        assert parameters["trains"].item() == 2.0
        assert bits({"frozen": parameters["frozen"]}) == frozen
    assert bits({"frozen": parameters["frozen"]}) == frozen


def test_what_continues_training_keeps_its_average_and_what_is_thawed_begins_with_its_value() -> None:
    parameters = parameters_of(stays=0.0, thawed=0.0, leaves=0.0)
    ema = Ema(0.5)
    ema.follow({name: parameters[name] for name in ("stays", "leaves")})
    for name in ("stays", "leaves"):
        put(parameters[name], 8.0)
    ema.update()
    put(parameters["thawed"], 3.0)
    ema.follow({name: parameters[name] for name in ("stays", "thawed")})
    assert {name: average.item() for name, average in ema.averages().items()} == {"stays": 4.0, "thawed": 3.0}
    put(parameters["thawed"], 5.0)
    ema.update()
    assert {name: average.item() for name, average in ema.averages().items()} == {"stays": 6.0, "thawed": 4.0}


def test_what_is_frozen_takes_its_average_and_begins_again_with_it() -> None:
    parameters = parameters_of(a=0.0, b=0.0)
    ema = Ema(0.5)
    ema.follow(parameters)
    put(parameters["a"], 8.0)
    ema.update()
    ema.follow({"b": parameters["b"]})
    ema.follow(parameters)
    assert parameters["a"].item() == ema.averages()["a"].item() == 4.0


def test_swapping_in_shows_the_averages_and_swapping_out_restores_every_bit() -> None:
    parameters = {"a": nn.Parameter(torch.tensor([0.1, -0.0, 1e-42, 3e38])), "b": nn.Parameter(torch.randn(4, 3))}
    ema = Ema(0.7)
    ema.follow(parameters)
    put(parameters["a"], torch.tensor([0.3, 0.0, -1e-42, 1e38]))
    put(parameters["b"], torch.randn(4, 3))
    ema.update()
    trained, averaged = bits(parameters), bits(ema.averages())
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    assert trained != averaged
    for _ in range(2):
        with ema.swapped_in():
            assert bits(parameters) == averaged
            assert bits(ema.averages()) == trained
        assert bits(parameters) == trained
        assert bits(ema.averages()) == averaged
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == places


def test_parameters_are_put_back_when_judging_fails() -> None:
    parameters = parameters_of(a=0.0)
    ema = Ema(0.5)
    ema.follow(parameters)
    put(parameters["a"], 4.0)
    ema.update()
    with pytest.raises(RuntimeError, match="judge"), ema.swapped_in():
        raise RuntimeError("judge")
    assert (parameters["a"].item(), ema.averages()["a"].item()) == (4.0, 2.0)


def test_loaded_averages_continue_as_if_never_saved() -> None:
    def steps(ema: Ema, parameters: dict[str, nn.Parameter], values: list[float]) -> None:
        for value in values:
            for number, parameter in enumerate(parameters.values()):
                put(parameter, value + number)
            ema.update()

    whole, halves = parameters_of(a=1.0, b=2.0), parameters_of(a=1.0, b=2.0)
    never_saved, saved, resumed = Ema(0.9), Ema(0.9), Ema(0.9)
    never_saved.follow(whole)
    steps(never_saved, whole, [0.3, 0.7, -1.1])
    saved.follow(halves)
    steps(saved, halves, [0.3])
    file = {name: average.clone() for name, average in saved.averages().items()}
    resumed.load(halves, file)
    steps(resumed, halves, [0.7, -1.1])
    assert bits(resumed.averages()) == bits(never_saved.averages())
    assert bits(file) == bits(saved.averages()), "what was loaded is not written to"


def test_loaded_averages_belong_to_parameters_by_name_whatever_their_order() -> None:
    parameters = parameters_of(a=0.0, b=8.0)
    ema = Ema(0.5)
    ema.load(parameters, {"b": torch.tensor([4.0]), "a": torch.tensor([2.0])})
    ema.update()
    assert {name: average.item() for name, average in ema.averages().items()} == {"a": 1.0, "b": 6.0}


def test_an_evaluation_goes_back_to_a_best_epoch_in_which_less_trained_than_after_it(tmp_path: Path) -> None:
    phases = [
        {"name": "a", "epochs": 2, "freeze": ["trunk"], "lr": 3e-3},
        {"name": "b", "epochs": 1, "optimizer": "sgd", "lr": 0.5},  # spoils the weights: the best ones are of `a`
        {"name": "c", "evaluate_only": True, "restore": "best"},
    ]
    result = train(tiny_parts(tmp_path, optim={"ema_decay": 0.5}, phases=phases), quiet=True)
    assert result.best_step is not None and result.best_step <= 10
    rows = [row for row in read_metrics(result.run_dir) if "val/score" in row]
    assert rows[-1]["val/score"] == result.best_score


EVALUATED = [
    {"name": "a", "epochs": 2},
    {"name": "e", "evaluate_only": True, "restore": "best"},
    {"name": "b", "steps": 1, "lr": 1e-9},
]


def test_a_run_resumed_before_an_evaluation_judges_the_averages_as_one_that_never_stopped(tmp_path: Path) -> None:
    phases = [EVALUATED[0], {"name": "e", "evaluate_only": True}]
    whole = train(tiny_parts(tmp_path, optim={"ema_decay": 0.9}, phases=phases), quiet=True)
    source = whole.run_dir / "checkpoints/last"
    again = tiny_parts(tmp_path, "name=again", f"resume={source}", optim={"ema_decay": 0.9}, phases=phases)
    resumed = train(again, quiet=True)
    assert resumed.scores["e"] == whole.scores["e"]
    assert (resumed.best_score, resumed.best_step) == (whole.best_score, whole.best_step)
    assert (resumed.run_dir / "checkpoints/last/model.safetensors").is_file()


@pytest.mark.slow
def test_training_after_an_evaluation_resumes_from_the_weights_as_they_trained(tmp_path: Path) -> None:
    ends = []
    for name, phases in (("with", EVALUATED), ("without", [EVALUATED[0], {**EVALUATED[2], "restore": "best"}])):
        parts = tiny_parts(tmp_path, f"name={name}", optim={"ema_decay": 0.5}, phases=phases)
        assert train(parts, quiet=True).report.ok
        ends.append(bits(dict(parts.model.heads.named_parameters())))
    assert ends[0] == ends[1]


def test_following_nothing_swaps_nothing() -> None:
    parameters = parameters_of(a=1.0)
    ema = Ema(0.5)
    ema.follow({})
    with ema.swapped_in():
        assert parameters["a"].item() == 1.0
    assert ema.averages() == {}
