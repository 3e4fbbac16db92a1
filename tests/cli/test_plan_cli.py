"""`mtl plan` as a user meets it: text, plain data, pictures, one clear line for what is wrong, and nothing written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mtl.cli import main
from mtl.config import load_config
from mtl.phases.plan import make_plan
from mtl.phases.setup import build_model_setup
from runs import TINY, tiny_config

PNG = b"\x89PNG\r\n\x1a\n"


def small_config(folder: Path, **changes: Any) -> Path:
    """The tiny configuration with one head, whose plan is made in half the time."""
    return tiny_config(folder, **({"tasks": {"object": TINY["tasks"]["object"]}, "balance": {}} | changes))


def written(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def said_by(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What `mtl plan` prints if all goes well."""
    code = main(["plan", *map(str, arguments)])
    said = capsys.readouterr()
    assert (code, said.err) == (0, "")
    return said.out


def paragraphs(text: str) -> dict[str, list[str]]:
    """By phase: its lines, without the first one's length."""
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return {lines[0].partition(":")[0]: lines for lines in blocks}


def test_every_phase_has_a_paragraph_that_says_what_its_patterns_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = paragraphs(said_by(capsys, tiny_config(tmp_path)))
    assert list(phases) == ["warm-heads", "finetune"]
    assert phases["warm-heads"][0] == "warm-heads: 1 epoch (5 steps), batches of 8"
    assert phases["finetune"][0] == "finetune: 7 steps, batches of 8"
    for name, patterns in (("warm-heads", ["trunk"]), ("finetune", ["trunk.conv1", "trunk.bn1", "heads.object"])):
        lines = [line.split() for line in phases[name]]
        assert [words[1] for words in lines if words[0] == "freeze"] == patterns
        assert [words for words in lines if words[0] == "tasks"] == [
            ["tasks", "segmentation,", "depth,", "normals,", "object"]
        ]
    objects = next(line for line in phases["finetune"] if "heads.object  decides" in line)
    assert objects.endswith("decides 2 tensors")
    group = next(line for line in phases["warm-heads"] if line.split()[0] == "adamw")
    assert "lr 0.002, decay 0.05: " in group
    assert next(line for line in phases["warm-heads"] if line.split()[0] == "frozen").endswith(": trunk")
    assert not any(line.split()[0] in ("thawed", "newly") for line in phases["warm-heads"])
    newly = next(line for line in phases["finetune"] if line.split()[:2] == ["newly", "frozen"])
    assert newly.endswith("2 tensors, 970 parameters, 3.88 kB: heads.object")


def test_overrides_change_the_plan_before_and_after_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small_config(tmp_path, phases=[{"name": "only", "steps": 7}])
    text = said_by(capsys, file, "phases.only.steps=3", "--world-size", "2", "phases.0.freeze=[trunk.layer1]")
    assert text.startswith("only: 3 steps, ")
    assert "trunk.layer1  decides" in text


def test_the_parameter_map_has_one_row_per_parameter_and_one_column_per_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases: list[dict[str, Any]] = [
        {"name": "warm", "freeze": ["trunk"], "steps": 1, "lr": {"heads": 2e-3}},
        {"name": "fine", "freeze": ["trunk.conv1"], "steps": 1, "lr": {"**": 3e-4, "heads.depth": 1e-3}},
        {"name": "depth", "tasks": ["depth"], "freeze": ["trunk.layer4"], "steps": 1, "lr": 5e-4},
        {"name": "end", "evaluate_only": True},
    ]
    file = tiny_config(tmp_path, phases=phases, balance={"method": "famo"})
    header, rule, *rows = said_by(capsys, file, "--params").splitlines()
    assert header.split() == ["parameter", "warm", "fine", "depth", "end"] and set(rule) == {"-", " "}
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    root = build_model_setup(load_config(file), "meta").root
    assert [row.split()[0] for row in rows] == [name for name, _ in root.named_parameters()]
    assert cells["trunk.conv1.0.weight"] == ["frozen", "frozen", "0.0005", "frozen"]
    assert cells["trunk.bn1.bias"] == ["frozen", "0.0003", "0.0005", "frozen"]
    assert cells["trunk.layer4.0.conv1.weight"] == ["frozen", "0.0003", "frozen", "frozen"]
    assert cells["heads.depth.out.bias"] == ["0.002", "0.001", "0.0005", "frozen"]
    assert cells["heads.object.out.weight"] == ["0.002", "0.0003", "unreached", "frozen"]
    (famo,) = {tuple(values) for name, values in cells.items() if name.startswith("balance.0.")}
    assert famo == ("-", "-", "frozen", "frozen"), "the method steps its own weights, of four tasks and of one apart"


