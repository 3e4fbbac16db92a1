"""What is written down and read by no phase: refused on the command line, warned of in a file, named with its rival."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.cli import main
from mtl.config import load_config
from mtl.config.yaml_source import ConfigError
from mtl.phases.setup import ModelSetup, build_meta_setup
from runs import tiny_config

ROOT = Path(__file__).parents[2]
RUN = Path("run.yaml")
HEAD = [
    "name: r",
    "trunk: {name: test_resnet}",
    "data: {image_size: 32, num_train: 40, num_val: 20, batch_size: 8}",
    "tasks: {depth: {type: depth}, object: {type: classification, num_classes: 10}}",
    "balance: {method: uw}",
    "phases:",
]
BOTH = ["name: a, epochs: 2, lr: 1.0e-3", "name: b, epochs: 1, lr: {trunk: 1.0e-4, heads: 1.0e-3, balance: 1.0e-2}"]


def drawn(phases: list[str], *below: str, overrides: tuple[str, ...] = ()) -> ModelSetup:
    """A run of these phases, on lines 7 and following, with top-level keys below them."""
    RUN.write_text("\n".join([*HEAD, *(f"  - {{{phase}}}" for phase in phases), *below]) + "\n")
    return build_meta_setup(load_config(RUN, overrides))


def warned(phases: list[str], *below: str, overrides: tuple[str, ...] = ()) -> list[str]:
    return drawn(phases, *below, overrides=overrides).unread


def refused(phases: list[str], *below: str, overrides: tuple[str, ...]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        warned(phases, *below, overrides=overrides)
    return caught.value.mistakes


@pytest.mark.parametrize("name", ["scenes", "multifashion"])
def test_a_config_of_the_repository_writes_nothing_in_vain(name: str) -> None:
    assert build_meta_setup(load_config(ROOT / f"configs/{name}.yaml")).unread == []


def _examples() -> list[str]:
    """What README, docs and scripts show users to type after `train_mtl.sh`."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "scripts").glob("*.sh")]
    found = [
        line
        for file in files
        for line in re.findall(r"bash scripts/train_mtl\.sh( [^`#\n]*=[^`#\n]*)", file.read_text())
    ]
    return sorted({" ".join(each.split("  ")[0].split()) for each in found})


def test_there_are_examples_of_overrides() -> None:
    assert "configs/multifashion.yaml optim.lr_scale=0.5 name=mine" in _examples()


@pytest.mark.parametrize("words", _examples())
def test_an_example_of_ours_changes_what_it_says(words: str) -> None:
    file, *overrides = words.split() if words.startswith("configs") else ["configs/scenes.yaml", *words.split()]
    assert build_meta_setup(load_config(ROOT / file, overrides)).unread == []


def test_the_command_line_is_refused_what_every_phase_outvotes_and_the_message_names_it() -> None:
    assert refused(BOTH, overrides=("optim.lr=3e-4", "optim.lr_schedule=cosine")) == [
        "command line: optim.lr: no phase reads it: phases.a.lr (run.yaml:7), phases.b.lr (run.yaml:8) go before it;"
        " optim.lr_scale multiplies every rate"
    ]
    assert warned(BOTH, "optim: {lr: 3.0e-4}") == [
        "run.yaml:9: optim.lr: no phase reads it: phases.a.lr (run.yaml:7), phases.b.lr (run.yaml:8) go before it;"
        " optim.lr_scale multiplies every rate"
    ]


def test_a_run_is_refused_and_warned_alike_by_train_and_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [{"name": "a", "freeze": ["trunk"], "steps": 1, "lr": 1e-3}]
    file = tiny_config(tmp_path, phases=phases, optim={"lr": 3e-4})
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in str(path))
    for verb in ("train", "plan"):
        assert main([verb, str(file), "optim.lr=1"]) == 2
        assert "error: command line: optim.lr: no phase reads it" in capsys.readouterr().err
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in str(path)) == before
    assert main(["plan", str(file)]) == 0
    assert capsys.readouterr().err.startswith(f"warning: {file}:")
    assert main(["train", str(file), "-q"]) == 0
    assert "optim.lr: no phase reads it" in capsys.readouterr().out


