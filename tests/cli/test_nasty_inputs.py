"""What nobody means to write: each ends in one clear line and exit code 2, with nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mtl.cli import main
from runs import TINY, small_config

LONGEST_LINE = 600


def said_of(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is said of arguments that are refused."""
    before = set(folder.rglob("*"))
    assert main(["train", "-q", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1, said
    assert len(said.err) < LONGEST_LINE
    assert set(folder.rglob("*")) == before
    return said.err.removeprefix("error: ").rstrip("\n")


# --- files that are no configuration

TEXTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "c.yaml:1: expected keys and values, got nothing"),
    "a byte order mark": (b"\xef\xbb\xbf", "c.yaml:1: expected keys and values, got nothing"),
    "a comment": (b"# x\n", "c.yaml:1: expected keys and values, got nothing"),
    "a list": (b"- a\n- b\n", "c.yaml:1: expected keys and values, got something else"),
    "a word": (b"hello\n", "c.yaml:1: expected keys and values, got something else"),
    "bytes": (bytes(range(256)), "c.yaml: cannot be read: 'utf-8' codec can't decode"),
    "a zero byte": (b"name: x\0y\n", "c.yaml:1: not valid YAML: the character '\\x00'"),
    "Latin-1": ("name: caf\u00e9\n".encode("latin-1"), "c.yaml: cannot be read: 'utf-8' codec can't decode"),
    "UTF-16": ("name: a\n".encode("utf-16"), "c.yaml: cannot be read: 'utf-8' codec can't decode"),
    "a tab": (b"name: a\n\tb: 1\n", "c.yaml:2: not valid YAML: found character '\\t'"),
    "lists without end": (b"a: " + b"[" * 3000, "c.yaml:1: not valid YAML: its lists and tables are nested too deeply"),
    "tables without end": (b"a: " + b"{a: " * 3000, "c.yaml:1: not valid YAML: its lists and tables are nested too"),
    "two documents": (b"name: a\n---\nname: b\n", "c.yaml:2: not valid YAML: but found another document"),
    "code": (b"x: !!python/object/apply:os.system ['echo hi']\n", "c.yaml:1: x: cannot be read as python/object"),
    "a set": (b"x: !!set {a, b}\n", "c.yaml:1: x: cannot be read as set"),
    "base64": (b"x: !!binary aGVsbG8=\n", "c.yaml:1: x: cannot be read as binary"),
    "a list that holds itself": (b"a: &a [*a]\n", "c.yaml:1: a.0: the value contains itself"),
    "a list as a key": (b"? [a, b]\n: 1\n", "c.yaml:1: expected a plain key"),
    "a key twice": (b"name: a\nname: b\n", "c.yaml:2: name: this key is given twice"),
    "a base that is a folder": (b"_base_: /\n", "c.yaml:1: _base_: /: cannot be read: Is a directory"),
    "a base inside": (b"data: {_base_: a.yaml}\n", "c.yaml:1: data._base_: unknown key; write it at the top of a file"),
    "anchors at an unknown key": (
        b"zzz: &z {a: 1}\n",
        "c.yaml:1: zzz: unknown key; the keys here are name, ",
    ),
}


