from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from config_file import RUN, load, mistakes
from mtl.config import ConfigError, RunConfig, load_config
from mtl.config.phase import patterns_of
from mtl.config.types import Strict
from mtl.config.yaml_text import dump_yaml
from mtl.optim.optimizers import UncoveredError, by_pattern
from mtl.patterns import Counted, PatternError
from runs import tiny_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

LINES = """\
name: small
trunk: {name: resnet18}
data: {image_size: 32}
tasks:
  depth: {type: depth}
  object: {type: classification, num_classes: 10}
phases:
  - {name: warm, freeze: [trunk], steps: 2}
  - {name: tune, epochs: 3, lr: {trunk: 1e-4, heads: 1e-3}}
""".splitlines()


def with_line(number: int, text: str) -> list[str]:
    """The lines with one of them replaced; line 10 is a new one."""
    lines = [*LINES, ""]
    lines[number - 1] = text
    return lines


def dump(config: RunConfig) -> str:
    """As the trainer writes a run's `config.yaml`."""
    return dump_yaml(config.model_dump(mode="json", exclude_none=True))


def test_a_good_config_is_read_as_written() -> None:
    config = load(LINES)
    assert (config.name, config.trunk.name, config.data.image_size) == ("small", "resnet18", 32)
    assert [(name, task.type) for name, task in config.tasks.items()] == [
        ("depth", "depth"),
        ("object", "classification"),
    ]
    warm, tune = config.phases
    assert (warm.name, warm.freeze, warm.steps, warm.epochs, warm.lr) == ("warm", ["trunk"], 2, None, None)
    assert (tune.name, tune.freeze, tune.steps, tune.epochs) == ("tune", None, None, 3)
    assert tune.lr == {"trunk": 1e-4, "heads": 1e-3}
    assert config.run_dir == Path("runs/small")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_a_config_of_the_repository_loads_under_its_own_name(file: Path) -> None:
    assert load_config(file).name == file.stem


def test_the_config_that_the_scripts_train_is_in_the_repository() -> None:
    assert "scenes.yaml" in [file.name for file in CONFIGS]


# One mistake of each kind


