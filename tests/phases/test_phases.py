"""Phases resolved against a real model on the meta device: what is frozen, what is trained and how, each mistake."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchjd.scalarization import FAMO

from mtl.config import ConfigError, load_config
from mtl.patterns import ModuleTree, PatternError, PatternLike, select
from mtl.patterns.module_tree import describe
from mtl.phases.plan import make_plan
from mtl.phases.resolve import Phase
from mtl.phases.setup import ModelSetup, build_meta_setup, build_model_setup

RUN = Path("run.yaml")
HEAD = [
    "name: r",
    "trunk: {name: test_resnet}",
    "data: {image_size: 32, batch_size: 8, num_train: 40, num_val: 20}",
    "tasks: {depth: {type: depth}, object: {type: classification, num_classes: 10}}",
    "phases:",
]
METRICS = "val/score, train/loss, val/depth/abs_rel, val/depth/rmse, val/depth/delta1, val/object/accuracy"
OPTIMIZERS = "adadelta, adafactor, adagrad, adam, adamax, adamw, asgd, nadam, radam, rmsprop, rprop, sgd"
THERE = f"there are: {METRICS}"
START = "matches nothing (nearest: {}; the names start with: trunk, heads, normalize)"
HINT = "a phase that shall only evaluate says evaluate_only: true"


def drawn(phases: list[str], *below: str, overrides: tuple[str, ...] = ()) -> ModelSetup:
    """A run of these phases, on lines 6 and following in YAML's flow style, with top-level keys below them."""
    RUN.write_text("\n".join([*HEAD, *(f"  - {{{phase}}}" for phase in phases), *below]) + "\n")
    return build_meta_setup(load_config(RUN, overrides))


