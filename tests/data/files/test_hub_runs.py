"""Whole runs on data that Hugging Face's datasets and webdataset wrote: trained, resumed, checked, refused."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import webdataset
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from crashes import SHORT, assert_same, crash, resume, run_whole
from mtl.cli import main
from runs import read_metrics, read_model, tiny_config

NUM = {"train": 16, "validation": 6}
NAMES = ["finch", "jay", "owl"]


def rows(split: str) -> list[dict[str, Any]]:
    """A class, a number, a mask and a depth of each picture; some are missing, and sizes differ."""
    rng, made = np.random.default_rng(len(split)), list[dict[str, Any]]()
    for number in range(NUM[split]):
        size = (24, 30) if number % 2 else (32, 32)
        made.append(
            {
                "image": Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)),
                "kind": None if number == 3 else number % 3,
                "wing": number / 8,
                "parts": None if number == 1 else Image.fromarray(rng.integers(0, 4, size, dtype=np.uint8)),
                "distance": Image.fromarray(rng.integers(500, 5000, size).astype(np.uint16)),
            }
        )
    return made


def save(place: Path) -> dict[str, Any]:
    features = Features(
        {
            "image": datasets.Image(),
            "kind": ClassLabel(names=NAMES),
            "wing": Value("float32"),
            "parts": datasets.Image(),
            "distance": datasets.Image(),
        }
    )
    DatasetDict({split: Dataset.from_list(rows(split), features=features) for split in NUM}).save_to_disk(str(place))
    return {"name": "huggingface", "path": str(place), "val": "validation"}


def write(place: Path) -> dict[str, Any]:
    place.mkdir()
    for split in NUM:
        with webdataset.ShardWriter(f"{place}/{split}-%02d.tar", maxcount=6, verbose=0) as writer:
            for number, row in enumerate(rows(split)):
                sample = {
                    "__key__": f"{number:04d}",
                    "png": row["image"],
                    "json": {"kind": None if row["kind"] is None else NAMES[row["kind"]], "wing": row["wing"]},
                    "parts.png": row["parts"],
                    "distance.png": row["distance"],
                }
                # As bytes: the library would write all of them with 8 bits.
                writer.write({key: encoded(value) for key, value in sample.items() if value is not None})
    labels = {"parts": "parts.png", "distance": "distance.png"}
    places = {"train": f"{place}/train-{{00..02}}.tar", "val": f"{place}/validation-00.tar"}
    return {"name": "webdataset", "image": "png", "labels": labels, **places}


def encoded(value: Any) -> Any:
    if not isinstance(value, Image.Image):
        return value
    stream = io.BytesIO()
    value.save(stream, "PNG")
    return stream.getvalue()


MAKERS: dict[str, Callable[[Path], dict[str, Any]]] = {"huggingface": save, "webdataset": write}
PHASES = [
    {"name": "heads", "freeze": ["trunk"], "epochs": 1, "lr": 2e-3},
    {"name": "all", "freeze": [], "epochs": 1},
]


def settings(data: dict[str, Any], **more: Any) -> dict[str, Any]:
    own = data | {"image_size": 32, "batch_size": 4, "scale": {"distance": 0.001}} | more
    tasks = {
        "kind": {"type": "classification"},
        "wing": {"type": "regression"},
        "parts": {"type": "segmentation", "num_classes": 4},
        "distance": {"type": "depth"},
    }
    return {"data": own, "tasks": tasks, "phases": PHASES, "balance": {"method": "sum"}}


def config(folder: Path, name: str) -> str:
    return str(tiny_config(folder, **settings(MAKERS[name](folder / "data"))))


@pytest.fixture(params=list(MAKERS))
def birds(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return config(tmp_path, request.param)


def run(file: str, name: str, *overrides: str) -> dict[str, torch.Tensor]:
    assert main(["train", file, "-q", f"name={name}", *overrides]) == 0
    return read_model(Path(file).parent / "runs" / name / "checkpoints" / "last")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_run_is_the_same_from_memory_batch_by_batch_and_with_workers(birds: str) -> None:
    one = run(birds, "memory")
    metrics = read_metrics(Path(birds).parent / "runs/memory")
    assert {f"val/{task}" for task in ("kind", "wing", "parts", "distance")} <= {
        "/".join(key.split("/")[:2]) for row in metrics for key in row
    }
    assert same(one, run(birds, "lazy", "data.memory_gb=0"))
    assert same(one, run(birds, "workers", "data.memory_gb=0", "data.num_workers=2"))


def test_both_formats_hold_the_same_data(tmp_path: Path) -> None:
    runs = []
    for name in MAKERS:
        (tmp_path / name).mkdir()
        runs.append(run(config(tmp_path / name, name), "one"))
    assert same(*runs)


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_crashed_run_resumes_to_the_same_bits_unless_the_data_was_edited(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_CACHE_DIR", str(tmp_path / "cache"))
    changes = settings(MAKERS[name](tmp_path / "data"), memory_gb=0.0)
    whole = run_whole(tmp_path / "whole", tmp_path / "cache", SHORT | changes)
    (tmp_path / "crashed").mkdir()
    crash(tmp_path / "crashed", 3, **changes)
    assert_same(whole, resume(tmp_path / "crashed", **changes))
    if name == "huggingface":
        shutil.rmtree(tmp_path / "data")
        save(tmp_path / "data")
    else:
        shard = tmp_path / "data/train-01.tar"
        shard.write_bytes(shard.read_bytes())
    capsys.readouterr()
    assert main(["train", str(tmp_path / "crashed/tiny.yaml"), "-q", "resume=auto"]) == 2
    assert "the data was edited since the run began (images, train, labels of " in capsys.readouterr().err


def test_the_check_describes_sound_data(birds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", birds, "--picture", str(Path(birds).parent / "a.png")]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[0].partition(", ")[2].startswith("train: 16 images, 24-32 x 30-32 pixels, channels 3, 0 to 255")
    assert lines[1] == "  kind: 15 of 16 labelled; finch 33.3 %, jay 33.3 %, owl 33.3 %"
    assert lines[3].startswith("  parts: 15 of 16 labelled; ")
    assert "5" in lines[4] and lines[4].startswith("  distance: 16 of 16 labelled; 0.5 to ")


def test_the_check_names_every_bad_image_at_once(birds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", birds, "tasks.parts.num_classes=3"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "the task has no class 3" in line]
    assert len(lines) == sum(NUM.values()) - 2
    name = yaml.safe_load(Path(birds).read_text())["data"]["name"]
    where = "/data, train[0]" if name == "huggingface" else "/data/train-00.tar, 0000"
    assert lines[0].startswith(f"error: {name}, train: ") and f"{where}: parts: " in lines[0]


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("huggingface", "data.val=validatoin", "data.val: "),
        ("huggingface", "data.image=imge", "has no column 'imge'; nearest: image"),
        ("huggingface", "tasks.kind.label=knd", "has no column 'knd'; nearest: kind"),
        ("huggingface", "data.split.by=hash", "data: expected split by: column"),
        ("webdataset", "tasks.kind.label=knd", "no json has the field 'knd'; nearest: kind"),
        ("webdataset", "data.labels.parts=prts.png", "data.labels.parts: no sample of"),
        ("webdataset", "data.val=none.tar", "none.tar: No such file or directory"),
        ("webdataset", "data.outside=true", "data.outside: unknown key"),
    ],
)
def test_a_mistake_ends_the_command_with_one_message(
    tmp_path: Path, name: str, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, name)
    capsys.readouterr()
    arguments = [override] if "split" not in override else [override, "data.split.val=0.5", "data.val=null"]
    assert main(["train", file, *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and "Traceback" not in said.err
    assert not (tmp_path / "runs").exists()


def test_no_optional_package_is_loaded_until_it_is_needed() -> None:
    code = "import mtl, mtl.data, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & {"datasets", "webdataset", "braceexpand", "pyarrow", "pandas"} == set()