@pytest.mark.parametrize("what", TEXTS)
def test_a_file_that_is_no_configuration(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = TEXTS[what]
    # What a small file lacks is of no interest here.
    rest = {key: value for key, value in TINY.items() if key not in ("name", "data")}
    is_read = what.startswith(("a base inside", "anchors"))
    more = yaml.safe_dump(rest | {"name": "x"}).encode() if is_read else b""
    (tmp_path / "c.yaml").write_bytes(content + more)
    said = said_of(["c.yaml"], tmp_path, capsys)
    assert said.startswith(message)
    assert ("put anchors below a key that starts with x-" in said) == what.startswith("anchors")


def linked(name: str, target: str) -> Callable[[], object]:
    return lambda: Path(name).symlink_to(target)


PATHS: dict[str, tuple[str, Callable[[], object] | None, str]] = {
    "a folder": (".", None, ".: cannot be read: Is a directory"),
    "no name": ("", None, ".: cannot be read: Is a directory"),
    "a file without end": ("/dev/zero", None, "/dev/zero: more than 10,000,000 characters, which no configuration has"),
    "an empty device": ("/dev/null", None, "/dev/null:1: expected keys and values, got nothing"),
    "a name of 300 letters": ("a" * 300, None, f"{'a' * 300}: cannot be read: File name too long"),
    "below a file": ("tiny.yaml/x", None, "tiny.yaml/x: cannot be read: Not a directory"),
    "a dead link": ("l", linked("l", "gone"), "l: no such file; l is a link to gone, which is not there"),
    "in a folder that is a dead link": ("l/x", linked("l", "gone"), "l/x: no such file; l is a link to gone, which is"),
    "a link to itself": ("l", linked("l", "l"), "l: cannot be read: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("what", PATHS)
def test_a_path_that_leads_to_no_configuration(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, prepare, message = PATHS[what]
    small_config(tmp_path)
    if prepare is not None:
        prepare()
    assert said_of([path], tmp_path, capsys).startswith(message)


# --- values that nothing can be made of

VALUES: dict[str, str] = {
    "seed=" + "9" * 6000: "seed: expected a whole number of at most 18 digits, got one of 6000",
    "data.batch_size=" + "9" * 20: "data.batch_size: expected a whole number of at most 18 digits, got one of 20",
    "optim.accumulate=" + "9" * 23: "optim.accumulate: expected a whole number of at most 18 digits",
    "tasks.object.num_classes=1000000000": "tasks.object.num_classes: expected a number less than or equal to 1048576",
    "data.image_size=999999999999": "data.image_size: one image of 999,999,999,999 x 999,999,999,999 pixels takes",
    "optim.lr=.nan": "optim.lr: expected a finite number, got nan",
    "optim.lr=1e400": "optim.lr: expected a finite number, got inf",
    "optim.lr=1e-400": "optim.lr: expected a number greater than 0, got 0.0",
    "data.batch_size=true": "data.batch_size: expected a valid integer, got True",
    "name=" + "a" * 300: "name: expected a name of at most 200 bytes, not 300, got 'aaa",
    "name=" + "\u00e9" * 150: "name: expected a name of at most 200 bytes, not 300",
    'name="a\\nb"': "name: expected text that matches",
    "name=..": "name: expected text that matches",
    "phases.0.name=" + "p" * 400: "expected a name of at most 200 bytes, not 400",
    'phases.0.name="a\\nb"': "expected text that matches",
    'runs_dir="a\\0b"': "runs_dir: cannot be read as str",
    'tracking.project="\\ud800"': "tracking.project: cannot be read as str",
    "runs_dir=" + "b" * 300: f"runs_dir: {'b' * 300}/tiny cannot be made: File name too long",
    "data.cache_dir=" + "c" * 300: f"data.cache_dir: {'c' * 300} cannot be read: File name too long",
    "device=gpu": "device: expected auto, cpu, cuda or cuda:N, got 'gpu'; nearest: cuda",
    "device=GPU:0": "device: expected auto, cpu, cuda or cuda:N, got 'GPU:0'; nearest: cuda",
    "device=cuda:" + "9" * 20: "device: expected auto, cpu, cuda or cuda:N, got 'cuda:999",
    "trunk.options={pretrained: true}": "trunk.options: 'pretrained' is no option here: set trunk.weights instead",
    "trunk.options={num_classes: 5}": "trunk.options: 'num_classes' is no option here: the heads have the classes",
    "trunk.options={drop_path_rate: abc}": "trunk.options: timm cannot build 'test_resnet'",
    "trunk.name=''": "trunk.name: timm knows no model ''",
    "trunk.name=[resnet18]": "trunk.name: expected a valid string",
    "optim.optimizer={name: sgd, options: {momentum: abc}}": "optim.optimizer.options: sgd takes the options momentum",
    "optim.lr={'re:(': 1.0}": "optim.lr.re:(: pattern 're:(' is not a regular expression",
    "phases=[]": "phases: expected at least one, got none",
    "phases={a: 1}": "phases: expected a valid list",
    "phases=[a]": "expected keys and values, got 'a'",
    "tasks=[depth]": "tasks: expected a valid dictionary",
}


@pytest.mark.parametrize("override", VALUES, ids=lambda override: override[:40].encode("unicode_escape").decode())
def test_a_value_that_nothing_can_be_made_of(override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small_config(tmp_path)
    said = said_of([str(file), override], tmp_path, capsys)
    assert said.startswith("command line: ") and VALUES[override] in said, said


def test_a_base_on_the_command_line_is_refused_with_what_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = said_of([str(small_config(tmp_path)), "_base_=other.yaml"], tmp_path, capsys)
    assert (
        said == "command line: '_base_=other.yaml': only a file can have bases; write at its top: _base_: [FILE, ...]"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runs_dir=folder", "name: folder/tiny cannot be made; folder/tiny is a link to /gone/x, which is not there"),
        ("runs_dir=dead", "runs_dir: dead/tiny cannot be made; dead is a link to /gone/y, which is not there"),
        (
            "data.cache_dir=dead",
            "the data cache dead cannot be written: File exists; dead is a link to /gone/y,",
        ),
    ],
)
def test_a_folder_that_is_a_dead_link_is_reported(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = small_config(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/tiny").symlink_to("/gone/x")
    (tmp_path / "dead").symlink_to("/gone/y")
    assert message in said_of([str(file), override], tmp_path, capsys)