@pytest.mark.parametrize(
    ("line", "text", "mistake"),
    [
        # unknown keys, at every depth
        (10, "nme: x", "run.yaml:10: nme: unknown key; nearest: name"),
        (3, "data: {imge_size: 32}", "run.yaml:3: data.imge_size: unknown key; nearest: image_size"),
        (
            5,
            "  depth: {type: normals, zz: 1}",
            "run.yaml:5: tasks.depth.zz: unknown key;"
            " the keys here are type, label, data, head, metrics, unlabelled, loss",
        ),
        (
            6,
            "  object: {type: classification, num_classes: 10, num_class: 3}",
            "run.yaml:6: tasks.object.num_class: unknown key; nearest: num_classes",
        ),
        (
            8,
            "  - {name: warm, steps: 2, frezee: [trunk]}",
            "run.yaml:8: phases.warm.frezee: unknown key; nearest: freeze",
        ),
        (
            10,
            "MODEL: {NOT_TRAIN: [a]}",
            "run.yaml:10: MODEL.NOT_TRAIN: unknown key; nearest: NOT_TRAIN_IN_MULTI_TASK",
        ),
        (10, "audit: {x: 1}", "run.yaml:10: audit.x: unknown key; the keys here are policy, gradients_every_steps"),
        # missing keys have the place of what is around them
        (1, "seed: 0", "run.yaml:1: name: this key is required"),
        (2, "trunk: {weights: none}", "run.yaml:2: trunk.name: this key is required"),
        (5, "  depth: {}", "run.yaml:5: tasks.depth.type: this key is required"),
        (6, "  object: {type: keypoints}", "run.yaml:6: tasks.object.num_points: this key is required"),
        (9, "  - {epochs: 3}", "run.yaml:9: phases.1.name: this key is required"),
        # wrong types: nothing is converted
        (3, "data: {image_size: true}", "run.yaml:3: data.image_size: expected a valid integer, got True"),
        (3, "data: {image_size: 32.0}", "run.yaml:3: data.image_size: expected a valid integer, got 32.0"),
        (3, "data: {image_size: '32'}", "run.yaml:3: data.image_size: expected a valid integer, got '32'"),
        (3, "data: {image_size:}", "run.yaml:3: data.image_size: expected a valid integer, got nothing"),
        (3, "data: {image_size: [32]}", "run.yaml:3: data.image_size: expected a valid integer"),
        (2, "trunk: {name: 18}", "run.yaml:2: trunk.name: expected a valid string, got 18"),
        (2, "trunk: {name: true}", "run.yaml:2: trunk.name: expected a valid string, got True"),
        (10, "optim: {lr: '1e-3'}", "run.yaml:10: optim.lr: expected a valid number, got '1e-3'"),
        (10, "optim: {lr: true}", "run.yaml:10: optim.lr: expected a valid number, got True"),
        (8, "  - {name: warm, freeze: 3, steps: 2}", "run.yaml:8: phases.warm.freeze: expected a valid list, got 3"),
        (
            8,
            "  - {name: warm, freeze: [trunk, 3], steps: 2}",
            "run.yaml:8: phases.warm.freeze.1: expected a valid string, got 3",
        ),
        # out of range
        (
            3,
            "data: {image_size: 7}",
            "run.yaml:3: data.image_size: expected a number greater than or equal to 8, got 7",
        ),
        (10, "seed: -1", "run.yaml:10: seed: expected a number greater than or equal to 0, got -1"),
        (10, "optim: {lr: 0}", "run.yaml:10: optim.lr: expected a number greater than 0, got 0"),
        (10, "optim: {lr: .nan}", "run.yaml:10: optim.lr: expected a finite number, got nan"),
        (
            8,
            "  - {name: warm, steps: 0}",
            "run.yaml:8: phases.warm.steps: expected a number greater than or equal to 1, got 0",
        ),
        (
            10,
            "balance: {method: fixed, weights: {depth: -1}}",
            "run.yaml:10: balance.weights.depth: expected a number greater than or equal to 0, got -1",
        ),
        # a choice that is none
        (
            5,
            "  depth: {type: dept}",
            "run.yaml:5: tasks.depth.type: expected one of segmentation, depth, normals, classification,"
            " ordinal, multilabel, regression, edges, saliency, keypoints, distill, package.module:Name, got 'dept';"
            " nearest: depth",
        ),
        (
            10,
            "optim: {lr_schedule: cosin}",
            "run.yaml:10: optim.lr_schedule.name: expected one of constant, cosine, linear, step, plateau, one-cycle,"
            " slanted-triangle, package.module:Name, got 'cosin'; nearest: cosine",
        ),
        (10, "precision: x", "run.yaml:10: precision: expected one of fp32, bf16, fp16, auto, got 'x'"),
        (10, "precision: 16", "run.yaml:10: precision: expected one of fp32, bf16, fp16, auto, got 16; nearest: fp16"),
        # what two keys say together
        (8, "  - {name: warm}", "run.yaml:8: phases.warm: expected exactly one of epochs, steps, until, evaluate_only"),
        (
            9,
            "  - {name: tune, epochs: 3, steps: 4}",
            "run.yaml:9: phases.tune: expected exactly one of epochs, steps, until, evaluate_only,"
            " not epochs and steps",
        ),
        (10, "balance: {method: fixed}", "run.yaml:10: balance: expected weights exactly if the method is 'fixed'"),
        (
            10,
            "balance: {method: uw, weights: {depth: 1}}",
            "run.yaml:10: balance: expected weights exactly if the method is 'fixed'",
        ),
        (
            10,
            "balance: {method: fixed, weights: {depth: 1}, options: {x: 1}}",
            "run.yaml:10: balance: expected options or a preset only for other methods than 'fixed'",
        ),
        (
            3,
            "data: {augment: {}}",
            "run.yaml:3: data.augment: expected brightness or contrast above 0",
        ),
        # learning rates
        *(
            (
                9,
                f"  - {{name: tune, epochs: 3, lr: {lr}}}",
                f"run.yaml:9: phases.tune.lr: expected {expected}",
            )
            for lr, expected in [
                ("0", "a number greater than 0, got 0"),
                ("-1", "a number greater than 0, got -1"),
                ("true", "a valid number, got True"),
                ("'1e-3'", "a valid number, got '1e-3'"),
                (".nan", "a finite number, got nan"),
            ]
        ),
        (
            9,
            "  - {name: tune, epochs: 3, lr: {}}",
            "run.yaml:9: phases.tune.lr: expected at least one, got none",
        ),
    ],
)
def test_a_mistake_is_named_with_place_key_and_what_was_expected(line: int, text: str, mistake: str) -> None:
    assert mistakes(with_line(line, text)) == [mistake]


