"""What the documentation shows works as it stands."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel
from test_imports import FLOORS

import mtl
from mtl.cli import main
from mtl.config import RunConfig, TaskConfig, load_config
from mtl.data import BUILT_IN
from mtl.phases.plan import Plan, make_plan
from mtl.phases.plan.text import full_plan
from mtl.phases.setup import ModelSetup, build_meta_setup
from mtl.tasks import (
    Classification,
    Depth,
    Distill,
    Edges,
    Keypoints,
    MultiLabel,
    Normals,
    Ordinal,
    Regression,
    Saliency,
    Segmentation,
    Task,
)
from mtl.tasks.protocols import add_protocol
from mtl.training.validation import score
from pages import PAGES, code_block, code_blocks
from runs import read_metrics, tiny_config

ROOT = Path(__file__).parent.parent

sys.path.insert(0, str(ROOT / "scripts/docs"))
import api_docs  # noqa: E402
import config_docs  # noqa: E402


def test_the_configuration_in_the_readme_loads_and_its_phases_resolve(tmp_path: Path) -> None:
    whole, of_ones_own = code_blocks("README.md", "yaml")
    file = tmp_path / "readme.yaml"
    file.write_text(of_ones_own + "name: birds\ntrunk: {name: resnet18}\nphases: [{name: a, epochs: 1}]\n")
    assert list(load_config(file).tasks) == ["species", "age", "parts"]
    file.write_text(whole)
    assert [phase.name for phase in build_meta_setup(load_config(file)).phases] == ["warm-heads", "finetune"]


def test_the_readme_in_chinese_has_the_configuration_of_the_readme_and_all_patterns() -> None:
    whole = yaml.safe_load(code_blocks("README.md", "yaml")[0])
    assert yaml.safe_load(code_block("docs/README.zh.md", "yaml")) | {"memory_format": "channels_last"} == whole
    pages = {"docs/configuration.md": "| pattern | selects |", "docs/README.zh.md": "| 模式 | 选中的内容 |"}
    ours, theirs = ([re.findall(r"`([^`]+)`", row[0]) for row in table(*page)] for page in pages.items())
    assert ours == theirs


@pytest.mark.slow
def test_what_the_readme_says_of_other_ways_to_freeze_is_what_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts/bench")
    peers = importlib.import_module("freeze_peers")
    rows = table("README.md", "| request | loop by hand |")
    tools = [
        lambda fault: peers.by_hand(fault, audited=False),
        lambda fault: peers.by_lightning(fault, scheduled=False),
        None,  # FinetuningScheduler is not in the extra `dev`
        peers.here,
    ]
    assert len(rows) == len(peers.FAULTS)
    for row, fault in zip(rows, peers.FAULTS, strict=True):
        for said, tool in zip(row[1:], tools, strict=True):
            if tool is not None:
                assert tool(fault).startswith(said.partition(",")[0]), (fault, said)
        assert peers.by_hand(fault, audited=True).startswith("caught: ")


def test_the_phases_in_the_documentation_resolve(tmp_path: Path) -> None:
    block = code_block("docs/phases.md", "yaml")
    base = (ROOT / "configs/scenes.yaml").read_text(encoding="utf-8")
    file = tmp_path / "phases.yaml"
    file.write_text(base[: base.index("phases:")] + block)
    names = [phase.name for phase in build_meta_setup(load_config(file)).phases]
    repeated = [f"{part}.{number}" for number in (1, 2) for part in ("heads", "trunk")]
    assert names == ["warm-heads", "finetune", *repeated, "polish-depth", "last-word"]


def test_the_run_with_a_teacher_in_the_documentation_resolves(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(code_block("docs/tasks.md", "yaml"))
    setup = build_meta_setup(load_config(file))
    assert [phase.tasks for phase in setup.phases] == [("like_lite0",), ("object",), ("object",)]
    assert setup.tasks["like_lite0"].num_outputs == 1280


def test_the_backend_in_the_documentation_writes_its_file(tmp_path: Path) -> None:
    (tmp_path / "csv_log.py").write_text(code_block("docs/tracking.md", "python"))
    own = {"backend": "csv_log:Csv", "options": {"names": ["val/score", "val/depth/rmse"]}}
    file = tiny_config(tmp_path, tracking=own, phases=[{"name": "a", "freeze": ["trunk"], "epochs": 2}])
    assert main(["train", str(file), "-q"]) == 0
    rows = [row for row in read_metrics(tmp_path / "runs/tiny") if "val/score" in row]
    lines = (tmp_path / "runs/tiny/log.csv").read_text().splitlines()
    assert lines == [f"{row['step']},{row['val/score']},{row['val/depth/rmse']}" for row in rows] and len(lines) == 2


# Figures: each is read out of the page that states it, and computed from the default configuration

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBERS = dict(zip(WORDS, range(1, 13), strict=True))


@pytest.fixture(scope="module")
def default() -> ModelSetup:
    return build_meta_setup(load_config(ROOT / "configs/scenes.yaml"))


@pytest.fixture(scope="module")
def plan(default: ModelSetup) -> Plan:
    return make_plan(default, with_forecast=True)


def stated(page: str, expression: str) -> list[str]:
    """What a page says at an expression's group, line breaks aside; an expression that is never found is an error."""
    found: list[str] = re.findall(expression, " ".join((ROOT / page).read_text(encoding="utf-8").split()))
    assert found, f"{page} no longer says {expression!r}"
    return found


