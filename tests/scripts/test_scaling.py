"""The arithmetic of scripts/bench/scaling.py is right, and docs/scaling.md holds what the script prints."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm

from mtl.phases.plan import make_plan
from mtl.phases.plan.records import FlopsPlan
from mtl.phases.setup import build_meta_setup

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts/bench"))

import scaling  # noqa: E402
import scaling_costs as costs  # noqa: E402

TRUNK, SIZE = "resnet18", 64
# A fast link and a slow one, round numbers for the rest.
ROUND = costs.Assumptions(
    device_tflops=1.0,
    utilisation=0.5,
    link_gb_s=1.0,
    node_link_gb_s=1.0,
    host_link_gb_s=1.0,
    link_us=0.0,
    cpu_message_us=1000.0,
)


@pytest.fixture(scope="module")
def cases() -> list[costs.Case]:
    return costs.study(TRUNK, SIZE)


def test_ddp_reduces_four_bytes_of_each_parameter_that_trains(cases: list[costs.Case]) -> None:
    frozen, _, free = cases
    trunk = sum(parameter.numel() for parameter in timm.create_model(TRUNK, num_classes=0).parameters())
    assert trunk == 11_176_512
    assert free.plan.reduced_bytes - frozen.plan.reduced_bytes == 4 * trunk
    for case in cases:
        assert case.plan.reduced_bytes == 4 * case.plan.trainable.parameters
        assert case.ddp_sent(1) == case.fsdp_sent(1) == 0
        assert case.ddp_sent(4) == 2 * 3 * case.plan.reduced_bytes // 4


def test_what_a_device_sends_is_what_the_plan_says_for_so_many_processes(cases: list[costs.Case]) -> None:
    plan = make_plan(build_meta_setup(costs.config_of(TRUNK, SIZE)), 8)
    assert [case.ddp_sent(8) for case in cases] == [phase.sent_bytes for phase in plan.phases]


def test_on_one_device_fsdp_holds_what_ddp_holds_and_on_many_what_is_gathered(cases: list[costs.Case]) -> None:
    free = cases[-1]
    memory = free.plan.memory
    # AdamW: two moments and a counter for each tensor.
    tensors = free.plan.trainable.count
    assert memory.optimizer_state == 2 * memory.gradients + 4 * tensors
    # float32 weights, gradients, moments, average, and the statistics.
    assert free.ddp_bytes() == 5 * memory.gradients + 4 * tensors + free.buffers
    for case in cases:
        assert case.fsdp_bytes(1) == case.ddp_bytes()
        left = case.buffers + case.gathered + case.gathered_gradient
        assert case.fsdp_bytes(2) == pytest.approx((case.ddp_bytes() - case.buffers) / 2 + left, abs=1)
        assert case.fsdp_bytes(10**12) == left + 1
    # The largest block of resnet18: two 3 x 3 convolutions of 512 channels, two norms. The stem is outside of blocks.
    block, stem = 2 * 512 * 512 * 9 + 4 * 512, 3 * 64 * 49 + 2 * 64
    assert free.gathered == 4 * (stem + 2 * block) and free.gathered_gradient == 4 * block


def test_what_is_kept_is_not_computed(cases: list[costs.Case]) -> None:
    frozen, half, free = cases
    assert 0 < frozen.left_forward < half.left_forward < free.left_forward == free.plan.flops.forward
    # All that is left are the heads, whose backward costs two forwards but for the first layers' inputs.
    assert frozen.left_forward < frozen.plan.flops.backward <= 2 * frozen.left_forward
    assert free.kept_bytes == 0 < half.kept_bytes


def test_the_time_of_a_step_is_what_is_computed_and_what_is_waited_for(cases: list[costs.Case]) -> None:
    flops = FlopsPlan(forward=10**9, backward=2 * 10**9, forward_of_all=0, backward_of_all=0)
    case = replace(cases[0], plan=replace(cases[0].plan, flops=flops, reduced_bytes=10**9), left_forward=10**8)
    alone = costs.step(case, 1, 100, ROUND)
    assert alone.compute == alone.seconds == pytest.approx(0.6)
    # 1.5 GB sent in 1.5 s, of which 0.4 s overlap with the backward; three messages of which one takes 2 log2(4) ms.
    many = costs.step(case, 4, 100, ROUND)
    assert (many.compute, many.gradients, many.kept, many.control) == pytest.approx((0.6, 1.1, 0.0, 0.004))
    assert costs.per_device_efficiency(case, 4, replace(ROUND, batch_per_device=100)) == pytest.approx(0.6 / 1.704)
    assert costs.global_efficiency(case, 4, replace(ROUND, global_batch=400)) == pytest.approx(2.4 / (4 * 1.704))
    kept = costs.step(case, 4, 100, ROUND, keeps=True)
    brought = 100 * case.kept_bytes / 1e9
    assert kept.compute == pytest.approx(0.42)
    assert kept.kept == pytest.approx(brought + 0.75 * brought + 4e-6 * costs.Measured.lookup_us)


@pytest.mark.slow
def test_the_script_fills_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    names = ("assumptions", "memory", "time", "images", "saving", "limits")
    page.write_text("".join(f"<!-- {name} -->\n(to come)\n<!-- end -->\n" for name in names))
    arguments = ["--trunks", TRUNK, "--image-size", str(SIZE), "--link-gb-s", "12.5"]
    scaling.main([*arguments, "--write", str(page)])
    scaling.main(arguments)
    text = page.read_text()
    for table in capsys.readouterr().out.rstrip("\n").split("\n\n"):
        assert f"-->\n{table}\n<!-- end" in text
    assert "(to come)" not in text and "12.5" in text and "resnet18, trunk frozen, kept" in text
    page.write_text("")
    with pytest.raises(
        ValueError, match="expected one place for the table, <!-- assumptions --> to <!-- end -->, got 0"
    ):
        scaling.main([*arguments, "--write", str(page)])


@pytest.mark.slow
def test_the_documentation_holds_what_the_script_prints(tmp_path: Path) -> None:
    page = tmp_path / "scaling.md"
    page.write_text((ROOT / "docs/scaling.md").read_text(encoding="utf-8"), encoding="utf-8")
    scaling.main(["--write", str(page)])
    assert page.read_text(encoding="utf-8") == (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