@pytest.mark.parametrize("params", [False, True])
def test_plain_data_parses_and_is_that_of_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], params: bool
) -> None:
    file = small_config(tmp_path)
    plain = json.loads(said_by(capsys, file, "--json", "--world-size", "4", *(["--params"] if params else [])))
    plan = make_plan(build_model_setup(load_config(file), "meta"), world_size=4, with_forecast=True)
    assert plain == json.loads(json.dumps(plan.to_json(names=params)))
    assert (plain["trunk"], plain["world_size"]) == ("test_resnet", 4)
    assert ("names" in plain["phases"][0]["frozen"]) == params


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_drawn_next_to_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    phases = [*TINY["phases"], {"name": "last-look", "evaluate_only": True}]
    file, picture = small_config(tmp_path, phases=phases), tmp_path / f"plan.{ending}"
    before = written(tmp_path)
    assert main(["plan", str(file), "--plot", str(picture)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("warm-heads: ") and said.err == f"{picture}\n"
    assert written(tmp_path) - before == {picture}
    content = picture.read_bytes()
    if ending == "png":
        assert content.startswith(PNG) and len(content) > 5000
    else:
        for name in ("warm-heads", "finetune", "last-look", "test_resnet: what each phase trains"):
            assert name in content.decode()


def test_the_traffic_among_processes_is_reported_only_if_there_are_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = small_config(tmp_path, phases=[{"name": "all", "steps": 1}])
    alone, among = (said_by(capsys, file, "--world-size", size) for size in ("1", "4"))
    assert "ring" not in alone
    megabytes, sent = map(
        float, re.findall(r"all-reduce +([\d.]+) MB .* among 4 processes each sends ([\d.]+) MB", among)[0]
    )
    assert sent == pytest.approx(1.5 * megabytes, abs=0.1)


def test_planning_writes_nothing_and_makes_no_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_CACHE_DIR", str(tmp_path / "cache"))
    file = small_config(tmp_path)
    before = written(tmp_path)
    said_by(capsys, file)
    said_by(capsys, file, "--generate", "gradual")
    assert written(tmp_path) == before == {file}


BAD: dict[str, tuple[list[str], str]] = {
    "dead pattern": (
        ["phases.0.freeze=[trunk.layer9]"],
        r"command line: phases.warm-heads.freeze.0: pattern 'trunk.layer9' matches nothing \(nearest: trunk.layer",
    ),
    "picture in a missing directory": (
        ["--plot", "nowhere/plan.png"],
        "--plot: nowhere/plan.png cannot be written: No such file",
    ),
    "picture with an unknown ending": (
        ["--plot", "plan.bmpp"],
        "--plot: plan.bmpp cannot be written: expected .*, .png",
    ),
    "picture without an ending": (["--plot", "plan"], "--plot: plan cannot be written: expected a name that ends in"),
    "generate and draw": (
        ["--generate", "gradual", "--plot", "a.png"],
        "--generate only writes phases; leave out --plot",
    ),
    "epochs of nothing": (["--epochs", "2"], "--epochs is the length of phases that --generate writes"),
    "no processes": (["--world-size", "0"], "--world-size: expected 1 or more, got 0"),
    "no epochs": (["--generate", "gradual", "--epochs", "0"], "--epochs: expected 1 or more, got 0"),
    "nothing trains": (
        ["phases.warm-heads.freeze=[trunk, heads]"],
        "command line: phases.warm-heads.freeze: phase 'warm-heads' trains nothing: every parameter is frozen",
    ),
    "unknown key": (
        ["phases.0.frieze=[trunk]"],
        "command line: phases.warm-heads.frieze: unknown key; nearest: freeze",
    ),
    "unknown trunk": (["trunk.name=resnt18", "--generate", "gradual"], "trunk.name: .*nearest: resnet18"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_exit_code_2_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments, message = BAD[name]
    file = small_config(tmp_path)
    assert main(["plan", str(file), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert re.search(f"^error: .*{message}", line), line
    assert written(tmp_path) == {file}


def test_a_missing_configuration_is_one_line_that_lists_those_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config(tmp_path)
    assert main(["plan", str(tmp_path / "tyni.yaml")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/tyni.yaml: no such file; there are: {tmp_path}/tiny.yaml\n"


@pytest.mark.parametrize("arguments", [["--generate", "gradul"], ["--world-size", "two"], ["--nonsense"]])
def test_arguments_that_cannot_be_read_are_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(tiny_config(tmp_path)), *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("usage: mtl plan") and arguments[-1] in said[-1]