# Each key of the run, in phases that do not read it.
IN_VAIN: dict[str, tuple[list[str], str, str]] = {
    "optim.optimizer": (["name: a, epochs: 1, optimizer: sgd"], "adam", "phases.a.optimizer"),
    "optim.layer_decay": (["name: a, epochs: 1, layer_decay: 0.5"], "0.9", "phases.a.layer_decay"),
    "optim.weight_decay": (["name: a, epochs: 1, weight_decay: 0"], "0.1", "phases.a.weight_decay"),
    "optim.lr_schedule": (["name: a, epochs: 1, lr_schedule: linear"], "cosine", "phases.a.lr_schedule"),
    "optim.clip_norm": (["name: a, evaluate_only: true"], "1.0", "since none trains"),
    "optim.ema_decay": (["name: a, evaluate_only: true"], "0.9", "since none trains"),
    "optim.lr_scale": (["name: a, evaluate_only: true"], "0.9", "since none trains"),
    "optim.accumulate": (["name: a, evaluate_only: true"], "2", "since none trains"),
    "data.batch_size": (["name: a, epochs: 1, batch_size: 4"], "5", "phases.a.batch_size"),
    "balance": (["name: a, epochs: 1, balance: mean"], "dwa", "phases.a.balance"),
    "cache.mode": (["name: a, epochs: 1, cache: ram"], "disk", "phases.a.cache"),
    "cache.ram_gb": (["name: a, epochs: 1, cache: off"], "5", "no phase keeps anything in memory: phases.a.cache"),
    "cache.views": (["name: a, epochs: 1"], "5", "there are views only with data.augment or data.transform.train"),
    "trunk.checkpointing": (["name: a, epochs: 1, freeze: trunk"], "true", "phases.a.freeze"),
    "audit.gradients_every_steps": (["name: a, epochs: 1, freeze: trunk"], "7", "phases.a.freeze"),
    "resume_override": (["name: a, epochs: 1"], "true", "resume is not given"),
    "phases.a.layer_decay": (["name: a, epochs: 1, freeze: trunk"], "0.5", "the phase trains nothing of the trunk"),
    "phases.a.lr_schedule": (
        ["name: a, epochs: 2"],
        "{name: step, every_epochs: 2}",
        "every_epochs: the phase ends before that, after 10 steps",
    ),
    "optim.lr_schedule.patience": (
        ["name: a, epochs: 2", "name: b, epochs: 3"],
        "3",
        "the phase ends before that, after 10 steps",
    ),
    "phases.a.restore": (["name: a, epochs: 1"], "best", "before the first phase, no weights are the best"),
    "phases.a.optimizer_state": (["name: a, epochs: 1"], "reset", "before the first phase, optimizers have no state"),
    "tasks.object": (["name: a, epochs: 1, tasks: [depth]"], "{type: classification, num_classes: 10}", "a.tasks"),
    "phases.a.lr": (
        ["name: a, epochs: 1, freeze: trunk"],
        "{trunk: 1.0, heads: 2.0, balance: 3.0}",
        "lr.trunk: no parameter that trains has this number: phases.a.freeze (run.yaml:7) goes before it",
    ),
    "phases.b.lr": (
        ["name: a, epochs: 1", "name: b, epochs: 1"],
        "{trunk.layer1: 1.0, trunk: 1.0e-3, heads: 2.0, balance: 3.0}",
        "lr.trunk.layer1: no parameter that trains has this number",
    ),
    "phases.a.weight_decay": (
        ["name: a, epochs: 1"],
        "{'**': 0.1, '**.bias': 0.2}",
        "weight_decay.**.bias: no parameter that trains has this number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", IN_VAIN)
def test_what_no_phase_reads_is_refused_on_the_command_line(key: str) -> None:
    phases, value, message = IN_VAIN[key]
    below = ["optim: {lr_schedule: {name: plateau}}"] if key.endswith("patience") else []
    (mistake,) = refused(phases, *below, overrides=(f"{key}={value}",))
    assert mistake.startswith(f"command line: {key}") and message in mistake
    if not key.startswith("phases") and not below:
        # The same in the file.
        first, _, rest = key.partition(".")
        warnings = warned_of(phases, first, f"{{{rest}: {value}}}" if rest else value)
        (warning,) = [each for each in warnings if each.split(": ")[1] == key]
        assert "yaml:" in warning and message in warning


def warned_of(phases: list[str], key: str, value: str) -> list[str]:
    """Warnings where a top-level key has this value on top of what it has."""
    Path("base.yaml").write_text("\n".join([*HEAD, *(f"  - {{{phase}}}" for phase in phases)]) + "\n")
    RUN.write_text(f"_base_: base.yaml\n{key}: {value}\n")
    return build_meta_setup(load_config(RUN)).unread


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("phases.a.weight_decay", "{'**': 0.1, '**.bias': 0}"),
        ("phases.a.lr", "{'**': 0.1, trunk: 0.2}"),
        ("optim.lr", "{trunk: 0.2, '**': 0.1, heads: 1}"),
        ("optim.layer_decay", "0.5"),
        ("optim.lr_scale", "0.5"),
        ("phases.b.restore", "best"),
        ("audit.gradients_every_steps", "7"),
        ("balance", "{method: fixed, weights: {depth: 1, object: 0}}"),
    ],
)
def test_what_some_phase_reads_is_taken(key: str, value: str) -> None:
    phases = ["name: a, epochs: 1", "name: b, epochs: 1, freeze: 'trunk@first:1'", "name: c, evaluate_only: true"]
    if key == "optim.lr":
        with pytest.raises(ConfigError, match=r"optim\.lr\.trunk: no parameter that trains has this number"):
            warned(phases, overrides=(f"{key}={value}",))
    else:
        assert warned(phases, overrides=(f"{key}={value}",)) == []


