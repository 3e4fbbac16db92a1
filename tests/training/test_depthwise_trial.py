"""`depthwise`: what `auto` finds out at the start of a run, and runs with shifted products."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import mtl.training.depthwise_trial as trial
from crashes import SHORT, assert_same, crash, resume, run_whole
from mtl.config import ConfigError, load_config
from mtl.model.depthwise import depthwise_layers
from mtl.phases.plan import make_plan
from mtl.phases.plan.text import full_plan
from mtl.phases.setup import build_meta_setup
from mtl.training.run import train
from once import made_once
from runs import read_model, tiny_config, tiny_parts

LAYERS = ["trunk.blocks.3.0.conv_dw", "trunk.blocks.4.0.conv_dw"]
RUN: dict[str, Any] = {
    "trunk": {"name": "test_efficientnet"},
    "checkpoint": {"every_steps": 2},
    "optim": {},
    "phases": [
        {"name": "warm", "freeze": ["trunk"], "epochs": 1, "cache": "ram"},
        {"name": "half", "freeze": ["trunk.conv_stem", "trunk.bn1", "trunk.blocks.0"], "steps": 5},
    ],
}


def own_classes(model: torch.nn.Module) -> list[str]:
    return [name for name, layer in depthwise_layers(model).items() if type(layer).__name__.startswith("Product")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    settings = {**SHORT, **RUN, "depthwise": LAYERS}
    return made_once(tmp_path_factory, "depthwise-whole", lambda folder: run_whole(folder, cache_dir, settings))


def fake_times(patch: pytest.MonkeyPatch, plain: float, own: float) -> None:
    """Stands for a machine: which of two is faster on this one is no matter of a test."""
    patch.setattr(trial, "_time_layer", lambda *_: (plain, own))


def test_auto_takes_what_is_clearly_faster_of_what_is_trained_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "mtl")
    every = list(depthwise_layers(tiny_parts(tmp_path, **RUN).root))
    trained = LAYERS[1:]
    assert every == LAYERS
    for times, expected in {(9e-3, 1e-3): trained, (9e-3, 6e-3): [], (9e-5, 1e-5): []}.items():
        caplog.clear()
        fake_times(monkeypatch, *times)
        parts = tiny_parts(tmp_path, "depthwise=auto", "phases.half.freeze=[trunk.blocks.3]", **RUN)
        assert parts.config.depthwise == (expected or "torch")
        assert own_classes(parts.root) == expected
        (said,) = [message for message in caplog.messages if message.startswith("depthwise: ")]
        assert ("as shifted products in 1 of 1 layers" if expected else "by torch in all of 1 layers") in said


def test_a_trial_leaves_weights_statistics_and_random_numbers_as_they_were(tmp_path: Path) -> None:
    parts = tiny_parts(tmp_path, **RUN)
    before = {name: tensor.clone() for name, tensor in parts.root.state_dict().items()}
    random, batch = torch.get_rng_state(), parts.train.batch(torch.arange(8))
    trial.choose_depthwise(parts, parts.config.with_changes(depthwise="auto"), batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.root.state_dict().items())
    assert all(parameter.grad is None for parameter in parts.root.parameters())
    assert own_classes(parts.root) == []
    assert not any(layer._forward_hooks for layer in depthwise_layers(parts.root).values())


@pytest.mark.parametrize("overrides", [[], ["precision=bf16", "depthwise=auto"], ["compile=true", "depthwise=auto"]])
def test_nothing_is_tried_where_it_is_not_asked_for_or_torch_computes_anyway(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_time_layer", lambda *_: pytest.fail("tried"))
    parts = tiny_parts(tmp_path, *overrides, **RUN)
    assert parts.config.depthwise == "torch" and own_classes(parts.root) == []


def test_a_layer_that_is_none_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"depthwise\.1: .*3\.0\.conv_dv'.*trunk\.blocks\.3\.0\.conv_dw"):
        tiny_parts(tmp_path, **RUN, depthwise=[LAYERS[1], "trunk.blocks.3.0.conv_dv"])


def test_a_model_that_has_none_of_the_layers_is_left_to_torch_with_a_warning(tmp_path: Path) -> None:
    phases = [{"name": "a", "freeze": ["trunk"], "steps": 5}]
    parts = tiny_parts(tmp_path, depthwise=LAYERS, phases=phases)
    assert own_classes(parts.root) == []
    assert any("depthwise: the model has no depthwise convolution" in message for message in parts.unread)
    with pytest.raises(ConfigError, match="depthwise: the model has no depthwise convolution"):
        tiny_parts(tmp_path, "depthwise=auto", phases=phases)


def test_the_plan_refuses_a_layer_that_is_none_and_says_what_is_computed_how(tmp_path: Path) -> None:
    file = tiny_config(tmp_path, **RUN)
    for names, message in (
        (f"[{LAYERS[1]}, x]", r"depthwise\.1: .*got 'x'"),
        ("[trunk.blocks.3.0.conv_dv]", "none of these layers, as if they were another trunk's; nearest: trunk.blocks"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_meta_setup(load_config(file, [f"depthwise={names}"]))
    # In a file, they may be those of a trunk that the command line has replaced.
    (line,) = build_meta_setup(load_config(tiny_config(tmp_path, **RUN, depthwise=["trunk.blocks.9.0.conv_dw"]))).unread
    assert "none of these layers" in line
    plan = make_plan(build_meta_setup(load_config(tiny_config(tmp_path, **RUN, depthwise=LAYERS))))
    assert f"shifted products in {len(LAYERS)} of " in full_plan(plan) and plan.to_json()["depthwise"] == plan.depthwise
    plain = make_plan(build_meta_setup(load_config(tiny_config(tmp_path, **RUN))))
    assert plain.depthwise == "" and "depthwise" not in full_plan(plain)


def test_layers_that_are_named_in_vain_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = tiny_parts(tmp_path, "precision=bf16", **RUN, depthwise=LAYERS)
    assert own_classes(parts.root) == []
    assert any(message.startswith("depthwise: products are for fp32") for message in caplog.messages)


def test_a_run_with_products_ends_near_that_of_torch_with_a_clean_audit(whole: Path, tmp_path: Path) -> None:
    plain = train(tiny_parts(tmp_path, **{**SHORT, **RUN}), quiet=True)
    ours, theirs = (read_model(folder / "checkpoints/last") for folder in (whole, plain.run_dir))
    assert plain.report.ok and '"ok": true' in (whole / "audit.json").read_text()
    assert any(not torch.equal(ours[f"{name}.weight"], theirs[f"{name}.weight"]) for name in LAYERS)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0.05, atol=0.02, msg=name)


def test_a_resumed_run_takes_the_layers_that_it_began_with_whatever_is_faster_now(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**RUN, "depthwise": "auto"}
    real = trial._time

    def only_two(*given: Any) -> dict[str, tuple[float, float]]:
        return {name: (9e-3, 1e-3 if name in LAYERS else 9e-3) for name in real(*given)}

    monkeypatch.setattr(trial, "_time", only_two)
    crash(tmp_path, 8, **settings)
    monkeypatch.setattr(trial, "_time", lambda *_: pytest.fail("tried again"))
    run_dir = resume(tmp_path, **settings)
    assert load_config(run_dir / "config.yaml").depthwise == LAYERS
    assert_same(run_dir, whole)
    assert load_config(tiny_config(tmp_path, **settings)).depthwise == "auto"