@pytest.mark.parametrize(
    ("line", "text", "start", "end"),
    [
        (1, "name: a b", "run.yaml:1: name: ", ", got 'a b'"),
        (1, "name: ''", "run.yaml:1: name: ", ", got ''"),
        (1, "name: a/b", "run.yaml:1: name: ", ", got 'a/b'"),
        (10, "device: gpu", "run.yaml:10: device: ", ", got 'gpu'; nearest: cuda"),
        (10, "device: cuda:x", "run.yaml:10: device: ", ", got 'cuda:x'; nearest: cuda"),
        (5, "  my-depth: {type: depth}", "run.yaml:5: tasks.my-depth: ", ", got 'my-depth'"),
        (5, "  4d: {type: depth}", "run.yaml:5: tasks.4d: ", ", got '4d'"),
        (5, "  depth: 3", "run.yaml:5: tasks.depth: expected keys and values", ", got 3"),
        (2, "trunk: resnet18", "run.yaml:2: trunk: expected keys and values", ", got 'resnet18'"),
        (
            10,
            "audit: {gradients_every_steps: -1}",
            "run.yaml:10: audit.gradients_every_steps: expected a number greater than or equal to 0",
            ", got -1",
        ),
        (
            10,
            "audit: {gradients_every_steps: often}",
            "run.yaml:10: audit.gradients_every_steps: expected a valid integer",
            ", got 'often'",
        ),
        (10, "audit:", "run.yaml:10: audit: expected keys and values", ", got nothing"),
    ],
)
def test_a_malformed_value_is_named_with_place_key_and_what_came(line: int, text: str, start: str, end: str) -> None:
    (mistake,) = mistakes(with_line(line, text))
    assert mistake.startswith(start)
    assert mistake.endswith(end)


@pytest.mark.parametrize("name", [".", ".."])
def test_a_run_is_never_named_like_a_folder_above_it(name: str) -> None:
    (mistake,) = mistakes(with_line(1, f"name: {name}"))
    assert mistake.startswith("run.yaml:1: name: ")


@pytest.mark.parametrize(
    ("line", "text", "key"),
    [(10, "optim: {lr: .inf}", "optim.lr"), (9, "  - {name: tune, epochs: 3, lr: .inf}", "phases.tune.lr")],
)
def test_an_infinite_rate_is_an_error(line: int, text: str, key: str) -> None:
    (mistake,) = mistakes(with_line(line, text))
    assert mistake.startswith(f"run.yaml:{line}: {key}: expected ")


@pytest.mark.parametrize("rate", ["fast", "0", "true", "'1e-3'", "{weight: 1}"])
def test_a_bad_rate_in_a_table_is_named_by_its_pattern_and_line(rate: str) -> None:
    lines = [*LINES[:-1], "  - name: tune", "    epochs: 3", "    lr:", "      trunk: 1e-3", f"      heads: {rate}"]
    (mistake,) = mistakes(lines)
    assert mistake.startswith("run.yaml:13: phases.tune.lr.heads: expected a ")


def test_an_unknown_key_may_be_called_like_the_tasks_type() -> None:
    assert mistakes(
        with_line(6, "  object: {type: classification, num_classes: 2, classification: {a: 1}, zz: 1}")
    ) == [
        f"run.yaml:6: tasks.object.{key}: unknown key;"
        " the keys here are type, label, data, head, metrics, unlabelled, loss, class_names, num_classes, ignore_index"
        for key in ("classification", "zz")
    ]


def test_nothing_to_do_is_an_error() -> None:
    (no_tasks,) = mistakes([*LINES[:3], "tasks: {}", *LINES[6:]])
    assert no_tasks.startswith("run.yaml:4: tasks: ")
    (no_phases,) = mistakes([*LINES[:6], "phases: []"])
    assert no_phases.startswith("run.yaml:7: phases: ")
    assert all("expected at least one, got none" in mistake for mistake in (no_tasks, no_phases))