@pytest.mark.parametrize("page", ["README.md", "configs/scenes.yaml"])
def test_the_number_of_frozen_blocks_is_the_one_stated(page: str, default: ModelSetup) -> None:
    frozen = default.phases[1].freeze.plan.names.frozen
    blocks = {match[0] for name in frozen if (match := re.match(r"trunk\.blocks\.\d+\.\d+(?=\.)", name))}
    assert [NUMBERS[word] for word in stated(page, r"the stem and the first (\w+) blocks")] == [len(blocks)]


def test_the_tasks_steps_and_tensors_of_the_default_run_are_those_stated(default: ModelSetup) -> None:
    tasks = default.config.tasks
    assert [NUMBERS[word] for word in stated("README.md", r"trains (\w+) tasks")] == [len(tasks)]
    assert stated("README.md", r"segmentation into (\d+) classes") == [str(default.tasks["segmentation"].num_outputs)]
    num_steps = sum(phase.steps_per_epoch * (phase.config.epochs or 0) for phase in default.phases)
    assert stated("README.md", r"checks in (\d+) steps") == [str(num_steps)]
    frozen = [phase.freeze.plan.names for phase in default.phases]
    numbers = [
        f"{phase.name}: {len(names.frozen) + len(names.frozen_buffers)}"
        for phase, names in zip(default.phases, frozen, strict=True)
    ]
    assert stated("README.md", r"frozen tensors bit-identical \((.*?)\)") == [", ".join(numbers)]


@pytest.mark.parametrize("page", ["docs/configuration.md", "docs/dividend.md"])
def test_lines_of_a_plan_are_those_that_the_plan_prints(page: str, plan: Plan) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    keys = "frozen|trained|freeze|computed once|in eval mode|memory|an image|thawed|all-reduce|adamw"
    shown = re.findall(rf"^    (finetune: .*batches of \d+|  (?:{keys})  +\S.*)$", text, flags=re.MULTILINE)
    printed = full_plan(plan).splitlines()
    assert shown
    for line in shown:
        start, is_cut = line.rstrip(" ."), line.endswith("...")
        assert any(each.startswith(start) if is_cut else each == line for each in printed), line