def test_a_rate_of_a_table_has_to_be_used_in_one_phase_only() -> None:
    table = "optim: {lr: {trunk: 1.0e-4, heads: 1.0e-3, balance: 1.0e-2}}"
    assert warned(["name: a, epochs: 1, freeze: trunk", "name: b, epochs: 1"], table) == []
    (said,) = warned(["name: a, epochs: 1, freeze: trunk", "name: b, epochs: 1, freeze: trunk, lr: 1"], table)
    assert said.startswith("run.yaml:9: optim.lr.trunk: no parameter that trains has this number: phases.a.freeze")


def test_a_rate_that_only_balancing_weights_take_is_reported() -> None:
    phases = ["name: a, epochs: 1, lr: 1", "name: b, epochs: 1, lr: {trunk: 1, heads: 2}"]
    for place, said in [
        ("command line", warned(phases, overrides=("optim.lr=3e-4",))),
        ("run.yaml:9", warned(phases, "optim: {lr: 3.0e-4}")),
    ]:
        assert said == [
            f"{place}: optim.lr: only the balancing method's weights have this rate, in b;"
            " optim.lr_scale multiplies every rate"
        ]


def test_a_method_changed_on_the_command_line_may_leave_rates_of_the_file_without_use() -> None:
    assert warned(BOTH, overrides=("balance.method=mean",)) == []
    assert warned(BOTH, overrides=("balance=famo",)) == []
    assert [w.split(": ")[1] for w in warned(BOTH, overrides=("phases.b.freeze=[trunk]",))] == []
    said = warned([f"{BOTH[1]}, balance: mean"])
    assert [each.split(": ")[1] for each in said] == ["balance", "phases.b.lr.balance"]


def test_what_a_base_says_may_be_outvoted_by_the_file_and_defaults_may_be_written_out() -> None:
    base = "\n".join([*HEAD, "  - {name: a, epochs: 1}", "optim: {lr: 5.0e-3}", "cache: {ram_gb: 2.0}"])
    Path("base.yaml").write_text(base)
    RUN.write_text("_base_: base.yaml\nphases: [{name: a, epochs: 1, lr: 1, cache: off}]\noptim: {layer_decay: 1.0}\n")
    assert build_meta_setup(load_config(RUN)).unread == []
    RUN.write_text("_base_: base.yaml\nphases: [{name: a, epochs: 1, lr: 1}]\noptim: {lr: 2}\n")
    (said,) = build_meta_setup(load_config(RUN)).unread
    assert said.startswith("run.yaml:3: optim.lr: no phase reads it: phases.a.lr (run.yaml:2) goes before it")


def test_a_phase_that_never_gets_to_a_condition_is_reported() -> None:
    until = "until: {any: [{plateau: val/score, patience: 3}, {epochs: 4}, {steps: 16}, {steps: 15}]}, max_epochs: 3"
    assert [w.split(": ")[:2] for w in warned([f"name: a, {until}"])] == [
        ["run.yaml:7", "phases.a.until.any.0.patience"],
        ["run.yaml:7", "phases.a.until.any.1.epochs"],
        ["run.yaml:7", "phases.a.until.any.2.steps"],
    ]


_KEYS = ["optimizer: sgd", "lr: 2.0", "layer_decay: 0.5", "weight_decay: 0.2", "lr_schedule: linear", "batch_size: 4"]
_OWN = st.lists(st.sampled_from(_KEYS), unique=True)
_VALUES = {"optimizer": "adam", "lr": 3.0, "layer_decay": 0.7, "weight_decay": 0.3, "lr_schedule": "cosine"}


@settings(max_examples=10, deadline=None, derandomize=True)
@given(first=_OWN, second=_OWN, key=st.sampled_from([*_VALUES, "batch_size"]))
def test_a_setting_of_the_run_is_taken_if_and_only_if_it_changes_some_phase(
    first: list[str], second: list[str], key: str
) -> None:
    phases = [", ".join([f"name: {name}, epochs: 1", *own]) for name, own in (("a", first), ("b", second))]
    override = "data.batch_size=5" if key == "batch_size" else f"optim.{key}={_VALUES[key]}"
    plain, other = _outcome(phases), _outcome(phases, override)
    assert (other is None) == all(any(each.startswith(f"{key}:") for each in own) for own in (first, second))
    assert other != plain


def _outcome(phases: list[str], *overrides: str) -> object:
    """How each phase steps which batches; None if the command line is refused."""
    try:
        run = drawn(phases, overrides=overrides)
    except ConfigError:
        return None
    rates = [[(g["lr"], g["weight_decay"]) for g in phase.groups] for phase in run.phases]
    return rates, [(p.optim.optimizer, p.optim.lr_schedule, p.batch_size) for p in run.phases]


def test_an_entry_that_later_ones_replace_is_reported_with_these() -> None:
    phase = "name: a, epochs: 2, freeze: [trunk], lr: {heads.depth: 5.0e-3, heads: 1.0e-3, balance: 1.0e-2}"
    (said,) = warned([phase])
    assert "phases.a.lr.heads.depth: no parameter that trains has this number: phases.a.lr.heads (run.yaml:7)" in said
    assert "freeze" not in said
