"""What may be written about phases: read as written, written back, unrolled, overridden; and each mistake in words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config_file import RUN, load, mistakes
from mtl.config import RunConfig, load_config
from mtl.config.phase import PhaseConfig, num_unrolled, unroll
from mtl.config.yaml_text import dump_yaml

HEAD = ["name: r", "trunk: {name: resnet18}", "tasks: {depth: {type: depth}}", "phases:"]
PHASE_KEYS = (
    "name, freeze, train, epochs, steps, until, max_epochs, max_steps, evaluate_only, tasks, lr, layer_decay,"
    " optimizer, lr_schedule, weight_decay, balance, batch_size, cache, optimizer_state,"
    " restore"
)

_ONE_OF = ": expected exactly one of epochs, steps, until, evaluate_only"


def phase_of(keys: str) -> PhaseConfig:
    """A phase on line 5, of these keys in YAML's flow style."""
    (phase,) = load([*HEAD, f"  - {{name: a, {keys}}}"]).phases
    assert isinstance(phase, PhaseConfig)
    return phase


# Read as written


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("epochs: 3, freeze: trunk", {"epochs": 3, "freeze": ["trunk"]}),
        ("steps: 7, freeze: []", {"steps": 7, "freeze": []}),
        ("epochs: 1, train: heads", {"epochs": 1, "train": ["heads"]}),
        ("evaluate_only: true", {"evaluate_only": True}),
        ("until: {epochs: 2}, max_epochs: 4", {"until": {"epochs": 2}, "max_epochs": 4}),
        ("until: {steps: 2}, max_steps: 4", {"until": {"steps": 2}, "max_steps": 4}),
        ("until: {steps: 1}, max_epochs: 4, max_steps: 9", {"until": {"steps": 1}, "max_epochs": 4, "max_steps": 9}),
    ],
)
def test_a_phase_is_read_as_it_was_written_and_nothing_else_is_set(written: str, expected: dict[str, Any]) -> None:
    assert phase_of(written).model_dump(exclude_unset=True) == {"name": "a", **expected}


@pytest.mark.parametrize(
    "written",
    [
        {"wall_time_s": 0.5},
        {"plateau": "m"},
        {"plateau": "m", "patience": 2, "min_delta": 0.0, "direction": "lower"},
        {"metric": "m", "at_least": 0.9},
        {"metric": "m", "at_most": -1.0},
        {"metric": "m", "at_most": 0.0},
        {"any": [{"steps": 5}, {"all": [{"epochs": 2}, {"metric": "m", "at_least": 1.0}]}]},
    ],
    ids=str,
)
def test_a_condition_is_read_as_it_was_written(written: dict[str, Any]) -> None:
    until = phase_of(f"max_epochs: 1, until: {json.dumps(written)}").until
    assert until is not None
    assert until.model_dump(exclude_unset=True) == written


@pytest.mark.parametrize(
    ("key", "written", "expected"),
    [
        ("freeze", "[trunk, '!trunk.layer4']", ["trunk", "!trunk.layer4"]),
        ("train", "{pattern: heads, must_match: 4}", [{"pattern": "heads", "must_match": 4}]),
        ("tasks", "[depth]", ["depth"]),
        ("lr", "1e-3", 0.001),
        ("lr", "{trunk: 1, heads: 2.5}", {"trunk": 1.0, "heads": 2.5}),
        ("layer_decay", "0.75", 0.75),
        ("weight_decay", "0", 0.0),
        ("weight_decay", "{trunk: 0, heads: 1}", {"trunk": 0.0, "heads": 1.0}),
        ("optimizer", "sgd", {"name": "sgd"}),
        ("optimizer", "{name: sgd, options: {momentum: 0.9}}", {"name": "sgd", "options": {"momentum": 0.9}}),
        ("optimizer", "{options: {eps: 1}}", {"options": {"eps": 1}}),
        ("lr_schedule", "cosine", {"name": "cosine"}),
        ("lr_schedule", "one-cycle", {"name": "one-cycle"}),
        ("lr_schedule", "slanted-triangle", {"name": "slanted-triangle"}),
        ("lr_schedule", "{name: slanted-triangle, ratio: 8}", {"name": "slanted-triangle", "ratio": 8.0}),
        ("lr_schedule", "plateau", {"name": "plateau"}),
        ("lr_schedule", "{name: linear, warmup_steps: 3}", {"name": "linear", "warmup_steps": 3}),
        (
            "lr_schedule",
            "{name: step, every_epochs: 2, factor: 0.5, warmup_steps: 0}",
            {"name": "step", "every_epochs": 2, "factor": 0.5, "warmup_steps": 0},
        ),
        ("balance", "{method: fixed, weights: {depth: 2}}", {"method": "fixed", "weights": {"depth": 2.0}}),
        ("batch_size", "5", 5),
        ("optimizer_state", "reset", "reset"),
        ("restore", "best", {"which": "best"}),
        ("restore", "{which: best, metric: m}", {"which": "best", "metric": "m"}),
        ("restore", "{which: best, direction: higher}", {"which": "best", "direction": "higher"}),
        ("restore", "last", {"which": "last"}),
        ("tasks", "depth", ["depth"]),
        ("balance", "uw", {"method": "uw"}),
    ],
)
def test_a_setting_of_a_phase_is_read_as_written_in_short_and_long(key: str, written: str, expected: Any) -> None:
    assert phase_of(f"epochs: 1, {key}: {written}").model_dump(exclude_unset=True)[key] == expected