@pytest.mark.parametrize("page", ["README.md", "docs/dividend.md"])
def test_the_size_of_what_is_kept_is_the_one_planned(page: str, plan: Plan) -> None:
    sizes = stated(page, r"features: the trunk computed once, .*? kept in memory: (.*? for \d+ images)")
    kept = re.search(r"the trunk; kept: .* an image, (.*?) in all", full_plan(plan))
    assert kept and sizes == [f"{kept[1]} for {2600 + 500} images"]


# Links


def headings(page: str) -> set[str]:
    """The anchors of a page's headings; lines inside code are none."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {config_docs.anchor(title) for title in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_heading_that_exist(page: str) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target.resolve().relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    # What a command writes need not be there.
    text = re.sub(r"> \S+$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    for file in re.findall(r"(?<![\w/.-])((?:mtl|tests|scripts|docs|configs)/[\w./-]*\w/?)(?![\w*])", text):
        assert (ROOT / file).exists(), file


def test_the_map_of_the_site_has_every_page_once_with_what_it_is() -> None:
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    assert sorted(re.findall(r"\[([\w.]+\.md)\]\(\1\)", text)) == sorted(set(pages) - {"index.md"})
    for line in re.findall(r"^- (.*?)(?=^- |^$)", text, flags=re.MULTILINE | re.DOTALL):
        assert len(line.rpartition("): ")[2].split()) > 2 or line.count("](") > 1, line


# The house


def test_the_map_of_the_house_has_the_rooms_on_their_floors_and_files_that_exist() -> None:
    rows = table("CONTRIBUTING.md", "| floor | rooms | hold |")
    shown = {int(floor): sorted(re.findall(r"`(\w+)(?:/|\.py)`", rooms)) for floor, rooms, _ in rows}
    assert shown == {number: sorted(rooms) for number, rooms in enumerate(FLOORS, start=1)}
    house = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The house")[2].partition("\n## ")[0]
    assert len(house.splitlines()) <= 60
    rooms = "|".join(room for floor in FLOORS for room in floor)
    files = re.findall(rf"\b((?:{rooms})/[\w/]+\.py)", house)
    assert len(files) > 10
    assert [file for file in files if not (ROOT / "mtl" / file).exists()] == []


# All keys


def test_the_page_of_all_keys_is_what_the_models_say() -> None:
    made = config_docs.page()
    assert (ROOT / "docs/config.md").read_text(encoding="utf-8") == made, f"make it again: {config_docs.__doc__}"


def models(model: type[BaseModel]) -> set[type[BaseModel]]:
    """All models below one."""
    found: set[type[BaseModel]] = set()
    new = {model}
    while new:
        found |= new
        inner = (field.annotation for each in new for field in each.model_fields.values())
        new = {each for annotation in inner for each in config_docs.inside(annotation)} - found
    return found


def test_every_key_of_every_model_has_a_row_with_a_meaning() -> None:
    rows = [[cell.strip() for cell in row.split(" | ")] for row in config_docs.page().splitlines() if row[:3] == "| `"]
    keys = [row[0].split("`")[1].rpartition(".")[2] for row in rows]
    every_model = models(RunConfig)
    shared = {base for model in every_model for base in model.__mro__ if base in config_docs._SHARED}
    # Keys that several models share have a row of their own, once; those that a model declares again, another.
    elsewhere = {
        model: {key for base in model.__mro__[1:] if base in shared for key in base.model_fields}
        for model in every_model | shared
    }
    expected = [
        key
        for model, keys_of_others in elsewhere.items()
        for key in model.model_fields
        if key in model.__annotations__ or key not in keys_of_others
    ]
    assert sorted(keys) == sorted(expected)
    assert all(len(row) == 4 and len(row[3]) > 5 for row in rows)


def test_the_page_of_all_keys_is_written_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_docs.main(["--write", str(tmp_path / "page.md")])
    assert capsys.readouterr().out == ""
    config_docs.main([])
    assert capsys.readouterr().out == (tmp_path / "page.md").read_text(encoding="utf-8") == config_docs.page()


# All Python names


def test_the_page_of_python_names_is_what_signatures_and_docstrings_say() -> None:
    made = api_docs.page()
    assert (ROOT / "docs/python_api.md").read_text(encoding="utf-8") == made, f"make it again: {api_docs.__doc__}"


def test_every_public_name_has_a_signature_and_a_meaning() -> None:
    listed = [name for section in api_docs.names().values() for name in section]
    assert {f"mtl.{name}" for name in mtl.__all__} - {"mtl.__version__"} <= set(listed)
    entries = dict(re.findall(r"^### `([\w.]+)`\n\n(.*?)(?=^##|\Z)", api_docs.page(), flags=re.MULTILINE | re.DOTALL))
    assert sorted(entries) == sorted(listed)
    for name, text in entries.items():
        thing = api_docs.find(name)
        assert len(text.split()) > 5
        if not (isinstance(thing, type) and issubclass(thing, Exception)):
            (shown,) = ast.parse(f"def {text.splitlines()[0].strip()}: ...").body
            assert isinstance(shown, ast.FunctionDef)
            own = {each.arg for each in ast.walk(shown) if isinstance(each, ast.arg)}
            assert own == set(inspect.signature(thing).parameters) - {"self"}


def test_the_page_of_python_names_is_written_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api_docs.main(["--write", str(tmp_path / "page.md")])
    api_docs.main([])
    assert capsys.readouterr().out == (tmp_path / "page.md").read_text(encoding="utf-8")


def test_the_numbers_of_images_in_the_page_of_all_keys_are_those_of_the_data_sets() -> None:
    for key, attribute in (("num_train", "num_train"), ("num_val", "num_val")):
        (numbers,) = stated("docs/config.md", rf"`data.{key}` .*? if not set, (\S+) of `scenes` and (\S+) of `multif")
        expected = [getattr(BUILT_IN[name], attribute) for name in ("scenes", "multifashion")]
        assert [int(number.replace(",", "")) for number in numbers] == expected


# Metrics and the trivial predictor

TASKS: dict[str, Task] = {
    "segmentation": Segmentation(13),
    "depth": Depth(),
    "normals": Normals(),
    "classification": Classification(10),
    "ordinal": Ordinal(3),
    "multilabel": MultiLabel(2),
    "regression": Regression(),
    "edges": Edges(),
    "saliency": Saliency(),
    "keypoints": Keypoints(1, (8, 8)),
    "distill": Distill(2),
}


def table(page: str, header: str) -> list[list[str]]:
    """The rows below a header, each as its cells."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count(header) == 1
    lines = text.partition(header)[2].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def results() -> dict[tuple[str, str], dict[str, float]]:
    """The table of the default run in the README: by task and metric, the trivial predictor and each phase."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^    task +metric +trivial .*?(?=^    audit:)", text, flags=re.MULTILINE | re.DOTALL)
    header, _, *rows = (line.split() for line in block.splitlines())
    return {(task, metric): dict(zip(header[2:], map(float, numbers), strict=True)) for task, metric, *numbers in rows}


def test_the_table_of_metrics_holds_every_metric_and_main_metric() -> None:
    documented: dict[str, list[str]] = {}
    for task, metrics, _, better, perfect, is_main in table("docs/metrics.md", "| task type | metric |"):
        names = re.findall(r"`(\w+)`", metrics)
        documented.setdefault(task.strip("`"), []).extend(names)
        goal = TASKS[task.strip("`")].goal
        assert (is_main == "yes") == (goal.metric in names)
        assert (better, perfect) in (("higher", "1"), ("lower", "0"))
        if is_main:
            assert (float(perfect), better) == (goal.perfect, goal.direction)
    assert documented == {name: list(task.metrics().compute()) for name, task in TASKS.items()}
    tags = {extra.tag for kind in get_args(get_args(TaskConfig)[0]) for extra in get_args(kind)[1:]}
    assert documented.keys() == tags - {"package.module:Name"}


def test_every_number_of_a_paper_has_a_name_that_the_code_gives() -> None:
    text = (ROOT / "docs/paper_numbers.md").read_text(encoding="utf-8")
    given: set[str] = set()
    for protocol in ("mtan", "astmt", "invpt", "eigen"):
        tasks: dict[str, Task] = {"s": Segmentation(3), "d": Depth(), "n": Normals(), "a": Saliency(), "e": Edges()}
        add_protocol(tasks, protocol)
        given |= {name for task in tasks.values() for make in task.added for name in make().compute()}
    named = set(re.findall(r"`(\w+@\w+)`", text))
    assert named == given
    own = {name for task in TASKS.values() for name in task.metrics().compute()} | {"mae", "ods_f"}
    tables = text.split("| column | better | theirs, here | pooled | how they differ |")[1:]
    rows = [line.split(" | ") for part in tables for line in part.split("\n\n")[0].splitlines()[2:]]
    assert len(rows) > 12
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[3])} <= own


def test_the_score_worked_out_by_hand_is_what_the_code_computes() -> None:
    tasks: dict[str, Task] = {}
    scores, trivial = ({}, {})
    for task, metric, perfect, constant, value, skill in table("docs/metrics.md", "| task | main metric |"):
        tasks[task] = TASKS["classification" if task == "object" else task]
        assert (metric, float(perfect)) == (tasks[task].goal.metric, tasks[task].goal.perfect)
        assert f"{tasks[task].goal.skill(float(value), float(constant)):.4f}" == skill
        scores[task], trivial[task] = {metric: float(value)}, {metric: float(constant)}
        shown = results()[task, metric]
        assert (shown["trivial"], shown["finetune"]) == (float(constant), float(value))
    assert stated("docs/metrics.md", r"is `val/score` = (\S+)\. ") == [f"{score(tasks, scores, trivial):.3f}"]
    # The run's own score is not that of the table's rounded values.
    (of_the_run,) = stated("README.md", r"best val/score (\S+) at step")
    assert float(of_the_run) == pytest.approx(score(tasks, scores, trivial), abs=6e-4)


def test_the_numbers_of_the_trivial_predictor_are_those_of_the_readme() -> None:
    text = (ROOT / "docs/trivial.md").read_text(encoding="utf-8")
    rows = re.findall(r"^    (\w+) +(\w+) +([\d.]+) +([\d.]+)$", text, flags=re.MULTILINE)
    assert {(task, metric): (float(a), float(b)) for task, metric, a, b in rows} == {
        key: (numbers["trivial"], numbers["finetune"]) for key, numbers in results().items()
    }
    # One class at every pixel: its IoU is its share of the pixels, that of the others is 0.
    num_classes = TASKS["segmentation"].num_outputs
    accuracy, miou = (results()["segmentation", name]["trivial"] for name in ("pixel_accuracy", "miou"))
    assert f"{accuracy / num_classes:.4f}" == f"{miou:.4f}"


def test_the_names_in_metrics_jsonl_are_those_documented(tmp_path: Path) -> None:
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8").partition("## What is logged")[2]
    documented = re.findall(r"^\| `((?:train|val|audit|perf|grad)/[^`]*)` \|", text, flags=re.MULTILINE)
    assert len(documented) == len(set(documented)) + 1  # perf/images_per_s stands in two tables
    forms = {name: re.sub(r"<\w+>", r"[^/]+", name) for name in documented}
    file = tiny_config(tmp_path, not_finite="skip", phases=[{"name": "all", "freeze": ["trunk.conv1"], "epochs": 1}])
    assert main(["train", str(file), "-q"]) == 0
    logged = {key for row in read_metrics(tmp_path / "runs/tiny") for key in row if "/" in key}
    for name in logged:
        assert any(re.fullmatch(form, name) for form in forms.values()), f"not documented: {name}"
    for name, form in forms.items():
        assert any(re.fullmatch(form, each) for each in logged), f"never logged: {name}"