def mistakes(phases: list[str], *below: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        drawn(phases, *below)
    return caught.value.mistakes


def tensor_names(run: ModelSetup) -> tuple[list[str], list[str]]:
    parameters = [name for name, _ in run.root.named_parameters(remove_duplicate=False)]
    return parameters, [name for name, _ in run.root.named_buffers(remove_duplicate=False)]


def table(run: ModelSetup, phase: Phase) -> dict[str, tuple[float, float]]:
    """Peak rate and decay by the parameter's name; no parameter is in two groups."""
    name_of = {parameter: name for name, parameter in run.root.named_parameters()}
    rows = [(name_of[p], (g["lr"], g["weight_decay"])) for g in phase.groups for p in g["params"]]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


# What is frozen

_PATTERNS = ["trunk", "heads", "heads.depth", "trunk.layer1", "~layer2", "trunk@last:2", "trunk@first:1", "**.bias"]
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_PATTERNS += ["type:BatchNorm2d", "re:.*weight", "trunk.layer3.*", "trunk[-2:]", "balance"]
_LISTS = st.lists(st.sampled_from([*_PATTERNS, *(f"!{pattern}" for pattern in _PATTERNS)]), min_size=1, max_size=6)


@cache
def whole() -> tuple[list[str], ModuleTree]:
    """All parameters and buffers of these runs, and the module tree on which they are registered."""
    run = drawn(["name: a, epochs: 1"], "balance: {method: uw}")
    return [name for names in tensor_names(run) for name in names], describe(run.root)


def selected_by(patterns: Sequence[PatternLike]) -> set[str]:
    return {*select(patterns, *whole()).names}


def accepted(patterns: list[str]) -> list[str]:
    """The patterns without those that would be refused where they stand, of which there has to be one left."""
    kept: list[str] = []
    for pattern in patterns:
        with suppress(PatternError):
            selected_by([*kept, pattern])
            kept.append(pattern)
    assume(kept)
    return kept


@settings(max_examples=25, derandomize=True)
@given(patterns=_LISTS)
def test_train_freezes_exactly_what_its_patterns_do_not_select(patterns: list[str]) -> None:
    patterns = accepted(patterns)
    selected = selected_by(patterns)
    assume(any(name.startswith(("trunk.", "heads.")) and not name.endswith(_BUFFERS) for name in selected))
    run = drawn([f"name: a, epochs: 1, train: {patterns}"], "balance: {method: uw}")
    (parameters, buffers), names = tensor_names(run), run.phases[0].freeze.plan.names
    assert [*names.trainable] == [name for name in parameters if name in selected]
    assert [*names.frozen] == [name for name in parameters if name not in selected]
    assert {*names.free_buffers} >= selected & {*buffers}
    # Statistics go with the parameters next to them; a module without any has none to go with.
    modules = {name.rpartition(".")[0] for name in selected} | {"normalize"}
    assert {*names.frozen_buffers} >= {name for name in buffers if name.rpartition(".")[0] not in modules}


@pytest.mark.parametrize(
    "patterns", [["heads", "heads.depth"], ["heads", "~out"], ["trunk", "**.bias", "heads.object"]]
)
def test_train_takes_patterns_that_overlap_as_freeze_does(patterns: list[str]) -> None:
    run = drawn([f"name: a, epochs: 1, train: {patterns}"], "balance: {method: uw}")
    assert {*run.phases[0].freeze.plan.names.trainable} == selected_by(patterns) & {*tensor_names(run)[0]}


@pytest.mark.parametrize("patterns", [["heads", "!trunk"], ["trunk", "!heads", "heads.depth"]])
def test_train_refuses_to_take_back_what_it_did_not_name_as_freeze_does(patterns: list[str]) -> None:
    for key in ("freeze", "train"):
        (mistake,) = mistakes([f"name: a, epochs: 1, {key}: {patterns}"])
        assert mistake.startswith(f"run.yaml:6: phases.a.{key}.1: pattern {patterns[1]!r} deselects nothing")


@settings(max_examples=25, derandomize=True)
@given(always=_LISTS, own=_LISTS, key=st.sampled_from(["freeze", "train"]))
def test_no_phase_takes_back_what_is_always_frozen(always: list[str], own: list[str], key: str) -> None:
    always, own = accepted(always), accepted(own)
    by_own, by_always = selected_by(own), selected_by(always)
    by_own = {*whole()[0]} - by_own if key == "train" else by_own
    try:
        run = drawn([f"name: a, epochs: 1, {key}: {own}"], f"freeze_always: {always}", "balance: {method: uw}")
    except ConfigError as error:
        assert "trains nothing" in str(error)
        assume(False)
    plan = run.phases[0].freeze.plan.names
    assert by_always <= {*plan.frozen, *plan.frozen_buffers}
    assert {*plan.frozen} == (by_own | by_always) & {*tensor_names(run)[0]}


def test_what_is_always_frozen_takes_back_only_among_its_own_patterns() -> None:
    phases = ["name: a, epochs: 1, freeze: heads.depth", "name: b, epochs: 1, train: '**'", "name: c, epochs: 1"]
    a, b, c = drawn(phases, "freeze_always: [heads, '!heads.depth']").phases
    assert {name.split(".")[1] for name in a.freeze.plan.names.frozen} == {"depth", "object"}
    for phase in (b, c):
        assert phase.freeze.plan.names.frozen == ("heads.object.out.weight", "heads.object.out.bias")


def test_statistics_next_to_weights_that_train_move_whether_a_phase_says_freeze_or_train() -> None:
    frozen, trained = drawn(
        ["name: a, epochs: 1, freeze: 'trunk@first:3'", "name: b, epochs: 1, train: ['trunk@last:2', heads]"]
    ).phases
    assert frozen.freeze.plan.names.trainable == trained.freeze.plan.names.trainable
    moving = {name for name in frozen.freeze.plan.names.free_buffers if name.startswith("trunk.")}
    assert moving == {name for name in trained.freeze.plan.names.free_buffers if name.startswith("trunk.")}


@pytest.mark.parametrize("own", ["freeze: []", "train: '**'", "freeze: [trunk, '!trunk', trunk.bn1.weight]"])
def test_statistics_next_to_weights_that_are_always_frozen_rest_however_a_phase_is_written(own: str) -> None:
    (phase,) = drawn([f"name: a, epochs: 1, {own}"], "freeze_always: [trunk.bn1.weight, trunk.bn1.bias]").phases
    assert phase.freeze.plan.names.frozen == ("trunk.bn1.weight", "trunk.bn1.bias")
    assert {"trunk.bn1.running_mean", "trunk.bn1.running_var"} <= {*phase.freeze.plan.names.frozen_buffers}


@pytest.mark.parametrize(
    "own", ["freeze: []", "train: '**'", "freeze: [trunk, '!trunk', trunk.layer1]", "tasks: [depth, object]"]
)
def test_the_classic_list_freezes_by_substring_in_every_phase(own: str) -> None:
    run = drawn([f"name: a, epochs: 1, {own}"], "MODEL: {NOT_TRAIN_IN_MULTI_TASK: [layer1, th.out]}")
    expected = [name for name in tensor_names(run)[0] if "layer1" in name or "th.out" in name]
    assert len(expected) == 8
    assert list(run.phases[0].freeze.plan.names.frozen) == expected


def test_an_evaluation_freezes_everything_and_has_no_groups() -> None:
    run = drawn(["name: a, evaluate_only: true"], "balance: {method: uw}")
    (phase,) = run.phases
    assert (phase.freeze.plan.names.trainable, phase.groups, phase.num_steps) == ((), [], 0)


def test_what_no_active_task_reaches_is_frozen_or_only_logged() -> None:
    for unreached in ("freeze", "warn"):
        run = drawn(["name: a, epochs: 1, tasks: [depth]"], f"unreached: {unreached}")
        (phase,) = run.phases
        assert phase.tasks == ("depth",)
        assert phase.freeze.unreached == ("heads.object.out.weight", "heads.object.out.bias")
        assert phase.freeze.plan.names.frozen == (phase.freeze.unreached if unreached == "freeze" else ())
        assert ({*phase.freeze.unreached} <= {*table(run, phase)}) is (unreached == "warn")


# Rates, decay, groups


def test_a_phase_takes_rates_over_and_its_own_go_before_them() -> None:
    phases = ["name: a, epochs: 1", "name: b, epochs: 1, lr: 0.5, weight_decay: 0.25"]
    phases += ["name: c, epochs: 1, lr: {trunk: 1, '~layer4': 2, heads: 3}, weight_decay: {'**': 0, heads: 0.5}"]
    run = drawn(phases, "optim: {lr: 0.1, weight_decay: 0.2}", "balance: {method: uw}")
    a, b, c = (table(run, phase) for phase in run.phases)
    names = ["trunk.conv1.0.weight", "trunk.bn1.weight", "trunk.layer4.0.conv1.weight", "heads.object.out.weight"]
    names += ["heads.object.out.bias", "balance.0.scalarizer.log_var"]
    assert {*a} == {*b} == {*c} == {*tensor_names(run)[0]}
    assert [a[name] for name in names] == [(0.1, 0.2), (0.1, 0), (0.1, 0.2), (0.1, 0.2), (0.1, 0), (0.1, 0)]
    assert [b[name] for name in names] == [(0.5, 0.25), (0.5, 0), (0.5, 0.25), (0.5, 0.25), (0.5, 0), (0.5, 0)]
    # A table of the phase's own need not name the balancing method's weights: they have the run's rate.
    assert [c[name] for name in names] == [(1, 0), (1, 0), (2, 0), (3, 0.5), (3, 0), (0.1, 0)]


def test_groups_are_split_by_rate_and_decay_and_by_nothing_else() -> None:
    (phase,) = drawn(["name: a, epochs: 1, freeze: trunk, lr: {heads.depth: 1, heads.object: 2}"]).phases
    depth_vectors = 4 + 4 + 1  # biases of the lateral layers, two norms, the output's bias
    assert [(len(group["params"]), group["lr"], group["weight_decay"]) for group in phase.groups] == [
        (4 + 2 + 1, 1.0, 0.05),
        (depth_vectors, 1.0, 0.0),
        (1, 2.0, 0.05),
        (1, 2.0, 0.0),
    ]


def test_layer_decay_gives_each_depth_group_of_the_trunk_its_factor_and_heads_none() -> None:
    run = drawn(["name: a, epochs: 1, lr: 1, layer_decay: 0.5", "name: b, epochs: 1"], "balance: {method: uw}")
    factors = {"conv1": 1 / 32, "bn1": 1 / 32, "layer1": 1 / 16, "layer2": 1 / 8, "layer3": 1 / 4, "layer4": 1 / 2}
    assert {name: lr for name, (lr, _) in table(run, run.phases[0]).items()} == {
        name: factors[name.split(".")[1]] if name.startswith("trunk.") else 1.0 for name in tensor_names(run)[0]
    }
    assert {lr for lr, _ in table(run, run.phases[1]).values()} == {1e-3}


def test_layer_decay_multiplies_a_table_of_rates() -> None:
    run = drawn(["name: a, epochs: 1, layer_decay: 0.1, lr: {trunk: 1, trunk.layer4: 3, heads: 7}"])
    rates = table(run, run.phases[0])
    names = ["trunk.layer3.0.conv1.weight", "trunk.layer4.0.conv1.weight", "heads.object.out.bias"]
    assert [rates[name][0] for name in names] == pytest.approx([0.01, 0.3, 7])


def test_a_scale_multiplies_every_rate_of_every_phase_and_nothing_else() -> None:
    phases = [
        "name: a, epochs: 1, freeze: trunk",
        "name: b, epochs: 1, lr: {trunk: 1.0e-4, heads: 1.0e-3, balance: 2.0e-2}",
        "name: c, epochs: 1, lr: 3.0e-3, layer_decay: 0.5, freeze: heads",
    ]
    below = ["balance: {method: uw}", "optim: {lr: 2.0e-3}"]
    plain, scaled = drawn(phases, *below), drawn(phases, *below, overrides=("optim.lr_scale=0.25",))
    for one, other in zip(plain.phases, scaled.phases, strict=True):
        before = table(plain, one)
        assert table(scaled, other) == {name: (lr * 0.25, decay) for name, (lr, decay) in before.items()}
    shown = [make_plan(run).phases for run in (plain, scaled)]
    assert [{g.lr for g in phase.groups} for phase in shown[1]] == [
        {g.lr * 0.25 for g in phase.groups} for phase in shown[0]
    ]


def test_vectors_and_what_the_trunk_itself_excepts_are_not_decayed() -> None:
    run = drawn(["name: a, epochs: 1"], overrides=("trunk.name=test_vit", "data.image_size=64"))
    decays = {name: decay for name, (_, decay) in table(run, run.phases[0]).items()}
    shapes = {name: parameter.ndim for name, parameter in run.root.named_parameters()}
    excluded = {"trunk.pos_embed", "trunk.cls_token"}
    assert all(shapes[name] == 3 for name in excluded)
    assert decays == {name: 0.05 if ndim > 1 and name not in excluded else 0.0 for name, ndim in shapes.items()}
    assert decays["trunk.patch_embed.proj.weight"] == 0.05


# Lengths


@pytest.mark.parametrize(
    ("phase", "accumulate", "batch_size", "steps_per_epoch", "num_steps"),
    [
        ("epochs: 1", 1, 8, 5, 5),
        ("epochs: 3, batch_size: 7", 1, 7, 5, 15),  # the five images that fill no batch are left out
        ("epochs: 2, batch_size: 16", 1, 16, 2, 4),
        ("epochs: 2, batch_size: 40", 1, 40, 1, 2),
        ("epochs: 2", 2, 8, 3, 6),
        ("epochs: 2", 5, 8, 1, 2),
        ("steps: 9", 3, 8, 2, 9),
        ("until: {steps: 1}, max_epochs: 3", 3, 8, 2, 6),
        ("until: {steps: 1}, max_steps: 11", 1, 8, 5, 11),
        ("until: {steps: 1}, max_epochs: 3, max_steps: 11", 1, 8, 5, 11),
        ("until: {steps: 1}, max_epochs: 2, max_steps: 11", 1, 8, 5, 10),
    ],
)
def test_steps_of_an_epoch_and_a_phase_are_this_table(
    phase: str, accumulate: int, batch_size: int, steps_per_epoch: int, num_steps: int
) -> None:
    (resolved,) = drawn([f"name: a, {phase}"], f"optim: {{accumulate: {accumulate}}}").phases
    assert (resolved.batch_size, resolved.steps_per_epoch, resolved.num_steps) == (
        batch_size,
        steps_per_epoch,
        num_steps,
    )


def test_repeated_phases_share_what_they_resolve_to_under_names_of_their_own() -> None:
    phases = drawn(["repeat: 2, phases: [{name: a, epochs: 1, freeze: trunk}, {name: b, steps: 3}]"]).phases
    assert [(phase.name, phase.length.name) for phase in phases] == [(n, n) for n in ("a.1", "b.1", "a.2", "b.2")]
    assert phases[0].freeze.plan is phases[2].freeze.plan
    assert [phase.num_steps for phase in phases] == [5, 3, 5, 3]


@pytest.mark.parametrize(
    ("keys", "restore", "plateau"),
    [
        ("restore: last", None, "higher"),
        ("restore: best", ("val/score", "higher"), "higher"),
        ("restore: {which: best, metric: val/depth/abs_rel}", ("val/depth/abs_rel", "lower"), "higher"),
        ("restore: {which: best, metric: val/depth/rmse}", ("val/depth/rmse", "lower"), "higher"),
        ("restore: {which: best, metric: val/depth/rmse, direction: higher}", ("val/depth/rmse", "higher"), "higher"),
        ("lr_schedule: plateau", None, "higher"),
        ("lr_schedule: {name: plateau, metric: train/loss}", None, "lower"),
        ("lr_schedule: {name: plateau, metric: val/object/accuracy, direction: lower}", None, "lower"),
    ],
)
def test_which_values_are_better_is_known_or_said(keys: str, restore: tuple[str, str] | None, plateau: str) -> None:
    (phase,) = drawn([f"name: a, epochs: 1, {keys}"]).phases
    assert (phase.restore, phase.plateau_direction) == (restore, plateau)


# Balancing


def test_each_method_and_set_of_active_tasks_has_weights_of_its_own_and_the_others_rest() -> None:
    phases = ["name: a, epochs: 1", "name: b, epochs: 1, tasks: [object]", "name: c, epochs: 1, tasks: [object, depth]"]
    phases += ["name: d, epochs: 1, balance: {method: mean}", "name: e, epochs: 1, tasks: [object]"]
    phases += ["name: f, epochs: 1, balance: {method: imtll}"]
    run = drawn(phases, "balance: {method: uw}")
    places = [list(run.root.get_submodule("balance").children()).index(phase.balance) for phase in run.phases]
    assert places == [0, 1, 0, 2, 1, 3]
    weights = {name: len(p) for name, p in run.root.named_parameters() if name.startswith("balance.")}
    assert weights == {
        "balance.0.scalarizer.log_var": 2,
        "balance.1.scalarizer.log_var": 1,
        "balance.3.scalarizer.log_scale": 2,
    }
    for phase, place in zip(run.phases, places, strict=True):
        own = {name for name in weights if name.startswith(f"balance.{place}.")}
        assert own == {name for name in phase.freeze.plan.names.trainable if name.startswith("balance.")}
        assert own == {name for name in table(run, phase) if name.startswith("balance.")}
        assert {*weights} - own == {name for name in phase.freeze.plan.names.frozen if name.startswith("balance.")}


@pytest.mark.parametrize(
    ("keys", "tasks"),
    [
        ("train: heads.depth", ("depth",)),
        ("freeze: [trunk, heads.object]", ("depth",)),
        ("freeze: [trunk, heads, '!heads.depth']", ("depth",)),
        ("train: trunk.layer3", ("depth", "object")),
        # Patterns of more than the parameters of trunk and heads
        ("train: [heads.depth, balance]", ("depth", "object")),
        ("freeze: [trunk, heads.object, '**.running_mean', '**.running_var', '**.num_batches_tracked']",
         ("depth", "object")),
    ],
    ids=str,
)  # fmt: skip
def test_a_task_whose_loss_reaches_frozen_parameters_only_has_none(keys: str, tasks: tuple[str, ...]) -> None:
    (phase,) = drawn([f"name: a, epochs: 1, {keys}"], "balance: {method: uw}").phases
    assert phase.tasks == tasks


def test_fixed_weights_are_those_of_the_active_tasks_in_the_run_s_order() -> None:
    phases = ["name: a, epochs: 1, tasks: [object]", "name: b, epochs: 1, tasks: [object, depth]"]
    config = drawn(phases, "balance: {method: fixed, weights: {object: 2, depth: 5}}").config
    a, b = build_model_setup(config).phases
    assert (a.tasks, a.balance.scalarizer.weights.tolist()) == (("object",), [2.0])
    assert (b.tasks, b.balance.scalarizer.weights.tolist()) == (("depth", "object"), [5.0, 2.0])


def test_a_method_that_steps_its_own_weights_is_in_no_group() -> None:
    run = drawn(["name: a, epochs: 1"], "balance: {method: famo}")
    (phase,) = run.phases
    assert isinstance(phase.balance.scalarizer, FAMO)
    (own,) = [name for name in phase.freeze.plan.names.trainable if name.startswith("balance.")]
    assert {*table(run, phase)} == {*phase.freeze.plan.names.trainable} - {own}


# Mistakes

_CLASSIC = "MODEL.NOT_TRAIN_IN_MULTI_TASK"
_NO_START = "matches nothing (the names start with: trunk, heads, normalize)"
_PARAMETERS = "matches nothing (nearest: {}; the names start with: trunk, heads)"
_NOTHING = f"phase 'a' trains nothing: every parameter is frozen; {HINT}"
_NO_OPTIMIZER = f"no optimizer 'admw'; nearest: adamw; there are: {OPTIMIZERS}, or your own as package.module:Name"
_RESERVED = "'lr' has a key of its own, next to optimizer"
_FEWER = "expected fewer than the phase's 5 steps, got "
_UNCOVERED = "no pattern covers {} trainable parameters, such as {}; add one for them"


@pytest.mark.parametrize(
    ("phase", "below", "mistake"),
    [
        # patterns that match nothing
        ("freeze: [trunk, hedas]", "", f"6: phases.a.freeze.1: pattern 'hedas' {START.format('heads')}"),
        ("", "freeze_always: [heads, tronk]", f"7: freeze_always.1: pattern 'tronk' {START.format('trunk')}"),
        ("", "MODEL: {NOT_TRAIN_IN_MULTI_TASK: [conv1, zz]}", f"7: {_CLASSIC}.1: pattern '~zz' {_NO_START}"),
        ("freeze: trunk", "MODEL: {NOT_TRAIN_IN_MULTI_TASK: zz}", f"7: {_CLASSIC}.0: pattern '~zz' {_NO_START}"),
        ("lr: {trunk: 1, hedas: 2}", "", f"6: phases.a.lr.hedas: pattern 'hedas' {_PARAMETERS.format('heads')}"),
        ("", "optim: {lr: {tronk: 1}}", f"7: optim.lr.tronk: pattern 'tronk' {_PARAMETERS.format('trunk')}"),
        ("weight_decay: {tronk: 1}", "",
         f"6: phases.a.weight_decay.tronk: pattern 'tronk' {_PARAMETERS.format('trunk')}"),
        # tables that leave something uncovered
        ("lr: {trunk: 1}", "", "6: phases.a.lr: " + _UNCOVERED.format(18, "heads.depth.lateral.0.weight")),
        ("", "optim: {weight_decay: {heads: 1}}",
         "7: optim.weight_decay: " + _UNCOVERED.format(15, "trunk.conv1.0.weight")),
        ("weight_decay: {trunk: 1}", "",
         "6: phases.a.weight_decay: " + _UNCOVERED.format(8, "heads.depth.lateral.0.weight")),
        # nothing trains
        ("freeze: [trunk, heads]", "balance: {method: uw}", f"6: phases.a.freeze: {_NOTHING}"),
        ("", "freeze_always: '**'",
         f"6: phases.a.freeze: phase 'a' trains nothing: every parameter is frozen (freeze_always freezes in every"
         f" phase); {HINT}"),
        ("train: heads.depth, tasks: [object]", "",
         f"6: phases.a.train: phase 'a' trains nothing: no active task reaches what is not frozen; {HINT}"),
        ("tasks: [object], freeze: trunk", "unreached: error",
         "6: phases.a: phase 'a' would train 16 tensors that no active task reaches: heads.depth;"
         " freeze them, or set unreached to freeze"),
        ("train: heads", "balance: {method: famo}",
         "6: phases.a.train: balance cannot be frozen, since its method steps its own weights:"
         " leave it out of freeze, or add it to train"),
        # names that there are not
        ("tasks: [object, depht]", "",
         "6: phases.a.tasks.1: no task 'depht'; there are: depth, object; nearest: depth"),
        ("restore: {which: best, metric: val/scor}", "",
         f"6: phases.a.restore.metric: no metric 'val/scor'; nearest: val/score; {THERE}"),
        ("lr_schedule: {name: plateau, metric: train/los}", "",
         f"6: phases.a.lr_schedule.metric: no metric 'train/los'; nearest: train/loss; {THERE}"),
        ("", "optim: {lr_schedule: {name: plateau, metric: zz}}",
         f"7: optim.lr_schedule.metric: no metric 'zz'; {THERE}"),
        ("optimizer: admw", "", f"6: phases.a.optimizer.name: {_NO_OPTIMIZER}"),
        ("", "optim: {optimizer: admw}", f"7: optim.optimizer.name: {_NO_OPTIMIZER}"),
        ("optimizer: {options: {lr: 1}}", "", f"6: phases.a.optimizer.options: {_RESERVED}"),
        ("", "optim: {optimizer: {options: {lr: 1}}}", f"7: optim.optimizer.options: {_RESERVED}"),
        ("lr_schedule: {name: cosine, warmup_steps: 5}", "", f"6: phases.a.lr_schedule.warmup_steps: {_FEWER}5"),
        ("", "optim: {lr_schedule: {name: linear, warmup_steps: 6}}",
         f"7: optim.lr_schedule.warmup_steps: {_FEWER}6"),
        ("balance: {method: fixed, weights: {depth: 1}}", "",
         "6: phases.a.balance.weights: expected a weight for each of depth, object, got depth"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_is_reported_at_the_place_where_it_was_written(phase: str, below: str, mistake: str) -> None:
    assert mistakes([f"name: a, epochs: 1{phase and ', '}{phase}"], below) == [f"run.yaml:{mistake}"]


def test_a_dead_pattern_of_train_is_reported_as_it_was_written() -> None:
    (mistake,) = mistakes(["name: a, epochs: 1, train: [heads.depth, hedas]"])
    assert mistake == f"run.yaml:6: phases.a.train.1: pattern 'hedas' {START.format('heads')}"


@pytest.mark.parametrize(
    ("until", "mistake"),
    [
        ("{plateau: val/scor}", f"plateau: no metric 'val/scor'; nearest: val/score; {THERE}"),
        ("{metric: zz, at_least: 1}", f"metric: no metric 'zz'; {THERE}"),
        ("{any: [{steps: 1}, {all: [{plateau: zz}]}]}", f"any.1.all.0.plateau: no metric 'zz'; {THERE}"),
    ],
)
def test_a_mistake_in_a_condition_is_reported_at_its_place(until: str, mistake: str) -> None:
    assert mistakes([f"name: a, max_epochs: 1, until: {until}"]) == [f"run.yaml:6: phases.a.until.{mistake}"]


@pytest.mark.parametrize("place", ["phase", "optim"])
def test_options_that_an_optimizer_does_not_take_are_reported_with_those_that_it_takes(place: str) -> None:
    option = "optimizer: {name: sgd, options: {momentun: 1}}"
    phase, below = (f", {option}", "") if place == "phase" else ("", f"optim: {{{option}}}")
    (mistake,) = mistakes([f"name: a, epochs: 1{phase}"], below)
    assert mistake.startswith("run.yaml:6: phases.a.optim" if place == "phase" else "run.yaml:7: optim.optim")
    assert "izer.options: sgd takes the options momentum, dampening, nesterov, " in mistake
    assert mistake.endswith("got an unexpected keyword argument 'momentun'")


def test_mistakes_of_several_phases_are_reported_at_once_and_that_of_a_repeated_one_once() -> None:
    inner = "{name: b, steps: 2, lr_schedule: {name: linear, warmup_steps: 2}}"
    found = mistakes(
        ["name: a, epochs: 1, freeze: '**'", f"repeat: 3, phases: [{inner}]", "name: c, epochs: 1, train: [hed]"]
    )
    assert [mistake.split(": ")[:2] for mistake in found] == [
        ["run.yaml:6", "phases.a.freeze"],
        ["run.yaml:7", "phases.b.lr_schedule.warmup_steps"],
        ["run.yaml:8", "phases.c.train.0"],
    ]


def test_unknown_tasks_are_reported_together_with_the_mistakes_of_other_phases() -> None:
    found = mistakes(["name: a, epochs: 1, tasks: [zz]", "name: b, epochs: 1, freeze: zz"])
    assert [mistake.split(": ")[1] for mistake in found] == ["phases.a.tasks.0", "phases.b.freeze.0"]


@pytest.mark.parametrize(
    ("phase", "mistake"),
    [
        ("steps: 2, lr_schedule: plateau", "phases.a.lr_schedule: a plateau is judged after whole passes of"),
        ("until: {plateau: val/score}, max_steps: 2", "phases.a.until: a metric is judged after whole passes of"),
        ("until: {any: [{steps: 1}, {metric: val/score, at_least: 1}]}, max_steps: 2", "phases.a.until: a metric is"),
        (
            "steps: 2, batch_size: 1",
            "phases.a.batch_size: expected batches of two images or more: BatchNorm (trunk.conv1.1) cannot train on",
        ),
        (
            "steps: 2, batch_size: 1, freeze: ['trunk@first:50%', trunk.layer4.0.bn1.weight]",
            "phases.a.batch_size: expected batches of two images or more: BatchNorm (trunk.layer",
        ),
        ("steps: 2, batch_size: 41", "phases.a.batch_size: expected batches of at most the 40 training images, got 41"),
        ("steps: 2, freeze: [trunk, '!trunk']", "phases.a.freeze: the patterns select nothing in the end"),
        ("steps: 2, freeze: [heads, '!heads.object', '!heads']", "phases.a.freeze: the patterns select nothing in"),
        (
            "steps: 2, balance: {method: fixed, weights: {depth: 0, object: 0}}",
            "phases.a.balance.weights: expected a weight above 0 for at least one of depth, object",
        ),
        (
            "steps: 2, tasks: [depth], balance: {method: fixed, weights: {depth: 0, object: 1}}",
            "phases.a.balance.weights: expected a weight above 0 for at least one of depth",
        ),
        (
            "steps: 2, balance: {method: stch, options: {mu: 1.0, weights: [0, 0.0]}}",
            "phases.a.balance.options: expected a number other than 0 in weights, got [0, 0.0]",
        ),
        (
            "steps: 2, balance: {method: upgrad, options: {pref_vector: [0, 0]}}",
            "phases.a.balance.options: expected a number other than 0 in pref_vector, got [0, 0]",
        ),
        (
            "steps: 2, tasks: [object], train: heads.depth, balance: mean",
            "phases.a.train: phase 'a' trains nothing: no active task reaches what is not frozen",
        ),
    ],
)
def test_what_could_never_happen_in_a_phase_is_refused(phase: str, mistake: str) -> None:
    (found,) = mistakes([f"name: a, {phase}"], "unreached: warn")
    assert found.startswith(f"run.yaml:6: {mistake}")


def test_the_same_holds_for_what_is_written_for_the_whole_run() -> None:
    for below, mistake in [
        ("freeze_always: [trunk, '!trunk']", "freeze_always: the patterns select nothing in the end"),
        ("optim: {accumulate: 6}", "optim.accumulate: expected at most the 5 batches of an epoch of 'a', got 6"),
        (
            "balance: {method: fixed, weights: {depth: 0, object: 0.0}}",
            "balance.weights: expected a weight above 0 for at least one of depth, object",
        ),
    ]:
        (found,) = mistakes(["name: a, epochs: 1", "name: b, epochs: 1"], below)
        assert found.startswith(f"run.yaml:8: {mistake}")
    with pytest.raises(
        ConfigError, match=r"^command line: data\.num_train: expected batches of at most the 7 training"
    ):
        drawn(["name: a, epochs: 1"], overrides=("data.num_train=7", "data.batch_size=null"))
    with pytest.raises(
        ConfigError, match=r"^run\.yaml:3: data\.batch_size: expected batches of at most the 7 training"
    ):
        drawn(["name: a, epochs: 1"], overrides=("data.num_train=7",))


@pytest.mark.parametrize(
    "phase",
    [
        "epochs: 1, freeze: trunk, tasks: [object]",
        "epochs: 1, freeze: 'type:BatchNorm2d'",
        "epochs: 1, train: [heads.object, '**.conv1.weight']",
        "evaluate_only: true",
    ],
)
def test_batches_of_one_image_are_taken_where_no_norm_trains(phase: str) -> None:
    (resolved,) = drawn([f"name: a, batch_size: 1, {phase}"]).phases
    assert resolved.batch_size == 1


def test_all_that_is_wrong_with_a_phase_is_reported_at_once() -> None:
    phase = "name: a, epochs: 1, freeze: [trnk], lr: {hds: 1.0}, weight_decay: {hds: 1.0}, restore: best"
    found = mistakes([f"{phase}, batch_size: 100", "name: b, epochs: 1, tasks: [dept]"], "freeze_always: [zz]")
    assert [mistake.split(": ")[1] for mistake in found] == [
        *("phases.b.tasks.0", "freeze_always.0"),
        *("phases.a.freeze.0", "phases.a.lr.hds", "phases.a.batch_size"),
    ]
