"""Classes named as `package.module:Name`: found, also in the working directory, or refused with what is near."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

from mtl.runtime.plugin import PluginError, find_class

WriteModule = Callable[[str, str], None]


@pytest.fixture
def write_module(tmp_path: Path) -> Iterator[WriteModule]:
    """Writes a module into the working directory; no test finds that of another."""
    before = set(sys.modules)

    def write(name: str, text: str) -> None:
        file = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


LAYER = "from torch import nn\nclass Layer(nn.Linear):\n    pass\nclass Other:\n    pass\nlayer = Layer(1, 1)\n"


def test_an_installed_class_is_found() -> None:
    assert find_class("torch.nn:Linear", nn.Module) is nn.Linear


def test_the_base_itself_is_of_its_kind() -> None:
    assert find_class("torch.nn:Module", nn.Module) is nn.Module


@pytest.mark.parametrize("module", ["own_layers", "own_package.inner.layers"])
def test_a_class_in_the_working_directory_is_found(write_module: WriteModule, module: str) -> None:
    write_module(module, LAYER)
    found = find_class(f"{module}:Layer", nn.Module)
    assert (found.__module__, found.__name__) == (module, "Layer")
    assert issubclass(found, nn.Linear)


def test_a_module_that_imports_its_neighbour_is_found(write_module: WriteModule) -> None:
    write_module("own_layers", LAYER)
    write_module("own_model", "from own_layers import Layer\nclass Model(Layer):\n    pass\n")
    assert find_class("own_model:Model", nn.Module).__mro__[1].__module__ == "own_layers"


def test_the_search_path_is_as_it_was_after_success_and_after_every_failure(write_module: WriteModule) -> None:
    write_module("own_layers", LAYER)
    write_module("own_broken", "1 / 0\n")
    before = list(sys.path)
    find_class("own_layers:Layer", nn.Module)
    for text in ("own_layers:Nothing", "own_nothing:Layer"):
        with pytest.raises(PluginError):
            find_class(text, nn.Module)
    with pytest.raises(PluginError):
        find_class("own_broken:Layer", nn.Module)
    assert sys.path == before


def test_a_working_directory_that_is_on_the_search_path_stays_on_it(
    write_module: WriteModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_module("own_layers", LAYER)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.path)
    find_class("own_layers:Layer", nn.Module)
    assert sys.path == before
    assert str(tmp_path) in sys.path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "own_layer:Layer",
            r"^'own_layer' cannot be imported: No module named 'own_layer'; looked for in the working directory, "
            r"next to the configuration and where Python does$",
        ),
        ("own_layers.inner:Layer", r"^'own_layers\.inner' cannot be imported: No module named 'own_layers\.inner'"),
        ("own_layers:Layr", r"^own_layers has no 'Layr'; nearest: Layer$"),
        ("own_layers:Zzz", r"^own_layers has no 'Zzz'$"),
        ("own_layers:", r"expected package.module:Name"),
        ("own_layers", r"expected package.module:Name"),
        ("own_layers:Other", r"^own_layers:Other is no subclass of torch\.nn\.modules\.module\.Module$"),
        ("own_layers:layer", r"^own_layers:layer is no subclass of torch\.nn\.modules\.module\.Module$"),
        ("own_layers:nn", r"^own_layers:nn is no subclass of torch\.nn\.modules\.module\.Module$"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(write_module: WriteModule, text: str, message: str) -> None:
    write_module("own_layers", LAYER)
    with pytest.raises(PluginError, match=message):
        find_class(text, nn.Module)


@pytest.mark.parametrize("text", [":Layer", ".own_layers:Layer", ":", ""])
def test_text_that_names_no_module_is_refused(write_module: WriteModule, text: str) -> None:
    write_module("own_layers", LAYER)
    with pytest.raises(PluginError):
        find_class(text, nn.Module)


def test_a_module_that_misses_another_is_refused_with_that_ones_name(write_module: WriteModule) -> None:
    write_module("own_layers", "import own_missing\n")
    with pytest.raises(PluginError, match=r"^'own_layers' cannot be imported: No module named 'own_missing'"):
        find_class("own_layers:Layer", nn.Module)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import json\n\nraise KeyError('inside')\n", "KeyError: 'inside' ({file}:3)"),
        ("1 / 0\n", "ZeroDivisionError: division by zero ({file}:1)"),
        ("x = 1\nclass Layer(:\n", "SyntaxError: invalid syntax ({file}:2)"),
        ("x = 1\n  y = 2\n", "SyntaxError: unexpected indent ({file}:2)"),
        ("from torch import nothing_like_it\n", "ImportError: cannot import name 'nothing_like_it' from 'torch'"),
        ("from . import neighbour\n", "ImportError: attempted relative import with no known parent package ({file}:1)"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3 ({file}:2)"),
        ("assert False\n", "AssertionError ({file}:1)"),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines ({file}:1)"),
    ],
)
def test_a_module_that_fails_is_one_line_with_the_place(
    write_module: WriteModule, tmp_path: Path, text: str, said: str
) -> None:
    write_module("own_layers", text)
    with pytest.raises(PluginError) as caught:
        find_class("own_layers:Layer", nn.Module)
    expected = f"'own_layers' cannot be imported: {said.format(file=tmp_path / 'own_layers.py')}"
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_what_interrupts_an_import_is_no_mistake_of_the_module(write_module: WriteModule) -> None:
    write_module("own_layers", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        find_class("own_layers:Layer", nn.Module)


def test_an_abstract_class_is_refused_with_what_it_lacks(write_module: WriteModule) -> None:
    write_module(
        "own_layers",
        "from abc import ABC, abstractmethod\nfrom torch import nn\nclass Layer(nn.Module, ABC):\n"
        "    @abstractmethod\n    def width(self): ...\n    @abstractmethod\n    def depth(self): ...\n",
    )
    with pytest.raises(PluginError, match=r"^own_layers:Layer is abstract: it lacks depth, width$"):
        find_class("own_layers:Layer", nn.Module)


def test_the_place_is_the_module_s_own_though_a_library_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "calls_a_library.py").write_text("import json\n\njson.loads('{')\n")
    with pytest.raises(PluginError, match=r"JSONDecodeError: .*calls_a_library\.py:3\)$"):
        find_class("calls_a_library:Layer", object)