def test_what_a_phase_does_not_say_has_these_values() -> None:
    assert phase_of("epochs: 1").model_dump(exclude_none=True) == {
        "name": "a",
        "epochs": 1,
        "evaluate_only": False,
        "optimizer_state": "keep",
        "restore": {"which": "last"},
    }


def test_what_holds_for_every_phase_is_read_as_written() -> None:
    lines = [*HEAD, "  - {name: a, epochs: 1}"]
    assert (load(lines).freeze_always, load(lines).unreached) == ([], "freeze")
    config = load([*lines, "freeze_always: [trunk, '!trunk.fc']", "unreached: warn"])
    assert (config.freeze_always, config.unreached) == (["trunk", "!trunk.fc"], "warn")
    config = load([*lines, "freeze_always: trunk", "unreached: error"])
    assert (config.freeze_always, config.unreached) == (["trunk"], "error")


@pytest.mark.parametrize(
    ("written", "key"),
    [("epochs: 1", "freeze"), ("epochs: 1, train: heads", "train"), ("evaluate_only: true", "evaluate_only")],
)
def test_what_is_frozen_is_said_under_this_key(written: str, key: str) -> None:
    assert phase_of(written).patterns_key == key


# Written back

_LEAVES = st.sampled_from(
    [
        {"plateau": "val/score"},
        {"plateau": "on", "patience": 3, "min_delta": 1e-3, "direction": "lower"},
        {"metric": "1e5", "at_least": 0},
        {"metric": "m", "at_most": -2.5},
        {"wall_time_s": 60},
        {"epochs": 2},
        {"steps": 9},
    ]
)
_UNTIL = st.recursive(
    _LEAVES,
    lambda inner: st.builds(
        lambda key, conditions: {key: conditions}, st.sampled_from(["any", "all"]), st.lists(inner, min_size=1)
    ),
    max_leaves=5,
)
_PATTERNS = st.lists(
    st.sampled_from(["trunk", "!heads", "~#", "**.bias", {"pattern": "~1", "must_match": 3}]), min_size=1, max_size=3
)
_LENGTH = st.one_of(
    st.fixed_dictionaries({"epochs": st.integers(1, 9)}),
    st.fixed_dictionaries({"steps": st.integers(1, 9)}),
    st.fixed_dictionaries({"until": _UNTIL, "max_epochs": st.integers(1, 9)}, optional={"max_steps": st.just(4)}),
)
_RATES = st.floats(1e-9, 1) | st.just({"trunk": 1e-5, "heads": 1})
_SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "tasks": st.just(["depth"]),
        "lr": _RATES,
        "layer_decay": st.floats(0.1, 1),
        "optimizer": st.sampled_from(["sgd", {"name": "adamw", "options": {"betas": [0.9, 0.99], "maximize": None}}]),
        "lr_schedule": st.sampled_from(
            ["constant", "linear", {"name": "step", "every_epochs": 2}, {"name": "plateau", "metric": "null"}]
        ),
        "weight_decay": _RATES | st.just(0),
        "balance": st.sampled_from([{"method": "uw"}, {"method": "fixed", "weights": {"depth": 0}}]),
        "batch_size": st.integers(1, 9),
        "optimizer_state": st.sampled_from(["keep", "reset"]),
        "restore": st.sampled_from(["best", "last", {"which": "best", "metric": "m", "direction": "lower"}]),
    },
)
_FROZEN = st.just({}) | st.builds(lambda key, p: {key: p}, st.sampled_from(["freeze", "train"]), _PATTERNS)
_PHASE = st.builds(lambda *parts: {k: v for part in parts for k, v in part.items()}, _LENGTH, _SETTINGS, _FROZEN)
_ENTRIES = st.lists(
    st.recursive(
        _PHASE,
        lambda inner: st.fixed_dictionaries(
            {"repeat": st.integers(1, 3), "phases": st.lists(inner, min_size=1, max_size=3)}
        ),
        max_leaves=5,
    ),
    min_size=1,
    max_size=3,
)