def test_two_phases_of_one_name_are_named_where_the_phases_are() -> None:
    (mistake,) = mistakes(with_line(10, "  - {name: warm, steps: 1}"))
    assert "not warm twice" in mistake
    assert mistake.startswith(("run.yaml:7: phases: ", "run.yaml:10: phases.2"))


def test_all_mistakes_are_reported_at_once() -> None:
    lines = with_line(3, "data: {image_size: big, batch_sise: 3}")
    lines[5] = "  object: {type: clasification}"
    lines[7] = "  - {freeze: [1], steps: 2}"
    with pytest.raises(ConfigError) as caught:
        load(lines, "optim.lr=-1", "MODEL.X=1")
    expected = [
        "run.yaml:3: data.image_size: expected a valid integer, got 'big'",
        "run.yaml:3: data.batch_sise: unknown key; nearest: batch_size",
        "run.yaml:6: tasks.object.type: expected one of segmentation, depth, normals, classification,"
        " ordinal, multilabel, regression, edges, saliency, keypoints, distill, package.module:Name,"
        " got 'clasification'; nearest: classification",
        "run.yaml:8: phases.0.name: this key is required",
        "run.yaml:8: phases.0.freeze.0: expected a valid string, got 1",
        "command line: optim.lr: expected a number greater than 0, got -1",
        "command line: MODEL.X: unknown key; the keys here are NOT_TRAIN_IN_MULTI_TASK",
    ]
    assert sorted(caught.value.mistakes) == sorted(expected)
    assert str(caught.value) == "\n".join(caught.value.mistakes)


def test_an_empty_config_lists_every_required_key() -> None:
    assert mistakes(["{}"]) == [
        f"run.yaml:1: {key}: this key is required" for key in ("name", "trunk", "tasks", "phases")
    ]


def test_a_later_mistake_is_placed_where_its_value_was_written() -> None:
    config = load(LINES, "phases.tune.lr.trunk=1e-5")
    assert str(config.mistake(("phases", 0, "freeze", 0), "is dead")) == "run.yaml:8: phases.warm.freeze.0: is dead"
    assert str(config.mistake(("phases", 1, "lr", "trunk"), "is dead")) == "command line: phases.tune.lr.trunk: is dead"
    assert str(config.mistake(("optim", "lr"), "is high")) == "run.yaml:1: optim.lr: is high"


# Types that are fine


def test_1e_3_is_a_number_and_yes_and_on_are_words() -> None:
    config = load([*LINES, "optim: {lr: 1e-3, weight_decay: 0}", "runs_dir: on", "tracking: {project: yes}"])
    assert (config.optim.lr, config.optim.weight_decay) == (0.001, 0.0)
    assert (config.runs_dir, config.tracking.project) == ("on", "yes")


def test_a_whole_number_is_a_rate() -> None:
    assert load(LINES, "phases.tune.lr=1").phases[1].lr == 1.0
    assert load(LINES, "phases.tune.lr={heads: 1}").phases[1].lr == {"heads": 1.0}


def test_one_pattern_needs_no_list() -> None:
    assert load(LINES, "phases.0.freeze=heads.depth").phases[0].freeze == ["heads.depth"]


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(LINES).name = "other"  # type: ignore[misc]


# Overrides


