"""A balancing method of the user's own: the file in the documentation, and each way in which one can be wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from crashes import SHORT, assert_same, crashed, resume, run_whole
from mtl.config import SettingError, load_config
from mtl.config.optim import BalanceConfig
from mtl.optim.balance.build import build_balance, is_by_gradients
from mtl.optim.balance.gradient_method import TaskGradients
from mtl.optim.balance.gradient_weights import GradientWeighting
from mtl.training.run import train
from mtl.training.setup import assemble
from pages import code_block
from runs import small_config

PAGE = "docs/own_balancing.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the module of the page."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weigh.py").write_text(code_block(PAGE, "python"))
    yield tmp_path
    sys.modules.pop("weigh", None)


def test_the_page_has_a_file_of_few_lines() -> None:
    assert len([line for line in code_block(PAGE, "python").splitlines() if line.strip()]) <= 40


def test_losses_are_combined_as_the_class_says(folder: Path) -> None:
    assert folder
    config = BalanceConfig(**yaml.safe_load(code_block(PAGE, "yaml"))["balance"])
    losses = torch.tensor([1.0, 3.0], dtype=torch.float64)
    weights = torch.tensor([1.0, torch.e], dtype=torch.float64) / (1 + torch.e)
    assert build_balance(config, ["a", "b"])(losses).item() == pytest.approx(float(weights @ losses), rel=1e-6)
    assert not is_by_gradients(config.method)


def test_gradients_are_weighed_as_the_class_says(folder: Path) -> None:
    assert folder
    balance = build_balance(BalanceConfig(method="weigh:SameNorm"), ["a", "b"])
    assert is_by_gradients("weigh:SameNorm") and isinstance(balance.by_gradients, GradientWeighting)
    # Norms 1 and 3: both become 2.
    assert balance.by_gradients(torch.tensor([[1.0, 0.5], [0.5, 9.0]])).tolist() == pytest.approx([2, 2 / 3])


def test_losses_and_gradients_are_weighed_as_the_class_says(folder: Path) -> None:
    assert folder
    balance = build_balance(BalanceConfig(method="weigh:SameDescent"), ["a", "b"])
    assert is_by_gradients("weigh:SameDescent") and balance.by_gradients is not None
    rows, losses = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([3.0, 8.0])
    assert balance.by_gradients.combine(TaskGradients(rows, losses)).of(rows).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("method", ["weigh:Softmax", "weigh:SameNorm", "weigh:SameDescent"])
def test_a_run_with_it_is_clean_and_resumes_to_the_same_bits(folder: Path, cache_dir: Path, method: str) -> None:
    for name in ("whole", "broken"):
        (folder / name).mkdir()
        (folder / name / "weigh.py").write_text(code_block(PAGE, "python"))
    changes = {"balance": method, "optim": {}}
    whole = run_whole(folder / "whole", cache_dir, {**SHORT, **changes})
    crashed(folder / "broken", 5, **changes)
    assert_same(resume(folder / "broken", **changes), whole)


def test_a_module_next_to_the_configuration_is_found(tmp_path: Path) -> None:
    (tmp_path / "nearby.py").write_text(code_block(PAGE, "python"))
    try:
        phases = [{"name": "a", "freeze": ["trunk"], "steps": 1}]
        setup = assemble(load_config(small_config(tmp_path, balance="nearby:Softmax", phases=phases)), quiet=True)
        assert train(setup, quiet=True).report.ok
    finally:
        sys.modules.pop("nearby", None)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("weigh:Softmx", {}, "balance.method: weigh has no 'Softmx'; nearest: Softmax"),
        ("weight:Softmax", {}, "balance.method: 'weight' cannot be imported: No module named 'weight'"),
        ("weigh:BLOCK", {}, "balance.method: weigh has no 'BLOCK'"),
        ("pathlib:Path", {}, r"balance.method: pathlib:Path is no subclass of \S+Scalarizer .*TaskWeights$"),
        ("weigh:Softmax", {"temp": 1}, r"balance.options: weigh:Softmax: TypeError: .* argument 'temp'$"),
        ("weigh:Softmax", {"temperature": "hot"}, r"balance.options: weigh:Softmax: TypeError: .*\(.*weigh\.py:14\)$"),
        ("wrong:Vector", {}, r"balance.method: wrong:Vector gave \(2,\) for 2 losses; expected a scalar$"),
        ("wrong:Few", {}, r"balance.options: wrong:Few: ValueError: gave weights of shape \(1,\) for 2 tasks$"),
        ("wrong:Fewer", {}, r"balance.options: wrong:Fewer: ValueError: gave weights of shape \(1,\) for 2 tasks"),
        ("wrong:Seen", {}, "balance.method: wrong:Seen: .*cannot hold its attribute 'seen' .* a set.*; keep numbers,"),
        ("wrong:Draws", {}, r"balance.method: .* hold its attribute 'random' .*Generator.*get_state\(\) of a random"),
        ("wrong:Later", {}, "balance.method: .* cannot hold its attribute 'by' .at by/a: .* got a set"),
        ("wrong:First", {}, "balance.method: wrong:First: its attribute 'last' is first set.*; set it in __init__"),
        ("wrong:Sum", {}, "balance.method: wrong:Sum: .*cannot hold its attribute 'kinds' .* got a set"),
        ("softmaxx", {}, "balance.method: no method 'softmaxx'.*; or your own as package.module:Name"),
    ],
)
def test_what_cannot_be_used_is_named(folder: Path, method: str, options: dict[str, object], message: str) -> None:
    (folder / "wrong.py").write_text(
        "import mtl, torch\n"
        "from torchjd.aggregation import Weighting\nfrom torchjd.scalarization import Scalarizer\n"
        "class Vector(Scalarizer):\n    def forward(self, losses): return 2 * losses\n"
        "class Fewer(mtl.TaskWeights):\n    def weights(self, losses, rows): return losses[:1]\n"
        "class First(mtl.TaskWeights):\n    def weights(self, losses, rows):\n        self.last = losses\n"
        "        return losses\n"
        "class Seen(mtl.TaskWeights):\n    def __init__(self): self.seen = set()\n"
        "    def weights(self, losses, rows): return losses\n"
        "class Draws(Seen):\n    def __init__(self): self.random = torch.Generator()\n"
        "class Later(Seen):\n    def __init__(self): self.by = None\n"
        "    def weights(self, losses, rows):\n        self.by = {'a': {1}}\n        return losses\n"
        "class Sum(Scalarizer):\n    def __init__(self):\n        super().__init__()\n        self.kinds = {1}\n"
        "    def forward(self, losses): return losses.sum()\n"
        "class Few(Weighting):\n    def forward(self, gramian): return gramian[0, :1]\n"
    )
    try:
        with pytest.raises(SettingError, match=message):
            build_balance(BalanceConfig(method=method, options=options), ["a", "b"])
    finally:
        sys.modules.pop("wrong", None)