def named(entries: list[dict[str, Any]], prefix: str = "p") -> list[dict[str, Any]]:
    """Entries with a name of its own for each phase, none of which is a number."""
    return [
        {**entry, "phases": named(entry["phases"], f"{prefix}{number}-")}
        if "repeat" in entry
        else {"name": f"{prefix}{number}", **entry}
        for number, entry in enumerate(entries)
    ]


def run_with(phases: list[dict[str, Any]]) -> RunConfig:
    run = {"name": "r", "trunk": {"name": "x"}, "tasks": {"depth": {"type": "depth"}}, "phases": phases}
    RUN.write_text(dump_yaml(run))
    return load_config(RUN)


@settings(max_examples=60, derandomize=True)
@given(entries=_ENTRIES)
def test_phases_written_back_as_the_trainer_does_are_the_same(entries: list[dict[str, Any]]) -> None:
    config = run_with(named(entries))
    text = dump_yaml(config.model_dump(mode="json", exclude_none=True))
    RUN.write_text(text)
    again = load_config(RUN)
    assert again.phases == config.phases
    assert again.model_dump() == config.model_dump()
    assert dump_yaml(again.model_dump(mode="json", exclude_none=True)) == text


# Repeats written out

NESTED = [
    *HEAD,
    "  - {name: a, epochs: 1}",
    "  - repeat: 2",
    "    phases:",
    "      - {name: b, epochs: 1}",
    "      - repeat: 2",
    "        phases:",
    "          - {name: c, steps: 1}",
    "          - {name: d, steps: 2}",
    "  - {name: e, epochs: 1}",
]


def test_repeats_are_written_out_in_this_order_under_these_names() -> None:
    b, c, d = (1, "phases", 0), (1, "phases", 1, "phases", 0), (1, "phases", 1, "phases", 1)
    table = [
        ("a", (0,)),
        *[("b.1", b), ("c.1.1", c), ("d.1.1", d), ("c.1.2", c), ("d.1.2", d)],
        *[("b.2", b), ("c.2.1", c), ("d.2.1", d), ("c.2.2", c), ("d.2.2", d)],
        ("e", (2,)),
    ]
    written = load(NESTED).written_phases
    assert [(phase.name, phase.path) for phase in written] == [(name, ("phases", *path)) for name, path in table]
    assert [phase.config.name for phase in written] == [name.split(".")[0] for name, _ in table]


@settings(max_examples=60, derandomize=True)
@given(entries=_ENTRIES)
def test_as_many_phases_are_counted_as_are_written_out(entries: list[dict[str, Any]]) -> None:
    phases = run_with(named(entries)).phases
    unrolled = list(unroll(phases))
    assert num_unrolled(phases) == len(unrolled) == len({phase.name for phase in unrolled})


def test_a_thousand_phases_are_allowed() -> None:
    config = load([*HEAD, "  - {repeat: 50, phases: [{repeat: 20, phases: [{name: a, epochs: 1}]}]}"])
    assert [config.written_phases[place].name for place in (0, 20, 999)] == ["a.1.1", "a.2.1", "a.50.20"]


# Overrides


@pytest.mark.parametrize(
    ("override", "lengths"),
    [
        ("phases.e.epochs=7", {"a": 1, "b": 1, "c": 1, "d": 2, "e": 7}),
        ("phases.b.epochs=7", {"a": 1, "b": 7, "c": 1, "d": 2, "e": 1}),
        ("phases.d.steps=7", {"a": 1, "b": 1, "c": 1, "d": 7, "e": 1}),
        ("phases.1.phases.1.phases.c.steps=7", {"a": 1, "b": 1, "c": 7, "d": 2, "e": 1}),
        ("phases.1.phases.c={name: z, epochs: 7}", {"a": 1, "b": 1, "z": 7, "d": 2, "e": 1}),
    ],
)
def test_an_override_reaches_one_phase_by_its_name_inside_repeats_too(override: str, lengths: dict[str, int]) -> None:
    written = load(NESTED, override).written_phases
    assert {phase.config.name: phase.config.epochs or phase.config.steps for phase in written} == lengths
    assert len(written) == 12