def test_overrides_reach_every_depth() -> None:
    config = load(
        LINES, "name=mine", "optim.lr=3e-4", "phases.0.steps=7", "phases.tune.epochs=8", "tasks.object.num_classes=5"
    )
    assert (config.name, config.optim.lr, config.phases[0].steps, config.phases[1].epochs) == ("mine", 3e-4, 7, 8)
    assert config.tasks["object"].num_classes == 5  # type: ignore[union-attr]
    assert config.phases[0].freeze == ["trunk"]


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("optim.rl=1", "command line: optim.rl: unknown key; nearest: lr"),
        ("phases.tune.epoch=1", "command line: phases.tune.epoch: unknown key; nearest: epochs"),
        ("trnk.name=a", "command line: trnk: unknown key; nearest: trunk"),
        ("optim.lr=fast", "command line: optim.lr: expected a valid number, got 'fast'"),
        ("phases.0.steps=1.5", "command line: phases.warm.steps: expected a valid integer, got 1.5"),
        (
            "phases.tune.steps=4",
            "run.yaml:9: phases.tune: expected exactly one of epochs, steps, until, evaluate_only,"
            " not epochs and steps",
        ),
        ("phases.fine.steps=4", "command line: 'phases.fine.steps=4': 'fine' is none of warm, tune, 0 to 1"),
        ("name", "command line: 'name': expected key=value, such as optim.lr_scale=0.5"),
        (
            "tasks.depth={type: normals, x: 1}",
            "command line: tasks.depth.x: unknown key;"
            " the keys here are type, label, data, head, metrics, unlabelled, loss",
        ),
        (
            "data={image_size: 9, num_val: 0}",
            "command line: data.num_val: expected a number greater than or equal to 1, got 0",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_placed_there(override: str, mistake: str) -> None:
    assert mistakes(LINES, override) == [mistake]


# Bases


def test_a_mistake_is_placed_in_the_file_it_was_written_in() -> None:
    Path("far").mkdir()
    Path("far/base.yaml").write_text("\n".join([*LINES, "seed: one", "optim: {lr: 1, accumulate: 0}"]))
    assert mistakes(["_base_: far/base.yaml", "optim: {lr: -1}", "tasks: {depth: {tyqe: 1}}"], "seed=two") == [
        "command line: seed: expected a valid integer, got 'two'",
        "run.yaml:3: tasks.depth.tyqe: unknown key; nearest: type",
        "run.yaml:2: optim.lr: expected a number greater than 0, got -1",
        "far/base.yaml:11: optim.accumulate: expected a number greater than or equal to 1, got 0",
    ]


def test_a_file_changes_its_base_key_by_key_and_replaces_lists() -> None:
    Path("base.yaml").write_text("\n".join(LINES))
    config = load(
        ["_base_: base.yaml", "name: mine", "data: {batch_size: 4}", "phases:", "  - {name: only, epochs: 1}"]
    )
    assert (config.name, config.trunk.name) == ("mine", "resnet18")
    assert (config.data.image_size, config.data.batch_size) == (32, 4)
    assert [phase.name for phase in config.phases] == ["only"]


# Null


def _models(kind: type[Strict] = Strict) -> list[type[Strict]]:
    """All models that configurations are made of."""
    return [each for below in kind.__subclasses__() for each in (below, *_models(below))]


def test_no_key_of_any_model_may_be_written_without_a_value() -> None:
    taken = [
        f"{kind.__name__}.{name}"
        for kind in _models()
        for name in kind.model_fields
        if name not in {error["loc"][0] for error in _errors_of(kind, {name: None}) if error["type"] != "missing"}
    ]
    assert len(_models()) > 20 and taken == []


def _errors_of(kind: type[Strict], data: dict[str, Any]) -> list[Any]:
    try:
        kind.model_validate(data)
    except ValidationError as error:
        return error.errors()
    return []


@pytest.mark.parametrize("written", ["", " null", " ~"])
def test_a_key_with_nothing_after_it_is_an_error_next_to_all_others(written: str) -> None:
    lines = [*LINES[:7], "  - name: warm", "    steps: 2", f"    freeze:{written}", "    tasks: 3"]
    assert mistakes(lines) == [
        "run.yaml:10: phases.warm.freeze: expected a value, got nothing; leave out the key for its default",
        "run.yaml:11: phases.warm.tasks: expected a valid list, got 3",
    ]


def test_a_null_in_words_takes_back_what_is_written_below_and_nothing_else_does() -> None:
    Path("base.yaml").write_text("\n".join([*LINES, "optim: {lr: 2, clip_norm: 3}", "data: {num_train: 9}"][3:]))
    top = ["_base_: base.yaml", *LINES[:2]]
    config = load([*top, "optim: {clip_norm: null}", "data: ~"], "phases.tune.lr=null")
    assert (config.optim.lr, config.optim.clip_norm, config.data.num_train) == (2.0, None, None)
    assert config.phases[1].lr is None
    assert str(config.mistake(("phases", 1, "lr"), "x")) == "base.yaml:6: phases.tune.lr: x"
    nothing = "expected a value, got nothing; leave out the key for its default"
    assert mistakes([*top, "optim: {clip_norm: }"], "phases.tune.lr=", "phases.warm.lr=null") == [
        f"run.yaml:4: optim.clip_norm: {nothing}",
        f"command line: phases.warm.lr: {nothing}",
        f"command line: phases.tune.lr: {nothing}",
    ]


# Round trip


@pytest.mark.parametrize(
    "name", ["small", "on", "null", "true", "12", "1.5", "0x1f", "1_000", "-", "1e5", "1e-3", "3.e2", "08", "010"]
)
def test_a_run_of_any_name_can_be_read_back(name: str) -> None:
    config = load(with_line(1, f"name: '{name}'"))
    RUN.write_text(dump(config))
    assert load_config(RUN).model_dump() == config.model_dump()


_RATES = st.floats(1e-9, 10, exclude_min=True) | st.integers(1, 3)
_PATTERNS = st.sampled_from(
    ["trunk", "!heads.depth", "~layer1", "**.bias", "*.weight", "heads.*.out", "~: ", "~#", "~1"]
)
_PHASES = st.lists(
    st.fixed_dictionaries(
        {"freeze": st.lists(_PATTERNS, max_size=3)},
        optional={"lr": _RATES | st.dictionaries(_PATTERNS, _RATES, min_size=1, max_size=3)},
    ),
    min_size=1,
    max_size=3,
)
_RUNS = st.fixed_dictionaries(
    {
        "name": st.text("abcxyz._-", min_size=1, max_size=8).filter(lambda name: not name.startswith(".")),
        "trunk": st.fixed_dictionaries(
            {"name": st.just("resnet18")},
            optional={
                "weights": st.sampled_from(["hub", "none", "a b/c: d.pth", "~/w.pth", "null"]),
                "options": st.dictionaries(
                    st.sampled_from(["a", "b"]),
                    st.none() | st.booleans() | _RATES | st.lists(st.booleans(), max_size=2),
                ),
            },
        ),
        "tasks": st.dictionaries(
            st.sampled_from(["depth", "other", "_t3"]),
            st.sampled_from(
                [
                    {"type": "depth"},
                    {"type": "normals"},
                    {"type": "segmentation", "num_classes": 3, "balance_power": 1},
                    {"type": "classification", "num_classes": 2, "ignore_index": -100},
                    {"type": "depth", "space": "bins", "min": 0.1, "max": 10.0, "loss": "silog"},
                    {"type": "multilabel", "loss": {"name": "focal", "options": {"gamma": 1}}, "metrics": "m:M"},
                ]
            ),
            min_size=1,
        ),
        "phases": _PHASES,
    },
    optional={
        "seed": st.integers(0, 2**40),
        "optim": st.fixed_dictionaries({"lr": _RATES, "lr_schedule": st.sampled_from(["constant", "one-cycle"])}),
        "balance": st.fixed_dictionaries({"method": st.just("fixed"), "weights": st.just({"depth": 0.1})}),
        "MODEL": st.fixed_dictionaries({"NOT_TRAIN_IN_MULTI_TASK": st.lists(st.sampled_from(["layer1", "no"]))}),
    },
)


@settings(max_examples=60, derandomize=True)
@given(run=_RUNS, lengths=st.lists(st.sampled_from([{"epochs": 1}, {"steps": 20}]), min_size=3, max_size=3))
def test_a_config_written_and_read_back_is_the_same(run: dict[str, Any], lengths: list[dict[str, int]]) -> None:
    phases = [{"name": f"p{place}", **phase, **lengths[place]} for place, phase in enumerate(run["phases"])]
    RUN.write_text(yaml.safe_dump({**run, "phases": phases}, sort_keys=False))
    config = load_config(RUN)
    assert [phase.freeze for phase in config.phases] == [phase["freeze"] for phase in phases]
    RUN.write_text(dump(config))
    again = load_config(RUN)
    assert again.model_dump() == config.model_dump()
    assert dump(again) == dump(config)


# Tables of learning rates

NAMES = ["trunk.a.weight", "trunk.a.bias", "heads.depth.weight"]


@pytest.mark.parametrize(
    ("lr", "table"),
    [
        (0.5, {"trunk.a.weight": 0.5, "trunk.a.bias": 0.5, "heads.depth.weight": 0.5}),
        ({"trunk": 1.0, "heads": 2.0}, {"trunk.a.weight": 1.0, "trunk.a.bias": 1.0, "heads.depth.weight": 2.0}),
        ({"**": 1.0, "~bias": 3.0}, {"trunk.a.weight": 1.0, "trunk.a.bias": 3.0, "heads.depth.weight": 1.0}),
        ({"~bias": 3.0, "**": 1.0}, {"trunk.a.weight": 1.0, "trunk.a.bias": 1.0, "heads.depth.weight": 1.0}),
    ],
)
def test_the_last_pattern_that_matches_gives_the_rate(lr: Any, table: dict[str, float]) -> None:
    assert by_pattern(lr, NAMES, NAMES) == table


def test_only_what_is_trained_has_a_rate_and_a_pattern_may_match_frozen_names_only() -> None:
    assert by_pattern({"trunk": 1.0, "heads": 2.0}, NAMES[2:], NAMES) == {"heads.depth.weight": 2.0}
    assert by_pattern(0.5, NAMES[2:], NAMES) == {"heads.depth.weight": 0.5}


def test_what_a_table_need_not_name_has_its_number_unless_it_is_named() -> None:
    names, otherwise = [*NAMES[2:], "balance.log_sigma"], {"balance.log_sigma": 9.0}
    assert by_pattern({"heads": 2.0}, names, names, otherwise=otherwise)["balance.log_sigma"] == 9.0
    assert by_pattern({"heads": 2.0, "balance": 3.0}, names, names, otherwise=otherwise)["balance.log_sigma"] == 3.0
    assert by_pattern(0.5, names, names, otherwise=otherwise)["balance.log_sigma"] == 0.5


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        ({"heads": 1.0}, "no pattern covers 2 trainable parameters, such as trunk.a.weight; add one for them"),
        ({"~weight": 1.0}, "no pattern covers 1 trainable parameters, such as trunk.a.bias; add one for them"),
    ],
)
def test_a_table_that_leaves_a_parameter_without_a_rate_is_an_error(lr: dict[str, float], message: str) -> None:
    with pytest.raises(UncoveredError) as caught:
        by_pattern(lr, NAMES, NAMES)
    assert str(caught.value) == message


