"""What `auto` finds out at the start of a run, the narrow types, and compilation."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from mtl.config import load_config
from mtl.training.autotune import autocast_for, choose
from mtl.training.loop import Trainer
from mtl.training.run import train
from mtl.training.tracking.tracker import Tracker
from runs import read_metrics, small_parts


def test_auto_times_what_it_may_choose_from_and_says_what_it_took(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtl")
    parts = small_parts(tmp_path, "memory_format=auto", "precision=auto")
    (said,) = [message for message in caplog.messages if "the fastest step of phase" in message]
    assert said.startswith(f"{parts.config.memory_format}, {parts.config.precision}: ")
    assert {f"{layout} fp32" in said for layout in ("contiguous", "channels_last")} == {True}
    weight = parts.model.get_parameter("trunk.conv1.0.weight")
    assert weight.is_contiguous(memory_format=parts.model.memory_format)
    result = train(parts, quiet=True)
    # The run's own file says what it computed in.
    resolved = load_config(result.run_dir / "config.yaml")
    assert (resolved.memory_format, resolved.precision) == (parts.config.memory_format, parts.config.precision)
    assert result.report.ok


def test_what_is_given_is_neither_tried_nor_talked_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mtl")
    parts = small_parts(tmp_path, "memory_format=channels_last")
    batch = parts.train.batch(torch.arange(8))
    assert choose(parts, batch, parts.device).why == ""
    assert not any("fastest" in message for message in caplog.messages)


def test_a_trial_leaves_weights_statistics_and_random_numbers_as_they_were(tmp_path: Path) -> None:
    plain = small_parts(tmp_path)
    random = torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in plain.root.state_dict().items()}
    open_ = plain.config.with_changes(memory_format="auto", precision="auto")
    plain.__dict__["config"] = open_
    choose(plain, plain.train.batch(torch.arange(8)), plain.device)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.root.state_dict().items())
    assert all(parameter.grad is None for parameter in plain.root.parameters())


def test_a_number_format_whose_loss_is_not_finite_is_not_taken(tmp_path: Path) -> None:
    parts = small_parts(tmp_path)
    parts.__dict__["config"] = parts.config.with_changes(precision="auto")
    with torch.no_grad():
        parts.model.heads["depth"].out.bias.fill_(math.nan)
    choice = choose(parts, parts.train.batch(torch.arange(8)), parts.device)
    assert choice.precision == "fp32"
    assert "()" in choice.why, "nothing is named that did not count"


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_narrow_types_train_with_weights_in_float32_and_a_clean_audit(precision: str, tmp_path: Path) -> None:
    parts = small_parts(tmp_path, f"precision={precision}")
    result = train(parts, quiet=True)
    assert {p.dtype for p in parts.root.parameters()} == {torch.float32}
    assert json.loads((result.run_dir / "audit.json").read_text())["ok"]
    losses = [row["train/loss"] for row in read_metrics(result.run_dir) if "train/loss" in row]
    assert losses and all(map(math.isfinite, losses))


@pytest.mark.slow
def test_gradients_of_fp16_are_those_of_the_loss_when_audit_and_clipping_see_them(tmp_path: Path) -> None:
    parts = small_parts(tmp_path, "precision=fp16", "phases.warm-heads.epochs=1")
    folder = tmp_path / "run"
    folder.mkdir()
    trainer = Trainer(parts, folder, Tracker(parts.config.tracking, folder, "x", {}), quiet=True)
    norms: list[float] = []
    look = trainer.audit.after_backward

    def and_measure() -> None:
        gradients = [p.grad for p in parts.root.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        look()

    trainer.audit.after_backward = and_measure  # type: ignore[method-assign]
    trainer.run_phase(parts.phases[0])
    assert trainer.scaler.get_scale() > 1000
    assert 0 < max(norms) < 1000, "not multiplied by the scale"


def test_fp32_has_no_autocast_and_the_others_have_theirs() -> None:
    for precision, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        with autocast_for(precision, torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.slow
# torch.compile itself looks at the gradient of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_run_trains_through_its_phases_with_a_clean_audit(tmp_path: Path) -> None:
    compiled = train(small_parts(tmp_path, "compile=true", "name=compiled"), quiet=True)
    plain = train(small_parts(tmp_path, "name=plain"), quiet=True)
    assert compiled.report.ok
    for phase, scores in plain.scores.items():
        for task, metrics in scores.items():
            assert compiled.scores[phase][task] == pytest.approx(metrics, rel=0.05, abs=0.02)