def test_an_override_changes_how_often_phases_are_repeated() -> None:
    names = [phase.name for phase in load(NESTED, "phases.1.repeat=1", "phases.1.phases.1.repeat=1").written_phases]
    assert names == ["a", "b.1", "c.1.1", "d.1.1", "e"]


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("phases.b.epoch=2", "command line: phases.b.epoch: unknown key; nearest: epochs"),
        (
            "phases.c.steps=0",
            "command line: phases.c.steps: expected a number greater than or equal to 1, got 0",
        ),
        ("phases.d.epochs=3", f"run.yaml:12: phases.d{_ONE_OF}, not epochs and steps"),
        ("phases.1.repeat=0", "command line: phases.1.repeat: expected a number greater than or equal to 1, got 0"),
        ("phases.f.steps=2", "command line: 'phases.f.steps=2': 'f' is none of a, b, c, d, e, 0 to 2"),
        ("phases.c=3", "command line: phases.1.phases.1.phases.0: expected keys and values, got 3"),
        ("phases.b.1.epochs=2", f"command line: phases.b.1: unknown key; the keys here are {PHASE_KEYS}"),
    ],
)
def test_a_mistake_in_an_override_is_placed_at_the_phase_that_it_reaches(override: str, mistake: str) -> None:
    assert mistakes(NESTED, override) == [mistake]


# Mistakes


_LIMIT = ": expected max_epochs and max_steps only with until"
_NEITHER = "with evaluate_only: everything is frozen, and nothing stepped"
_NAMES = (
    ".lr_schedule.name: expected one of constant, cosine, linear, step, plateau, one-cycle, slanted-triangle,"
    " package.module:Name"
)


@pytest.mark.parametrize(
    ("keys", "mistake"),
    [
        ("epochs: 1, steps: 1", f"{_ONE_OF}, not epochs and steps"),
        ("evaluate_only: true, epochs: 2", f"{_ONE_OF}, not epochs and evaluate_only"),
        ("evaluate_only: false", _ONE_OF),
        ("epochs: 0", ".epochs: expected a number greater than or equal to 1, got 0"),
        ("steps: -3", ".steps: expected a number greater than or equal to 1, got -3"),
        ("steps: 1, until: {epochs: 1}, max_epochs: 3", f"{_ONE_OF}, not steps and until"),
        ("evaluate_only: true, until: {epochs: 1}, max_epochs: 3", f"{_ONE_OF}, not until and evaluate_only"),
        ("until: {epochs: 1}, max_epochs: 0", ".max_epochs: expected a number greater than or equal to 1, got 0"),
        (
            "until: {epochs: 1}, max_epochs: 3, max_steps: 0",
            ".max_steps: expected a number greater than or equal to 1, got 0",
        ),
        ("epochs: 1, max_steps: 2", _LIMIT),
        ("evaluate_only: true, max_epochs: 2", _LIMIT),
        ("batch_size: 3", _ONE_OF),
        ("until: {epochs: 1}", ": expected max_epochs or max_steps with until"),
        ("epochs: 1, max_epochs: 2", _LIMIT),
        ("steps: 1, max_steps: 2", _LIMIT),
        ("evaluate_only: true, max_steps: 2", _LIMIT),
        ("evaluate_only: 1", ".evaluate_only: expected a valid boolean, got 1"),
        ("epochs: 1, freeze: [trunk], train: [heads]", ": expected freeze or train, not both"),
        ("epochs: 1, freeze: [], train: [heads]", ": expected freeze or train, not both"),
        ("evaluate_only: true, freeze: [trunk]", f": expected no freeze {_NEITHER}"),
        ("evaluate_only: true, freeze: []", f": expected no freeze {_NEITHER}"),
        ("evaluate_only: true, train: heads", f": expected no train {_NEITHER}"),
        ("evaluate_only: true, lr: 1", f": expected no lr {_NEITHER}"),
        ("epochs: 1, restore: {which: last, metric: m}", ".restore: expected metric and direction only with best"),
        ("epochs: 1, train: []", ".train: expected at least one, got none"),
        ("epochs: 1, tasks: []", ".tasks: expected at least one, got none"),
        ("epochs: 1, layer_decay: 1.1", ".layer_decay: expected a number less than or equal to 1, got 1.1"),
        ("epochs: 1, optimizer_state: kep", ".optimizer_state: expected one of keep, reset, got 'kep'; nearest: keep"),
        ("epochs: 1, restore: bst", ".restore.which: expected one of best, last, got 'bst'; nearest: best"),
        ("epochs: 1, restore: {metric: m}", ".restore.which: this key is required"),
        ("epochs: 1, lr_schedule: step", ".lr_schedule.every_epochs: this key is required"),
        ("epochs: 1, lr_schedule: {warmup_steps: 3}", ".lr_schedule.name: this key is required"),
        ("epochs: 1, lr_schedule: cosin", f"{_NAMES}, got 'cosin'; nearest: cosine"),
    ],
)
def test_a_mistake_in_a_phase_is_reported_with_place_key_and_what_was_expected(keys: str, mistake: str) -> None:
    assert mistakes([*HEAD, f"  - {{name: a, {keys}}}"]) == [f"run.yaml:5: phases.a{mistake}"]
    inside = [*HEAD, "  - repeat: 2", "    phases:", f"      - {{name: a, {keys}}}"]
    assert mistakes(inside) == [f"run.yaml:7: phases.a{mistake}"]


