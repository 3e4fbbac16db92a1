"""The history of a run: commands and changes are kept, and what can have no effect any more is refused."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from crashes import SHORT, Crash, crash_in_step, crashed, resume
from mtl.checkpoint.files import CheckpointError
from mtl.cli import main
from mtl.config import ConfigError, RunConfig, TrunkConfig, load_config
from mtl.config.changes import config_differences
from mtl.model import build_trunk
from mtl.phases.resolve import Phase
from mtl.phases.setup import build_meta_setup
from mtl.results.report.origin import history_html
from mtl.training.history import History, history_from
from mtl.training.run import train
from mtl.training.setup import assemble
from runs import read_metrics, small_config


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """The folder of a run that ended in the third step of its second phase; its first one is over."""
    folder = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE_DIR", str(cache_dir))
        crashed(folder, 9, phases=PHASES)
    return folder


PHASES: list[dict[str, Any]] = [
    {"name": "a", "freeze": ["trunk"], "epochs": 2, "cache": "ram", "lr": 1e-3},
    {"name": "b", "freeze": ["trunk@first:1"], "steps": 5, "lr": 1e-3, "optimizer_state": "reset"},
    {"name": "c", "freeze": ["trunk"], "steps": 2, "lr": 1e-3, "optimizer": "sgd", "weight_decay": 0.0},
]


def copy_of(broken: Path, tmp_path: Path) -> Path:
    shutil.copytree(broken / "runs", tmp_path / "runs", symlinks=True)
    return tmp_path / "runs/tiny"


def history_of(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "history.json").read_text())
    return content


# Refused

_OVER = "but phase a is over: that would change nothing after step-00000008; leave it as it was"
_UNREAD = "but no phase that is left reads it"
REFUSED: dict[str, str] = {
    "phases.a.lr=2e-3": f"phases.a.lr: 0.001 -> 0.002, {_OVER}",
    "phases.a.epochs=3": f"phases.a.epochs: 2 -> 3, {_OVER}",
    "phases.a.balance=mean": "phases.a.balance.method: nothing -> mean, but phase a is over;",
    "phases.a.tasks=[depth]": f"phases.a.tasks: nothing -> ['depth'], {_OVER}",
    "phases.b.optimizer_state=keep": "phases.b.optimizer_state: reset -> keep, but phase b has begun",
    "phases.b.restore=best": "phases.b.restore.which: last -> best, but phase b has begun",
    "trunk.weights=nowhere.pth": "trunk.weights: none -> nowhere.pth; it is read only where a run begins",
    "cache.views=3": "cache.views: there are views only with data.augment or data.transform.train",
    "optim.lr=2e-3": "optim.lr: no phase reads it",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_can_have_no_effect_any_more_is_refused_and_nothing_is_touched(
    tmp_path: Path, broken: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copy_of(broken, tmp_path)
    file = small_config(tmp_path, **SHORT | {"phases": PHASES, "runs_dir": "runs"})
    before = {path: path.stat().st_mtime_ns for path in sorted(run_dir.rglob("*"))}
    assert main(["train", str(file), "-q", "resume=auto", "resume_override=true", override]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: command line: ") and REFUSED[override] in said, said
    assert {path: path.stat().st_mtime_ns for path in sorted(run_dir.rglob("*"))} == before


@pytest.mark.slow
def test_a_setting_that_only_phases_that_are_over_read_is_refused(tmp_path: Path) -> None:
    phases = [PHASES[0] | {"weight_decay": 0.1}, PHASES[1] | {"optimizer": "adamw"}, PHASES[2]]
    del phases[0]["lr"]
    crashed(tmp_path, 9, phases=phases)
    for override in ("optim.lr=2e-3", "optim.lr={heads: 1, balance: 1}"):
        with pytest.raises(ConfigError, match=_UNREAD):
            resume(tmp_path, override, "resume_override=true", phases=phases)
    resume(tmp_path, "optim.weight_decay=0.2", "resume_override=true", phases=phases)


@pytest.mark.slow
def test_a_run_that_is_over_takes_no_change(tmp_path: Path) -> None:
    file = small_config(tmp_path, **SHORT)
    assert main(["train", str(file), "-q"]) == 0
    with pytest.raises(ConfigError, match=r"phases\.b\.steps: 5 -> 9, but phase b is over"):
        resume(tmp_path, "phases.b.steps=9", "resume_override=true")
    resume(tmp_path, "tracking.log_every_steps=3")
    assert [c["key"] for c in history_of(tmp_path / "runs/tiny")["changes"]] == ["tracking.log_every_steps"]


# Kept


def test_what_is_changed_is_kept_with_its_step_over_further_resumes_and_kills(tmp_path: Path, broken: Path) -> None:
    run_dir = copy_of(broken, tmp_path)
    began = history_of(run_dir)
    assert began["command"] is not None and began["changes"] == []
    override = ["phases.b.steps=7", "optim.clip_norm=1.5", "tracking.log_every_steps=1", "resume_override=true"]
    file = small_config(tmp_path, **SHORT | {"phases": PHASES})
    config = load_config(file, ["resume=auto", *override])
    # Killed before anything more is saved: what was asked for has changed nothing yet.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("mtl.training.loop.Trainer.run", lambda _: 1 / 0)
        train(assemble(config, quiet=True), quiet=True)
    expected = [
        {"step": 8, "key": "phases.b.steps", "old": 5, "new": 7},
        {"step": 8, "key": "optim.clip_norm", "old": None, "new": 1.5},
        {"step": 8, "key": "tracking.log_every_steps", "old": 2, "new": 1},
    ]
    in_order = sorted(history_of(run_dir)["changes"], key=str)
    assert in_order == sorted(expected, key=str)
    resume(tmp_path, phases=PHASES)
    assert history_of(run_dir) == began
    assert [row["step"] for row in read_metrics(run_dir) if "val/score" in row][-1] == 13


def test_changes_stay_with_the_steps_that_were_made_with_them(tmp_path: Path, broken: Path) -> None:
    run_dir = copy_of(broken, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        crash_in_step(patch, 4)
        with pytest.raises(Crash):
            resume(tmp_path, "phases.b.steps=7", "resume_override=true", phases=PHASES)
    (change,) = history_of(run_dir)["changes"]
    state = json.loads((run_dir / "checkpoints/last/state.json").read_text())
    assert (state["step"], state["history"]["changes"]) == (10, [change])
    longer = [PHASES[0], PHASES[1] | {"steps": 7}, PHASES[2]]
    # The new value is the run's by now: it is no override any more, and the old one would be a change.
    resume(tmp_path, phases=longer)
    assert history_of(run_dir)["changes"] == [change]
    with pytest.raises(ConfigError, match=r"phases\.b\.steps: 7 -> 5, but the run is over"):
        resume(tmp_path, "resume_override=true", phases=PHASES)
    page = history_html(history_of(run_dir))
    cells = '<th scope="row">8</th><td><code>phases.b.steps</code></td><td class="words">5</td><td class="words">7</td>'
    assert cells in page


def test_a_run_from_another_ones_checkpoint_has_a_command_of_its_own_and_says_from_where(
    tmp_path: Path, broken: Path
) -> None:
    run_dir = copy_of(broken, tmp_path)
    again = resume(
        tmp_path, f"resume={run_dir}", "name=again", "phases.c.steps=1", "resume_override=true", phases=PHASES
    )
    history = history_of(again)
    assert history["from"] == str(run_dir / "checkpoints/step-00000008")
    assert history["changes"] == [{"step": 8, "key": "phases.c.steps", "old": 2, "new": 1}]
    assert "name=again" in history["command"] and "name=again" not in history_of(run_dir)["command"]


def test_a_run_whose_file_of_weights_is_gone_continues(tmp_path: Path) -> None:

    from crashes import Crash, crash_in_step

    save_file(build_trunk(TrunkConfig(name="test_resnet"), 32).state_dict(), tmp_path / "w.safetensors")
    file = small_config(tmp_path, **SHORT)
    command = ["train", str(file), "-q", "resume=auto", f"trunk.weights={tmp_path / 'w.safetensors'}"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_in_step(patch, 4)
        main(command)
    (tmp_path / "w.safetensors").unlink()
    assert main(command) == 0
    assert f"weights: {tmp_path / 'w.safetensors'}" in (tmp_path / "runs/tiny/config.yaml").read_text()


def test_the_command_that_began_a_run_is_quoted_for_a_shell_and_shown(tmp_path: Path) -> None:
    file = small_config(tmp_path)
    config = load_config(file, ["phases.warm-heads.lr={heads: 1, balance: 2}", "name=x"])
    assert config.command == f"mtl train {file} 'phases.warm-heads.lr={{heads: 1, balance: 2}}' name=x"
    assert history_html({}) == ""
    shown = history_html(History("mtl train 'a<b>'").to_json())
    assert "Command</h3><pre>mtl train &#x27;a&lt;b&gt;&#x27;</pre>" in shown


# The record never lies, whatever is changed in whatever order

_CHANGES = {
    "optim.clip_norm": ["1.0", "2.0"],
    "optim.lr_scale": ["1.0", "0.5"],
    "phases.a.lr": ["1.0e-3", "{heads: 2.0e-3, trunk: 1.0e-3, balance: 1.0e-3}"],
    "phases.b.steps": ["5", "9"],
    "phases.b.restore": ["best", "last"],
    "phases.c.lr_schedule": ["cosine", "{name: linear, warmup_steps: 1}"],
    "tracking.log_every_steps": ["2", "3"],
    "trunk.weights": ["none", "hub"],
}
_Session = tuple[str, int, int, bool]
_SESSIONS = st.lists(
    st.tuples(st.sampled_from(sorted(_CHANGES)), st.integers(0, 1), st.integers(0, 3), st.booleans()),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sessions=_SESSIONS)
def test_the_changes_lead_from_the_first_configuration_to_the_last_one(
    sessions: list[tuple[str, int, int, bool]],
) -> None:
    phases = [{"name": "a", "epochs": 1}, {"name": "b", "steps": 5}, {"name": "c", "steps": 3}]
    file, overrides = small_config(Path(), phases=phases, balance={"method": "uw"}), dict[str, str]()
    first = config = load_config(file)
    history, index = History("x"), 0
    # None of the changes makes a phase read other settings of the run.
    phases_of_run = resolved(file.read_text())
    for number, (key, value, forward, is_inside) in enumerate(sessions):
        index = min(3, max(index, forward))
        wanted = overrides | {key: _CHANGES[key][value]}
        now = load_config(file, [f"{key}={value}" for key, value in wanted.items()])
        state = {
            "scheduler": {"index": index},
            "change": None if is_inside else {},
            "config": plain(config),
            "history": history.to_json(),
            "step": number,
        }
        try:
            history = history_from(json.loads(json.dumps(state)), now, phases_of_run, Path("step-1"), in_place=True)
        except CheckpointError:
            # Whatever is of a phase that is over, and whatever there is once all are.
            is_over = key.startswith("phases.") and "abc".index(key[7]) < index
            assert is_over or index == 3 or (key == "phases.b.restore" and index == 1 and is_inside)
            continue
        overrides, config = wanted, now
    assert replayed(first, history) == flat(config)


@cache
def resolved(text: str) -> list[Phase]:
    Path("resolved.yaml").write_text(text)
    return build_meta_setup(load_config(Path("resolved.yaml"))).phases


def plain(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True)


def flat(config: RunConfig) -> dict[str, Any]:
    """Every value of a configuration by its key."""
    return {each.key: each.now for each in config_differences({}, plain(config)) if each.key}


def replayed(config: RunConfig, history: History) -> dict[str, Any]:
    """The values of a configuration after all changes."""
    values = flat(config)
    for change in history.changes:
        assert values.get(change.key) == change.old
        values[change.key] = change.new
    return {key: value for key, value in values.items() if value is not None}


def test_phases_are_compared_by_name_inside_repeats_too() -> None:
    inner = [{"name": "b", "steps": 5}, {"name": "c", "steps": 3}]
    before = {"phases": [{"name": "a", "steps": 1}, {"repeat": 2, "phases": inner}]}
    now = {"phases": [{"name": "a", "steps": 2}, {"repeat": 3, "phases": [inner[0] | {"steps": 6}, inner[1]]}]}
    assert [str(each) for each in config_differences(before, now)] == [
        "phases (order): ['a', [2, ['b', 'c']]] -> ['a', [3, ['b', 'c']]]",
        "phases.a.steps: 1 -> 2",
        "phases.b.steps: 5 -> 6",
    ]
