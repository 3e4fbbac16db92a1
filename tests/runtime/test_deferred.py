"""Packages whose `__init__` is deferred are, once anything is asked of them, what they would have been."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mtl.runtime.collection import without_collection
from mtl.runtime.deferred import deferred, nothing

ROOT = Path(__file__).parent.parent.parent
NUMBERS = count()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that counts in `part.ran` how often its `__init__` has run; of another name in each test."""
    name = f"putoff{next(NUMBERS)}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text(f"from {name}.part import ran\nran.append(1)\nvalue = 7\n__version__ = '1'\n")
    (folder / "part.py").write_text("ran = []\nname = 'part'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for each in [each for each in sys.modules if each.split(".")[0] == name]:
        del sys.modules[each]


def ran(package: str) -> int:
    return len(sys.modules[f"{package}.part"].ran)


def test_a_submodule_is_imported_without_the_package_around_it(package: str) -> None:
    with deferred({package: nothing}):
        part = import_module(f"{package}.part")
        assert (part.name, part.ran) == ("part", [])


def test_in_the_block_it_runs_when_something_that_it_makes_is_asked_for(package: str) -> None:
    with deferred({package: nothing}):
        part = import_module(f"{package}.part")
        own: Any = import_module(package)
        assert part.ran == []
        assert own.value == 7 and part.ran == [1]
    assert type(own) is ModuleType and own.part is part and import_module(package) is own


ASKING = ["import {0}", "from {0} import value", "import {0}.part, {0}.other", "import {0}.other as o"]


@pytest.mark.parametrize("ask", ASKING)
def test_after_the_block_it_runs_with_the_next_import_of_it_and_nothing_runs_twice(
    package: str, ask: str, tmp_path: Path
) -> None:
    folder = tmp_path / package
    # Imported by the package itself as well.
    (folder / "other.py").write_text(f"from {package}.part import ran\nran.append(2)\n")
    with (folder / "__init__.py").open("a") as file:
        file.write("from . import other\n")
    with deferred({package: nothing}):
        part = import_module(f"{package}.part")
        own: Any = import_module(package)
    assert part.ran == [] and package not in sys.modules
    for _ in range(2):
        exec(ask.format(package), {})
        assert part.ran == [1, 2]
    assert type(own) is ModuleType and import_module(package) is own and own.part is part
    assert own.other is sys.modules[f"{package}.other"]


def test_after_the_block_a_reference_that_was_kept_runs_it(package: str) -> None:
    with deferred({package: nothing}):
        own: Any = import_module(package)
    assert own.value == 7 and ran(package) == 1 and sys.modules[package] is own


def test_another_block_defers_it_again(package: str) -> None:
    for _ in range(2):
        with deferred({package: nothing}):
            own: Any = import_module(package)
            part = import_module(f"{package}.part")
    assert part.ran == [] and own.value == 7 and part.ran == [1]


def test_what_is_known_early_is_given_in_the_block_only(package: str) -> None:
    with deferred({package: lambda name: 3 if name == "value" else nothing(name)}):
        own: Any = import_module(package)
        assert own.value == 3 and f"{package}.part" not in sys.modules
    assert own.value == 7 and ran(package) == 1


def test_of_a_whole_package_no_submodule_is_imported_before_it(package: str) -> None:
    with deferred({package: nothing}, whole=[package]):
        own: Any = import_module(package)
        assert f"{package}.part" not in sys.modules
        part = import_module(f"{package}.part")
        assert part.ran == [1] and own.part is part


def test_programs_that_look_through_all_modules_run_nothing(package: str) -> None:
    with deferred({package: nothing}):
        part, own = import_module(f"{package}.part"), import_module(package)
    assert not hasattr(own, "__warningregistry__") and part.ran == []
    assert "value" in dir(own) and part.ran == [1]


def test_one_that_fails_to_run_fails_for_each_who_asks(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "__init__.py").write_text("raise ImportError('broken')\n")
    with deferred({package: nothing}):
        own: Any = import_module(package)
    for _ in range(2):
        with pytest.raises(ImportError, match="broken"):
            own.value  # noqa: B018


def test_what_is_loaded_already_stays_as_it_is(package: str) -> None:
    own = import_module(package)
    with deferred({package: nothing}):
        assert import_module(package) is own and type(own) is ModuleType
    assert import_module(package) is own and ran(package) == 1


def test_one_that_is_not_there_is_missing_as_ever() -> None:
    with deferred({"putoff_nowhere": nothing}), pytest.raises(ModuleNotFoundError, match="putoff_nowhere"):
        import_module("putoff_nowhere")


def test_garbage_is_collected_again_after_the_block_if_it_was_before() -> None:
    with without_collection():
        assert not gc.isenabled()
        with without_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


# What a user may want of the real packages after mtl has deferred them: the same as in a process without mtl.
ASKED = """
import torch, torchvision, timm.data, torchjd.scalarization, torch._dynamo
from torchvision.ops import FrozenBatchNorm2d, nms
from torchvision.models import resnet18
from timm.layers.norm_act import FrozenBatchNorm2d as same
from torchjd.aggregation import UPGrad
assert same is FrozenBatchNorm2d and FrozenBatchNorm2d is torchvision.ops.misc.FrozenBatchNorm2d
assert torch.ops.torchvision.nms is not None
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
torch.optim.SGD([torch.zeros(1)]).step()
own = torch.optim.SGD.add_param_group.__wrapped__
print(getattr(own, "__dynamo_disable") is own)
print(*sorted(n for m in (torchvision, timm.data, torchjd, torch._dynamo) for n in dir(m) if n[0] != "_"))
"""
DEFERRED = """
import sys, torch
import mtl.model, mtl.optim.balance.balance
from mtl.runtime.uncompiled import without_compiler
with without_compiler():
    torch.optim.SGD([torch.zeros(1)]).step()
wrong = {"torch._dynamo.utils", "torchvision.io", "timm.data.loader", "torchjd.aggregation"} & {*sys.modules}
assert not wrong, wrong
"""


@pytest.mark.slow
def test_the_deferred_packages_are_whole_for_who_asks_later() -> None:
    found = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        for code in (ASKED, DEFERRED + ASKED)
    ]
    assert [each.returncode for each in found] == [0, 0], found[1].stderr
    assert found[0].stdout == found[1].stdout and found[0].stdout.startswith("False\n")


def test_a_submodule_that_takes_no_new_attributes_can_be_imported_first() -> None:
    """Torch's settings of its compiler, which sharded parameters ask for."""
    code = """
import sys, torch
from mtl.runtime.uncompiled import without_compiler
with without_compiler():
    import torch._dynamo.config as settings
assert settings.__spec__.name == "torch._dynamo.config"
import torch._dynamo
assert torch._dynamo.config is settings is sys.modules["torch._dynamo.config"]
with torch._dynamo.config.patch(recompile_limit=3):
    assert settings.recompile_limit == 3
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