_KINDS = ": expected exactly one of plateau, metric, wall_time_s, epochs, steps, any, all"
_MARK = ": expected either at_least or at_most with metric"


@pytest.mark.parametrize(
    ("until", "mistake"),
    [
        ("{}", _KINDS),
        ("{patience: 2}", _KINDS),
        ("{epochs: 1, steps: 2}", f"{_KINDS}, not epochs and steps"),
        ("{any: [{all: [{}]}]}", f".any.0.all.0{_KINDS}"),
        ("{any: []}", ".any: expected at least one, got none"),
        ("{any: [{all: []}]}", ".any.0.all: expected at least one, got none"),
        ("{any: {epochs: 1}}", ".any: expected a valid list"),
        ("{any: [{epoch: 1}]}", ".any.0.epoch: unknown key; nearest: epochs"),
        ("plateau", ": expected keys and values, got 'plateau'"),
        ("{epochs: 1, patience: 2}", ": expected patience only with plateau"),
        ("{steps: 1, min_delta: 2}", ": expected min_delta only with plateau"),
        ("{metric: m, at_least: 1, direction: higher}", ": expected direction only with plateau"),
        ("{metric: m}", _MARK),
        ("{metric: m, at_least: 1, at_most: 2}", _MARK),
        ("{epochs: 2, at_most: 1}", ": expected at_most only with metric"),
        ("{plateau: m, at_least: 0}", ": expected at_least only with metric"),
        ("{epochs: 2, at_least: 1, at_most: 1}", ": expected at_least only with metric"),
        ("{metric: m, at_least: .inf}", ".at_least: expected a finite number, got inf"),
        ("{epochs: 0}", ".epochs: expected a number greater than or equal to 1, got 0"),
        ("{any: [{steps: -1}]}", ".any.0.steps: expected a number greater than or equal to 1, got -1"),
        ("{wall_time_s: 0}", ".wall_time_s: expected a number greater than 0, got 0"),
        ("{plateau: m, patience: 0}", ".patience: expected a number greater than or equal to 1, got 0"),
        ("{plateau: m, direction: lwer}", ".direction: expected one of higher, lower, got 'lwer'; nearest: lower"),
    ],
)
def test_a_mistake_in_a_condition_is_reported_with_its_place(until: str, mistake: str) -> None:
    lines = [*HEAD, "  - name: a", "    max_epochs: 1", f"    until: {until}"]
    assert mistakes(lines) == [f"run.yaml:7: phases.a.until{mistake}"]


@pytest.mark.parametrize(
    ("key", "written", "mistake"),
    [
        ("until", "{platau: m}", "platau: unknown key; nearest: plateau"),
        ("restore", "{which: best, metrc: m}", "metrc: unknown key; nearest: metric"),
        ("balance", "{weigths: {depth: 1}}", "weigths: unknown key; nearest: weights"),
        ("optimizer", "{nme: sgd}", "nme: unknown key; nearest: name"),
        ("optimizer", "{momentum: 1}", "momentum: unknown key; the keys here are name, options"),
        ("lr_schedule", "{name: plateau, patince: 3}", "patince: unknown key; nearest: patience"),
        ("lr_schedule", "{name: cosine, factor: 1}", "factor: unknown key; the keys here are warmup_steps, name"),
        ("lr_schedule", "{name: one-cycle, warmup_steps: 3}", "warmup_steps: unknown key; the keys here are name"),
        ("lr_schedule", "{name: slanted-triangle, cut_frac: 1}", "cut_frac: expected a number less than 1, got 1"),
    ],
)
def test_an_unknown_key_is_compared_with_the_keys_at_its_own_place(key: str, written: str, mistake: str) -> None:
    length = "max_epochs: 1" if key == "until" else "epochs: 1"
    lines = [*HEAD, f"  - {{name: a, {length}, {key}: {written}}}"]
    assert mistakes(lines) == [f"run.yaml:5: phases.a.{key}.{mistake}"]