def test_a_dead_pattern_in_a_table_is_an_error() -> None:
    with pytest.raises(PatternError, match=r"^pattern 'hed' matches nothing .*heads") as caught:
        by_pattern({"**": 1.0, "hed": 2.0}, NAMES, NAMES)
    assert caught.value.index == 1


def test_a_pattern_that_takes_back_gives_no_rate() -> None:
    with pytest.raises(ValueError, match=r"trunk\.a"):
        by_pattern({"**": 1.0, "!trunk.a": 0.5}, NAMES, NAMES)


def test_a_pattern_may_say_how_many_tensors_it_must_match() -> None:
    config = load(with_line(8, "  - {name: warm, freeze: [trunk, {pattern: heads.depth, must_match: 2}], steps: 2}"))
    assert patterns_of(config.phases[0].freeze) == ["trunk", Counted("heads.depth", 2)]
    assert load(dump(config).splitlines()).model_dump() == config.model_dump()
    for entry, mistake in [
        ("{pattern: trunk}", "run.yaml:8: phases.warm.freeze.0.must_match: this key is required"),
        (
            "{patern: trunk, must_match: 1}",
            "run.yaml:8: phases.warm.freeze.0.patern: unknown key; nearest: pattern",
        ),
        (
            "{pattern: trunk, must_match: 0}",
            "run.yaml:8: phases.warm.freeze.0.must_match: expected a number greater than or equal to 1, got 0",
        ),
        ("3", "run.yaml:8: phases.warm.freeze.0: expected a valid string, got 3"),
    ]:
        assert mistake in mistakes(with_line(8, f"  - {{name: warm, freeze: [{entry}], steps: 2}}"))


def test_keys_that_do_not_go_together_are_blamed_on_the_one_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny_config(tmp_path), ["balance.weights={depth: 1.0}"])
    assert caught.value.mistakes == [
        "command line: balance.weights: expected weights exactly if the method is 'fixed'",
    ]


def test_nothing_is_reported_as_nothing(tmp_path: Path) -> None:
    file = tmp_path / "nothing.yaml"
    file.write_text(tiny_config(tmp_path).read_text() + "optim: {lr: }\n")
    with pytest.raises(ConfigError, match=r"optim\.lr: expected .*, got nothing"):
        load_config(file)
