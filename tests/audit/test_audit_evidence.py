"""How large a change is, what most likely made it, rows of a tensor, and copies."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from audit_loops import Tiny, found, freeze_by_hand, only, run, train, trainable
from device_sync import no_device_sync
from mtl.audit import GradientAudit
from mtl.audit.offline.compare import compare
from mtl.audit.watch.change_size import size_of_change
from mtl.audit.watch.readings import BYTES_A_STEP, Reading
from mtl.audit.watch.rows import split_rows
from mtl.patterns import PatternError

NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-30, math.inf, math.nan])


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8))
@settings(derandomize=True, database=None, max_examples=100)
def test_the_size_of_a_change_is_that_of_a_loop_over_the_elements(pairs: list[tuple[float, float]]) -> None:
    before, after = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    differ = [before.view(torch.int64)[i] != after.view(torch.int64)[i] for i in range(len(pairs))]
    deltas = [abs(b - a) for (a, b), yes in zip(pairs, differ, strict=True) if yes]
    size = size_of_change(before, after)
    assert size.share == pytest.approx(sum(map(bool, differ)) / len(pairs))
    expected = math.nan if any(map(math.isnan, deltas)) else max(deltas, default=0.0)
    assert size.max_abs == pytest.approx(expected, nan_ok=True)


def half_and_back(weight: Tensor) -> None:
    weight.data = weight.data.half().float()


def bfloat_and_back(weight: Tensor) -> None:
    weight.data = weight.data.bfloat16().float()


def decay(weight: Tensor) -> None:
    weight.data.mul_(1 - 0.1 * 0.01)


def decay_by_a_stranger(weight: Tensor) -> None:
    weight.grad = torch.zeros_like(weight)
    AdamW([weight], lr=0.1, weight_decay=0.01).step()
    weight.grad = None


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (half_and_back, "it went through float16 and back"),
        (bfloat_and_back, "it went through bfloat16 and back"),
        (decay, "every element was multiplied by 0.999, as weight decay does"),
        (decay_by_a_stranger, "every element was multiplied by 0.999, as weight decay does"),
        (lambda weight: setattr(weight, "data", weight.data.double()), "its shape or type was changed"),
    ],
)
def test_what_wrote_is_read_off_the_bytes(write: Callable[[Tensor], None], words: str) -> None:
    model = Tiny()
    with torch.no_grad():
        model.trunk.weight.copy_(torch.tensor([[0.1, 0.2], [-0.3, 0.7]]))
    audit = GradientAudit(model, ["trunk"], policy="collect")
    with audit.phase("frozen"):
        write(model.trunk.weight)
    assert found(audit.report) == [("param_changed", "trunk.weight", "frozen", 0)]
    assert only(audit.report).cause.startswith(words)


def put_a_parametrization(model: Tiny) -> None:
    nn.utils.parametrizations.weight_norm(model.trunk)


def prune(model: Tiny) -> None:
    from torch.nn.utils.prune import random_unstructured

    random_unstructured(model.trunk, "weight", amount=0.5)


def load_by_assignment(model: Tiny) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.trunk.requires_grad_(False)


@pytest.mark.parametrize(
    ("replace", "words"),
    [
        (put_a_parametrization, "a parametrization of weight was registered after the freeze"),
        (prune, "pruning was applied to weight after the freeze"),
        (load_by_assignment, "it was registered again after the freeze (load_state_dict(assign=True)"),
    ],
)
def test_a_weight_that_was_replaced_says_by_what(replace: Callable[[Tiny], None], words: str) -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"], policy="collect")
    with audit.phase("frozen"):
        replace(model)
    causes = {v.cause for v in audit.report.violations if (v.kind, v.name) == ("identity_changed", "trunk.weight")}
    assert len(causes) == 1 and causes.pop().startswith(words)


def test_a_write_without_a_sign_is_found_in_turn_and_its_steps_are_reported() -> None:
    model = Tiny()
    size = BYTES_A_STEP // 4
    model.trunk.weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    model.trunk.large = nn.ParameterList(torch.ones(size) for _ in range(4)).requires_grad_(False)
    seen = []
    audit = GradientAudit(model, ["trunk"], policy="collect")
    with audit.phase("frozen"):
        for step in range(1, 13):
            if step == 5:
                model.trunk.large[2].data[7] = 3
            train(audit, model, [], 1)
            seen += [step] * (len(audit.report.violations) - len(seen))
    # Five tensors, one a step but for the small one next to another: each is read at least every fifth step.
    assert len(seen) == 1 and 5 <= seen[0] <= 9
    violation = only(audit.report)
    assert violation.name == "trunk.large.2" and violation.since < 5 <= violation.step
    assert (violation.max_abs, violation.share) == (2.0, 1 / size)


def test_statistics_that_move_without_a_sign_are_found_in_the_same_step() -> None:
    model = Tiny()
    model.trunk.register_buffer("state", torch.zeros(3))
    report = run(model, num_steps=5, after_step={2: lambda: model.trunk.state.numpy().fill(1)})
    assert found(report) == [("buffer_changed", "trunk.state", "frozen", 2)]
    assert only(report).since == 1


# --- rows


@pytest.mark.parametrize(
    ("written", "expected"),
    [("head.weight[0:2]", [0, 1]), ("head.weight[-1]", [4]), ("head.weight[3:]", [3, 4]), ("*.weight[1]", [1])],
)
def test_rows_are_read_as_slices(written: str, expected: list[int]) -> None:
    others, rows = split_rows(["trunk", written], {"trunk.weight": 5, "head.weight": 5, "head.bias": 0})
    assert others == ["trunk"]
    assert [list(range(5))[part] for part in rows["head.weight"]] == [expected]


def test_a_slice_after_a_module_is_left_to_the_pattern_language() -> None:
    assert split_rows(["trunk[:2]", "trunk@first:1", "head"], {"trunk.0.weight": 3}) == (
        ["trunk[:2]", "trunk@first:1", "head"],
        {},
    )


@pytest.mark.parametrize("written", ["head.weight[7]", "head.weight[5:]", "head.bias[0]"])
def test_rows_that_are_not_there_are_refused(written: str) -> None:
    with pytest.raises(PatternError, match=r"selects no rows: head\.\w+ has [05] of them"):
        split_rows([written], {"head.weight": 5, "head.bias": 0})


def train_rows(masked: bool, weight_decay: float = 0.0) -> GradientAudit:
    """Two old classes and one new one: the rows of the old ones are frozen."""
    model = Tiny()
    model.head = nn.Linear(2, 3)
    optimizer = SGD(trainable(model), lr=0.1, weight_decay=weight_decay)
    if masked:
        mask = torch.tensor([[0.0], [0.0], [1.0]])
        model.head.weight.register_hook(lambda gradient: gradient * mask)
    audit = GradientAudit(model, ["trunk", "head.weight[0:2]"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        train(audit, model, [optimizer], 4)
    return audit


def test_rows_whose_gradient_is_masked_are_silent_and_the_others_train() -> None:
    report = train_rows(masked=True).report
    assert report.ok and report.phases[0].num_trained == 2
    assert "head.weight[0:2]" in report.phases[0].fingerprints


@pytest.mark.parametrize(("masked", "weight_decay"), [(False, 0.0), (True, 0.1)])
def test_rows_that_move_are_named_bit_for_bit(masked: bool, weight_decay: float) -> None:
    report = train_rows(masked, weight_decay).report
    assert [(v.kind, v.name) for v in report.violations] == [("param_changed", "head.weight[0:2]")]
    assert "mask their gradient" in only(report).cause


def test_rows_are_compared_between_checkpoints_too() -> None:
    before = {"head.weight": torch.zeros(4, 2), "head.bias": torch.zeros(4)}
    after = {"head.weight": torch.zeros(4, 2), "head.bias": torch.ones(4)}
    after["head.weight"][3, 1] = 0.5
    assert compare(before, after, ["head.weight[:3]"]).ok
    (difference,) = compare(before, after, ["head.weight[2:]"]).differences
    assert (difference.name, difference.max_abs, difference.share) == ("head.weight[2:]", 0.5, 0.25)


# --- copies


def averaged(exact: bool) -> GradientAudit:
    model = Tiny()
    with torch.no_grad():
        model.trunk.weight.fill_(0.1)
    optimizer = SGD(trainable(model), lr=0.1)
    ema = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda e, p, _: torch.lerp(e, p, 0.1) if exact else 0.9 * e + 0.3 * p / 3
    )
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect", ema=ema)
    with audit.phase("frozen"):
        for _ in range(4):
            train(audit, model, [optimizer], 1)
            ema.update_parameters(model)
    return audit


def test_an_average_by_lerp_keeps_the_bits_of_what_is_frozen() -> None:
    report = averaged(exact=True).report
    assert report.ok and set(report.phases[0].fingerprints) == {"trunk.weight", "ema.trunk.weight"}


def test_an_average_that_moves_what_is_frozen_is_named() -> None:
    report = averaged(exact=False).report
    assert {(v.kind, v.name) for v in report.violations} == {("param_changed", "ema.trunk.weight")}
    assert "average trainable parameters only" in report.violations[0].cause


def test_wrappers_inside_a_model_take_no_place_in_names() -> None:
    model = Tiny()
    model.trunk = torch.compile(model.trunk, backend="eager")
    freeze_by_hand(model.trunk)
    audit = GradientAudit(model, ["trunk.weight"], policy="collect")
    with audit.phase("frozen") as record:
        assert list(record.fingerprints) == ["trunk.weight"]
        model.trunk._orig_mod.weight.data.add_(1)
    assert found(audit.report) == [("param_changed", "trunk.weight", "frozen", 0)]


# --- devices


def test_a_reading_of_a_tensor_on_the_cpu_is_there_at_once_and_copies_nothing() -> None:
    tensor = torch.arange(3)
    content = Reading(tensor).get(wait=False)
    assert content is not None and content.data_ptr() == tensor.data_ptr()


@pytest.mark.gpu
def test_no_step_waits_for_the_device() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 4)).cuda()
    freeze_by_hand(model[0])
    freeze_by_hand(model[1])
    optimizer = SGD(model[2].parameters(), lr=0.1)
    x = torch.randn(8, 64, device="cuda")
    audit = GradientAudit(model, ["0", "1"], [optimizer])
    with audit.phase("frozen"):
        for _ in range(20):
            model(x).square().mean().backward()
            with no_device_sync():
                audit.after_backward()
                optimizer.step()
                audit.after_step()
            optimizer.zero_grad()
    assert audit.report.ok


# --- who did it


def causes_of(model: nn.Module, optimizers: list[SGD], freeze: tuple[str, ...] = ("trunk",), **faults: object) -> str:
    audit = GradientAudit(model, freeze, optimizers, policy="collect")
    with audit.phase("frozen"):
        train(audit, model, optimizers, num_steps=4, **faults)  # type: ignore[arg-type]
    hazards = [f"hazard {hazard.kind}: {hazard.cause}" for hazard in audit.report.hazards]
    return " | ".join([*hazards, *(f"{each.kind}: {each.cause}" for each in audit.report.violations)])


def test_a_write_to_a_parameter_that_the_optimizer_skips_is_not_blamed_on_it() -> None:
    model = Tiny()
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
    causes = causes_of(model, [optimizer], after_step={2: lambda: model.trunk.weight.data.fill_(3)})
    assert "hazard in_optimizer: the optimizer was built before the freeze" in causes
    assert "param_changed: written past torch's version counter" in causes
    assert "decay" not in causes


def test_a_parameter_that_enters_an_optimizer_in_mid_phase_is_distinguished_from_one_that_was_in_it() -> None:
    model = Tiny()
    optimizer = SGD(model.head.parameters(), lr=0.1)
    causes = causes_of(
        model, [optimizer], after_step={2: lambda: optimizer.add_param_group({"params": [model.trunk.weight]})}
    )
    assert causes.startswith("hazard in_optimizer: an optimizer received it after the phase began")


def test_a_head_that_was_put_there_later_is_named_at_once_and_as_such() -> None:
    model = Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect")
    with audit.phase("frozen"):
        train(audit, model, [optimizer], 4, after_step={2: lambda: setattr(model, "head", nn.Linear(2, 1))})
    assert {(v.kind, v.step) for v in audit.report.violations} == {("not_in_optimizer", 2)}
    assert "it was added after the optimizer was built" in audit.report.violations[0].cause


def test_an_average_that_follows_a_written_weight_is_not_blamed() -> None:
    model, average = Tiny(), Tiny()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="collect", ema=average)

    def write() -> None:
        model.trunk.weight.data.fill_(3)
        average.trunk.weight.data.fill_(2)

    with audit.phase("frozen"):
        train(audit, model, [optimizer], 4, after_step={2: write})
    causes = {violation.name: violation.cause for violation in audit.report.violations}
    assert "it follows the tensor that it averages" in causes["ema.trunk.weight"]
    assert "written past torch's version counter" in causes["trunk.weight"]


def test_rows_that_code_writes_are_not_blamed_on_the_optimizer() -> None:
    model = nn.Sequential()
    model.head = nn.Linear(2, 2)
    model.head.weight.register_hook(lambda gradient: gradient * torch.tensor([[0.0], [1.0]]))
    causes = causes_of(
        model,
        [SGD(model.parameters(), lr=0.1)],
        ("head.weight[0:1]",),
        after_step={2: lambda: model.head.weight.data[0].fill_(3)},
    )
    assert "code writes to these rows" in causes


@pytest.mark.parametrize("written", ["head.weight[0:10]", "head.weight[-5:]"])
def test_rows_past_the_end_are_refused(written: str) -> None:
    audit = GradientAudit(Tiny(), [written])
    with pytest.raises(PatternError, match=r"goes past the end: head\.weight has 1 rows"):
        audit.begin("frozen")


def test_a_name_that_the_model_has_is_no_name_for_a_module_next_to_it() -> None:
    model = Tiny()
    audit = GradientAudit(model, ["trunk"], also={"head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="something called 'head' already"):
        audit.begin("frozen")


@pytest.mark.parametrize("change", [Tensor.double, lambda data: data[:1]])
def test_restore_undoes_another_type_and_another_shape(change: Callable[[Tensor], Tensor]) -> None:
    model = Tiny()
    before = model.trunk.weight.detach().clone()
    optimizer = SGD(trainable(model), lr=0.1)
    audit = GradientAudit(model, ["trunk"], [optimizer], policy="restore")

    def write() -> None:
        model.trunk.weight.data = change(model.trunk.weight.data)

    with audit.phase("frozen"):
        train(audit, model, [optimizer], 4, after_step={2: write})
    assert [violation.kind for violation in audit.report.violations] == ["param_changed"]
    assert model.trunk.weight.dtype == torch.float32
    assert torch.equal(model.trunk.weight, before)