_A, _B = "{name: a, steps: 1}", "phases: [{name: b, steps: 1}]"
_TOO_MANY = "4: phases: expected at most 1000 phases, repeats written out"
_NOT = "4: phases: expected a name of its own for every phase, not"


@pytest.mark.parametrize(
    ("entries", "mistake"),
    [
        (["{repeat: 2}"], "5: phases.0.phases: this key is required"),
        (["{repeat: 2, phases: []}"], "5: phases.0.phases: expected at least one, got none"),
        ([_A, f"{{repeat: 0, {_B}}}"], "6: phases.1.repeat: expected a number greater than or equal to 1, got 0"),
        ([f"{{repeat: two, {_B}}}"], "5: phases.0.repeat: expected a valid integer, got 'two'"),
        ([f"{{repeat: 2, name: b, {_B}}}"], "5: phases.0.name: unknown key; the keys here are repeat, phases"),
        ([f"{{repeat: 1001, {_B}}}"], _TOO_MANY),
        ([f"{{repeat: 50, phases: [{{repeat: 20, {_B}}}]}}", _A], _TOO_MANY),
        ([_A, _A], f"{_NOT} a twice"),
        ([f"{{repeat: 2, phases: [{_A}]}}", "{name: a.2, steps: 1}"], f"{_NOT} a.2 twice"),
        (["{name: '', steps: 1}"], "5: phases.0.name: expected text of at least 1 character, got ''"),
        (["warm"], "5: phases.0: expected keys and values, got 'warm'"),
    ],
)
def test_a_mistake_in_the_list_of_phases_is_reported_with_its_place(entries: list[str], mistake: str) -> None:
    assert mistakes([*HEAD, *(f"  - {entry}" for entry in entries)]) == [f"run.yaml:{mistake}"]


def test_phases_that_contain_themselves_are_a_clear_error() -> None:
    lines = [*HEAD[:-1], "phases: &p [{repeat: 2, phases: *p}]"]
    assert mistakes(lines) == ["run.yaml:4: phases.0.phases: the value contains itself"]


# Phases by name


@pytest.mark.parametrize(
    ("keys", "mistake"),
    [
        ("lr: 1, steps: 1, lr: 2, name: a", "phases.a.lr: this key is given twice"),
        ("name: a, lr: !!int x", "phases.a.lr: cannot be read as int"),
        ("name: a, until: &u {any: [*u]}", "phases.a.until.any.0: the value contains itself"),
    ],
)
def test_what_cannot_even_be_read_is_reported_by_the_phases_name_too(keys: str, mistake: str) -> None:
    assert mistakes([*HEAD, f"  - {{{keys}}}"]) == [f"run.yaml:5: {mistake}"]
    assert mistakes([*HEAD, "  - repeat: 2", "    phases:", f"      - {{{keys}}}"]) == [f"run.yaml:7: {mistake}"]


def test_a_phase_is_reported_by_its_name_wherever_it_stands_and_one_without_by_its_place() -> None:
    config = load(NESTED)
    places = config.written_phases
    messages = {written.name: str(config.mistake((*written.path, "freeze", 0), "x")) for written in places}
    assert messages["a"] == "run.yaml:5: phases.a.freeze.0: x"
    assert messages["c.2.1"] == messages["c.1.2"] == "run.yaml:11: phases.c.freeze.0: x"
    assert str(config.mistake(("phases", 1, "phases", 1, "repeat"), "x")) == "run.yaml:9: phases.1.phases.1.repeat: x"
    lines = [*HEAD, "  - {epochs: 1, lr: 0}", "  - {name: 3, epochs: 0}", "  - {name: 'a: b', epochs: 0}"]
    assert [mistake.split(": ")[1] for mistake in mistakes(lines)] == [
        *("phases.0.name", "phases.0.lr", "phases.1.name", "phases.1.epochs", "phases.2.epochs")
    ]
