"""Each recipe of configs/recipes trains, with a clean audit, what its paper trains: written out by hand."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtl.config import load_config
from mtl.phases.setup import ModelSetup, build_meta_setup
from mtl.training.run import train
from mtl.training.setup import RunSetup, assemble

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs/recipes").glob("*.yaml"))

# Of the EfficientNet: what the stem and the blocks of some stages are called.
STEM = r"trunk\.(conv_stem|bn1)\..*"
TOP = r"trunk\.(conv_head|bn2)\..*"
HEADS = r"(heads|balance)\..*"
ALL = r".*"


def stages(numbers: str) -> str:
    return rf"trunk\.blocks\.[{numbers}]\..*"


def either(*expressions: str) -> str:
    return "|".join(f"(?:{each})" for each in expressions)


# Of each recipe, by phase: the names of the parameters that are trained.
TRAINED: dict[str, dict[str, str]] = {
    "lp_ft": {"probe": HEADS, "finetune": ALL},
    "gradual_unfreezing": {
        "heads": HEADS,
        "last-1": either(HEADS, TOP, stages("6")),
        "last-2": either(HEADS, TOP, stages("4-6")),
        "last-3": either(HEADS, TOP, stages("2-6")),
        "everything": ALL,
    },
    "bitfit": {"biases": either(HEADS, r"trunk\..*\.bias")},
    "last_k": {
        "heads": HEADS,
        # The last block of stage 6, and three of the four of stage 5.
        "last-4": either(HEADS, TOP, stages("6"), r"trunk\.blocks\.5\.[123]\..*"),
    },
    "norms_only": {"norms": either(HEADS, r"trunk\.(blocks\..*\.)?bn\d\.(weight|bias)")},
    "surgical": {"source": ALL, "first-block": either(STEM, stages("0"))},
    "layer_decay": {"all": ALL},
    "alternate": {
        f"{part}.{number}": {"heads": HEADS, "trunk": r"trunk\..*"}[part]
        for number in (1, 2, 3)
        for part in ("heads", "trunk")
    },
    "distillation": {
        "align": r"(trunk|heads\.like_lite0)\..*",
        "tasks": r"trunk\..*|heads\.(segmentation|depth|normals|object)\..*|balance\.1\..*",
    },
    "continual": {
        # The dense heads read the pyramid, which ends before the last convolution.
        "first-two": either(STEM, stages("0-6"), r"heads\.(segmentation|depth)\..*"),
        "add-normals": r"heads\.normals\..*",
        "add-object": r"heads\.object\..*",
    },
}


@cache
def planned(name: str) -> ModelSetup:
    return build_meta_setup(load_config(ROOT / f"configs/recipes/{name}.yaml"))


def test_every_recipe_is_written_out_here_and_documented() -> None:
    names = [file.stem for file in RECIPES]
    assert names == sorted(TRAINED)
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"configs/recipes/(\w+)\.yaml", page))) == names


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_trains_in_each_phase_what_its_paper_trains(name: str) -> None:
    assert planned(name).config.name == name
    assert planned(name).unread == [], "every setting is read"
    assert [phase.name for phase in planned(name).phases] == list(TRAINED[name])
    for phase in planned(name).phases:
        names = phase.freeze.plan.names
        expected = re.compile(TRAINED[name][phase.name])
        frozen_teacher = [name for name in names.frozen if name.startswith("teachers.")]
        assert [name for name in names.trainable if not expected.fullmatch(name)] == []
        assert [name for name in names.frozen if expected.fullmatch(name) and name not in frozen_teacher] == []


def peak_rates(name: str) -> dict[str, float]:
    """The peak rate of each trained parameter of a recipe's last phase."""
    name_of = {id(parameter): each for each, parameter in planned(name).root.named_parameters()}
    return {name_of[id(p)]: group["lr"] for group in planned(name).phases[-1].groups for p in group["params"]}


def test_the_rates_of_gradual_unfreezing_fall_by_the_papers_factor_from_each_group_to_the_one_below() -> None:
    found = peak_rates("gradual_unfreezing")
    groups = [r"heads\..*", either(TOP, stages("6")), stages("45"), stages("23"), either(STEM, stages("01"))]
    matched = [{lr for name, lr in found.items() if re.fullmatch(group, name)} for group in groups]
    assert all(len(each) == 1 for each in matched)
    assert [lr for each in matched for lr in each] == pytest.approx([3e-3 / 2.6**n for n in range(5)], rel=1e-3)


def test_the_rates_of_layer_decay_fall_from_each_block_to_the_one_below() -> None:
    found = peak_rates("layer_decay")
    expected = {"heads.depth.out.weight": 1e-3, "trunk.norm.weight": 0.75e-3, "trunk.cls_token": 1e-3 * 0.75**13}
    expected |= {f"trunk.blocks.{number}.mlp.fc1.weight": 1e-3 * 0.75 ** (12 - number) for number in range(12)}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


# Small trunks of the same make; gradual unfreezing names stages that only the large one has. Generated schedules of its
# kind, and alternating ones, are trained in tests/phases/test_generate.py by default.
SMALL = {"tf_efficientnet_lite0": "test_efficientnet", "vit_tiny_patch16_224": "test_vit", "resnet10t": "test_resnet"}
MANY_PHASES = ("gradual_unfreezing", "alternate")
RUNS = [pytest.param(f, marks=pytest.mark.slow if f.stem in MANY_PHASES else (), id=f.stem) for f in RECIPES]


def short(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Phases of one step each, without a warm-up, which would be longer."""
    found = []
    for entry in entries:
        kept = {key: value for key, value in entry.items() if key not in ("epochs", "until", "max_epochs")}
        if "lr_schedule" in kept:
            kept["lr_schedule"] = "cosine"
        found.append(kept | ({"phases": short(entry["phases"])} if "phases" in entry else {"steps": 1}))
    return found


def tiny(file: Path, folder: Path) -> RunSetup:
    """A recipe on eight small images, without weights, with a step for each phase."""
    config = load_config(file)
    trunk = config.trunk.name if file.stem == "gradual_unfreezing" else SMALL[config.trunk.name]
    changes = {
        "_base_": str(file),
        "runs_dir": str(folder / "runs"),
        "data": {"image_size": 32, "batch_size": 8, "num_train": 8, "num_val": 8},
        "tracking": {"mode": "disabled"},
        "trunk": {"name": trunk, "weights": "none"},
        "phases": short(yaml.safe_load(file.read_text(encoding="utf-8"))["phases"]),
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(changes, sort_keys=False))
    return assemble(load_config(folder / "tiny.yaml"), quiet=True)


@pytest.mark.parametrize("file", RUNS)
def test_a_recipe_runs_with_a_clean_audit(file: Path, tmp_path: Path) -> None:
    report = train(tiny(file, tmp_path), quiet=True).report
    assert report.ok
    assert [phase.name for phase in report.phases] == list(TRAINED[file.stem])
