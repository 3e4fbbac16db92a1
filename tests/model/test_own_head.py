"""A head of the user's own: the file in the documentation, and each way in which one can be wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from mtl.cli import main
from mtl.config import HeadConfig, SettingError, TrunkConfig, load_config
from mtl.model import MultiTaskModel
from mtl.tasks import Classification, Depth
from pages import code_block
from runs import TINY, read_model, tiny_config

PAGE = "docs/own_head.md"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """The configuration next to the module, neither of them in the working directory."""
    (tmp_path / "gated.py").write_text(code_block(PAGE, "python"))
    phases = [{"name": "kept", "freeze": ["trunk"], "epochs": 2, "cache": "ram"}, {"name": "all", "steps": 2}]
    data = TINY["data"] | {"num_train": 16, "num_val": 8}
    yield tiny_config(tmp_path, **yaml.safe_load(code_block(PAGE, "yaml")), data=data, phases=phases)
    sys.modules.pop("gated", None)


def test_the_page_has_a_file_of_few_lines() -> None:
    assert len(code_block(PAGE, "python").splitlines()) <= 40


def test_the_head_of_the_page_trains_on_kept_features_and_passes_the_audit(own: Path, tmp_path: Path) -> None:
    assert main(["train", str(own), "-q"]) == 0
    run_dir = tmp_path / "runs/tiny"
    assert read_model(run_dir / "checkpoints/last")["heads.depth.maps.weight"].shape[0] == 16
    assert main(["audit", str(run_dir)]) == 0


@pytest.mark.slow
def test_the_head_of_the_page_is_resumed_reported_and_trains_to_the_same_bits_without_kept_features(
    own: Path, tmp_path: Path
) -> None:
    assert main(["train", str(own), "-q"]) == 0
    assert main(["train", str(own), "-q", "resume=auto"]) == 0
    assert main(["report", str(tmp_path / "runs/tiny")]) == 0
    assert main(["train", str(own), "-q", "name=computed", "cache=off", "phases.kept.cache=off"]) == 0
    kept, computed = (read_model(tmp_path / f"runs/{name}/checkpoints/last") for name in ("tiny", "computed"))
    assert kept.keys() == computed.keys() and all(torch.equal(kept[name], computed[name]) for name in kept)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.depth.head.options.widht=2", "tasks.depth.head.options.widht: unknown key; nearest: width"),
        ("tasks.depth.head.options.width=far", "tasks.depth.head.options.width: expected a valid integer, got 'far'"),
        ("tasks.depth.head.name=gated:Gated", "tasks.depth.head.name: gated has no 'Gated'; nearest: GatedHead"),
        ("tasks.depth.head.name=gated:Strict", r"tasks.depth.head.name: gated:Strict is no subclass of mtl\.\S+Head"),
        ("tasks.object.head=fnp", "tasks.object.head.name: no head 'fnp'; there are: .*; nearest: fpn"),
    ],
)
def test_a_mistake_is_named_at_its_key(
    own: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(own), override]) == 2
    assert re.search(f"^error: command line: {message}", capsys.readouterr().err, re.MULTILINE)


def test_a_mistake_in_a_file_has_its_line(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(own.read_text())
    content["tasks"]["object"]["head"] = {"name": "mlp", "options": {"hiden": 3}}
    own.write_text(yaml.safe_dump(content, sort_keys=False))
    line = own.read_text().splitlines().index("        hiden: 3") + 1
    assert main(["plan", str(own)]) == 2
    expected = f"{own}:{line}: tasks.object.head.options.hiden: unknown key; nearest: hidden"
    assert expected in capsys.readouterr().err


def test_a_name_alone_is_short_for_a_head_without_options(tmp_path: Path) -> None:
    tasks = TINY["tasks"] | {"depth": {"type": "depth", "head": "linear_bn"}}
    config = load_config(tiny_config(tmp_path, tasks=tasks))
    assert config.tasks["depth"].head == HeadConfig(name="linear_bn") and config.tasks["object"].head is None


METHODS = """
    def __init__(self, shape, num_outputs):
        super().__init__()
        self.out = nn.Linear(shape.{kind}, num_outputs)
    def forward(self, features, size):
        return self.out(features.{kind}{rest})
"""
TOKENS = METHODS.format(kind="tokens", rest="[:, 0]")
POOLED = METHODS.format(kind="pooled", rest="")
OVERRIDE = "    def set_output_bias(self, constant): ...\n"
GOOD = "output, reads = 'vector', frozenset({'tokens'})"
AS_POOLED = "output, reads = 'vector', frozenset({'pooled'})"


def own_model(folder: Path, monkeypatch: pytest.MonkeyPatch, trunk: str, body: str) -> MultiTaskModel:
    """A model whose task `t` has the head `bad:Bad` with this body."""
    (folder / "bad.py").write_text(f"from torch import nn\nfrom mtl.model import Head\nclass Bad(Head):\n    {body}")
    monkeypatch.chdir(folder)
    try:
        with torch.device("meta"):
            tasks = {"t": Classification(3), "u": Depth()}
            return MultiTaskModel(TrunkConfig(name=trunk), tasks, 32, heads={"t": HeadConfig(name="bad:Bad")})
    finally:
        sys.modules.pop("bad", None)


@pytest.mark.parametrize("body", [GOOD + TOKENS, AS_POOLED + POOLED.replace("self.out", "self.last") + OVERRIDE])
def test_a_head_that_keeps_to_the_contract_is_taken(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = own_model(tmp_path, monkeypatch, "test_vit", body)
    assert model.reads(["t"]) == {"tokens" if "tokens" in body else "pooled"}


@pytest.mark.parametrize(
    ("body", "key", "message"),
    [
        ("reads = frozenset({'tokens'})" + TOKENS, ".name", "bad:Bad has no `output`: expected `dense` or `vector`"),
        ("output, reads = 'vector', {'tokens'}" + TOKENS, ".name", "expected `reads`, a frozenset of pooled, pyramid"),
        ("output = 'vector'" + TOKENS, ".name", r"expected `reads`, a frozenset of .*tokens; got None"),
        (
            "output, reads = 'dense', frozenset({'tokens'})" + TOKENS,
            ".name",
            "bad:Bad gives an output per pixel, the task has an output per image; heads that fit: linear, mlp, att",
        ),
        (AS_POOLED + TOKENS, "", r"bad:Bad: TypeError: 'NoneType' object is not subscriptable \(.*bad\.py:9\)"),
        (
            AS_POOLED + POOLED.replace("features.pooled", "features.pooled[0]"),
            "",
            r"bad:Bad: expected an output of shape \(1, 3\) for one image, got \(3,\)",
        ),
        (
            AS_POOLED + POOLED.replace("num_outputs)\n    def", "1)\n    def"),
            ".name",
            r"bad:Bad: expected a last layer `out` with a bias of shape \(3,\), .* got one of shape \(1,\); or overri",
        ),
        (
            AS_POOLED + POOLED.replace("self.out", "self.last"),
            ".name",
            r"bad:Bad: expected a last layer `out` with a bias .* got none; or override set_output_bias",
        ),
        (AS_POOLED, ".name", "bad:Bad is abstract: it lacks forward"),
    ],
)
def test_a_class_that_cannot_be_used_is_named(
    body: str, key: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        own_model(tmp_path, monkeypatch, "test_vit", body)
    assert caught.value.key == f"tasks.t.head{key}"


def test_tokens_of_a_trunk_that_gives_none_are_refused_with_the_heads_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "bad:Bad reads tokens, and this trunk gives none, but maps; heads that fit: linear, mlp, attention_pool"
    with pytest.raises(SettingError, match=message) as caught:
        own_model(tmp_path, monkeypatch, "test_resnet", GOOD + TOKENS)
    assert caught.value.key == "tasks.t.head.name"
