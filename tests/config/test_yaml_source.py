from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.config import ConfigError
from mtl.config.yaml_source import ConfigSource, KeyPath, read_source

# Every test runs in a directory of its own (conftest), so that places read `run.yaml:3`.
RUN = Path("run.yaml")


def write(file: str | Path, text: str) -> Path:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text), encoding="utf-8")
    return path


def read(text: str, *overrides: str) -> ConfigSource:
    return read_source(write(RUN, text), overrides)


def mistakes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    return caught.value.mistakes


# Scalars


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("-2.5e+1", -25.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.inf", float("-inf")),
        ("7", 7),
        ("-7", -7),
        ("+7", 7),
        ("0", 0),
        ("010", 10),
        ("089", 89),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("'1e-3'", "1e-3"),
        ('"true"', "true"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("e3", "e3"),
        ("-", [None]),
    ],
)
def test_a_scalar_is_read_by_the_rules_of_yaml_1_2(text: str, value: object) -> None:
    read_value = read(f"key:\n  {text}\n").data["key"]
    assert (read_value, type(read_value)) == (value, type(value))


def test_a_key_is_always_text() -> None:
    assert read("1: a\ntrue: b\nnull: c\n1e-3: d\n").data == {"1": "a", "true": "b", "null": "c", "1e-3": "d"}


# Places


def test_every_key_and_item_has_the_line_it_was_written_on() -> None:
    source = read(
        """\
        # a comment
        name: small

        data:
          size: 3
          names: [a,
                  b]
        phases:
          - name: one
            steps: 2
          - {name: two}
        """
    )
    assert source.places == {
        (): "run.yaml:1",
        ("name",): "run.yaml:2",
        ("data",): "run.yaml:4",
        ("data", "size"): "run.yaml:5",
        ("data", "names"): "run.yaml:6",
        ("data", "names", 0): "run.yaml:6",
        ("data", "names", 1): "run.yaml:7",
        ("phases",): "run.yaml:8",
        ("phases", 0): "run.yaml:9",
        ("phases", 0, "name"): "run.yaml:9",
        ("phases", 0, "steps"): "run.yaml:10",
        ("phases", 1): "run.yaml:11",
        ("phases", 1, "name"): "run.yaml:11",
    }


def test_a_key_that_was_not_written_has_the_place_of_the_nearest_key_around_it() -> None:
    source = read("name: a\ndata:\n  size: 3\n")
    assert source.where(("data", "size")) == "run.yaml:3"
    assert source.where(("data", "absent", "deeper")) == "run.yaml:2"
    assert source.where(("absent",)) == "run.yaml:1"
    assert ConfigSource().where(("absent",)) == "defaults"


def test_an_alias_is_a_copy_of_its_own() -> None:
    source = read("a: &shared {x: 1}\nb: *shared\n", "b.x=2")
    assert source.data == {"a": {"x": 1}, "b": {"x": 2}}
    assert (source.where(("a", "x")), source.where(("b", "x"))) == ("run.yaml:1", "command line")


# Files that cannot be read


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("a: 1\nb: 2\na: 3\n", "run.yaml:3: a: this key is given twice"),
        ("a:\n  b:\n    c: 1\n    c: 1\n", "run.yaml:4: a.b.c: this key is given twice"),
        ("a:\n  - {b: 1}\n  - {b: 1, b: 2}\n", "run.yaml:3: a.1.b: this key is given twice"),
        ("1: a\n'1': b\n", "run.yaml:2: 1: this key is given twice"),
        ("", "run.yaml:1: expected keys and values, got nothing"),
        ("# only a comment\n", "run.yaml:1: expected keys and values, got nothing"),
        ("- a\n- b\n", "run.yaml:1: expected keys and values, got something else"),
        ("just words\n", "run.yaml:1: expected keys and values, got something else"),
        ("a: 1\n? [b, c]\n: 2\n", "run.yaml:2: expected a plain key"),
        (
            "a: 1\nb: !tag 2\n",
            'run.yaml:2: b: cannot be read as !tag; text with ! must be in quotes: "!tag"',
        ),
    ],
)
def test_yaml_that_is_not_keys_and_values_is_named_with_its_line(text: str, mistake: str) -> None:
    assert mistakes(text) == [mistake]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("a: [1, 2\nb: 3\n", "run.yaml:2: not valid YAML: expected ',' or ']'"),
        ("a: 1\n b: 2\n", "run.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n\tb: 2\n", "run.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: 1\nb: *nowhere\n", "run.yaml:2: not valid YAML: found undefined alias 'nowhere'"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: not valid YAML: but found another document"),
        ("a: \x07\n", "run.yaml"),
    ],
)
def test_a_syntax_error_is_one_line_that_names_its_line(text: str, start: str) -> None:
    (mistake,) = mistakes(text)
    assert mistake.startswith(start)
    assert "not valid YAML" in mistake
    assert "\n" not in mistake


@pytest.mark.parametrize("value", ["!!int abc", "!!float abc", "!!timestamp 2020-13-45", "&loop {b: *loop}"])
def test_a_value_that_cannot_be_made_is_named_with_its_line(value: str) -> None:
    (mistake,) = mistakes(f"name: small\na: {value}\n")
    assert mistake.startswith("run.yaml:2: ")


def test_a_missing_file_lists_the_yaml_files_next_to_it() -> None:
    for name in ("folder/two.yaml", "folder/one.yaml", "folder/notes.txt", "configs/elsewhere.yaml"):
        write(name, "a: 1\n")
    with pytest.raises(ConfigError) as caught:
        read_source(Path("folder/three.yaml"))
    assert str(caught.value) == "folder/three.yaml: no such file; there are: folder/one.yaml, folder/two.yaml"


def test_a_file_in_a_missing_folder_lists_the_configs() -> None:
    write("configs/scenes.yaml", "a: 1\n")
    with pytest.raises(ConfigError) as caught:
        read_source(Path("confgs/scenes.yaml"))
    assert str(caught.value) == "confgs/scenes.yaml: no such file; there are: configs/scenes.yaml"


def test_a_missing_file_with_nothing_next_to_it_lists_nothing() -> None:
    with pytest.raises(ConfigError) as caught:
        read_source(RUN)
    assert str(caught.value) == "run.yaml: no such file"


def test_a_folder_and_a_file_that_is_no_text_cannot_be_read() -> None:
    Path("folder.yaml").mkdir()
    Path("bytes.yaml").write_bytes(b"name: \xff\xfe\n")
    for file in (Path("folder.yaml"), Path("bytes.yaml")):
        with pytest.raises(ConfigError, match=rf"^{file}: cannot be read: "):
            read_source(file)


# Bases


def test_a_base_is_laid_under_the_file_key_by_key() -> None:
    write("base.yaml", "name: base\ndata:\n  size: 1\n  kept: 2\n")
    source = read("_base_: base.yaml\ndata:\n  size: 3\nown: 4\n")
    assert source.data == {"name": "base", "data": {"size": 3, "kept": 2}, "own": 4}
    assert source.where(("name",)) == "base.yaml:1"
    assert source.where(("data", "size")) == "run.yaml:3"
    assert source.where(("data", "kept")) == "base.yaml:4"
    assert source.where(("own",)) == "run.yaml:4"


def test_of_several_bases_the_later_wins() -> None:
    write("one.yaml", "a: 1\nb: 1\nc: 1\n")
    write("two.yaml", "b: 2\nc: 2\n")
    source = read("_base_: [one.yaml, two.yaml]\nc: 3\n")
    assert source.data == {"a": 1, "b": 2, "c": 3}
    assert [source.where((key,)) for key in "abc"] == ["one.yaml:1", "two.yaml:1", "run.yaml:2"]


def test_no_bases_at_all_is_an_empty_list() -> None:
    assert read("_base_: []\na: 1\n").data == {"a": 1}


def test_a_chain_of_bases_is_followed_from_each_files_own_folder() -> None:
    write("far/deep/grand.yaml", "a: 1\nb: 1\nc: 1\n")
    write("far/base.yaml", "_base_: deep/grand.yaml\nb: 2\nc: 2\n")
    source = read("_base_: far/base.yaml\nc: 3\n")
    assert source.data == {"a": 1, "b": 2, "c": 3}
    assert [source.where((key,)) for key in "abc"] == ["far/deep/grand.yaml:1", "far/base.yaml:2", "run.yaml:2"]


def test_two_bases_may_share_a_base() -> None:
    write("root.yaml", "a: 1\nb: 1\n")
    write("one.yaml", "_base_: root.yaml\na: 2\n")
    write("two.yaml", "_base_: root.yaml\nb: 2\n")
    assert read("_base_: [one.yaml, two.yaml]\n").data == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"run.yaml": "run.yaml"}, "run.yaml"),
        ({"run.yaml": "a.yaml", "a.yaml": "run.yaml"}, "run.yaml"),
        ({"run.yaml": "a.yaml", "a.yaml": "b.yaml", "b.yaml": "a.yaml"}, "a.yaml"),
        ({"run.yaml": "[]", "a.yaml": "./folder/../a.yaml", "folder/x.yaml": "[]"}, "folder/../a.yaml"),
    ],
)
def test_a_file_that_is_based_on_itself_is_an_error(files: dict[str, str], named: str) -> None:
    for name, base in files.items():
        write(name, f"_base_: {base}\n")
    start = Path("a.yaml" if named.startswith("folder") else "run.yaml")
    with pytest.raises(ConfigError) as caught:
        read_source(start)
    assert str(caught.value).endswith(f".yaml:1: _base_: {named} is based on itself")


def test_a_missing_base_is_named_with_the_files_next_to_it() -> None:
    write("far/base.yaml", "a: 1\n")
    assert mistakes("_base_: far/bse.yaml\n") == [
        "run.yaml:1: _base_: far/bse.yaml: no such file; there are: far/base.yaml"
    ]


@pytest.mark.parametrize("value", ["5", "[5]", "null", "true", "{base.yaml: 1}", "[[base.yaml]]"])
def test_a_base_that_is_no_file_name_is_an_error(value: str) -> None:
    write("base.yaml", "a: 1\n")
    (mistake,) = mistakes(f"a: 1\n_base_: {value}\n")
    assert mistake.startswith("run.yaml:2: _base_: expected a file or a list of files, got ")


def test_a_list_is_replaced_whole_and_its_old_places_are_dropped() -> None:
    write("base.yaml", "phases:\n  - {name: a, steps: 1}\n  - {name: b, steps: 2}\n")
    source = read("_base_: base.yaml\nphases:\n  - {name: c}\n")
    assert source.data == {"phases": [{"name": "c"}]}
    assert source.places == {
        (): "run.yaml:1",
        ("phases",): "run.yaml:2",
        ("phases", 0): "run.yaml:3",
        ("phases", 0, "name"): "run.yaml:3",
    }


@pytest.mark.parametrize(
    ("below", "above", "value", "inner_place"),
    [("{x: 1}", "2", 2, "run.yaml:2"), ("1", "{x: 2}", {"x": 2}, "run.yaml:2"), ("{x: 1}", "{}", {"x": 1}, "base:1")],
)
def test_only_two_mappings_are_merged(below: str, above: str, value: object, inner_place: str) -> None:
    write("base", f"a: {below}\n")
    source = read(f"_base_: base\na: {above}\n")
    assert source.data == {"a": value}
    assert source.where(("a", "x")) == inner_place


_KEYS = st.sampled_from(["a", "b", "c"])
_LEAVES = st.just("leaf") | st.lists(st.just("leaf"), max_size=2)
_TREES = st.dictionaries(
    _KEYS, st.recursive(_LEAVES, lambda inner: st.dictionaries(_KEYS, inner, max_size=3), max_leaves=5)
)


def _numbered(tree: Any, numbers: Iterator[int]) -> Any:
    """The tree with a number of its own for every leaf, so that a line can be told by its number."""
    if isinstance(tree, dict):
        return {key: _numbered(value, numbers) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_numbered(item, numbers) for item in tree]
    return next(numbers)


def _merged(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    keys = [*below, *(key for key in above if key not in below)]
    return {
        key: _merged(below[key], above[key]) if key in below and key in above else {**below, **above}[key]
        for key in keys
    }


def _leaves(tree: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(tree, int):
        yield path, tree
    else:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, (*path, key))


@settings(max_examples=60, derandomize=True)
@given(trees=st.lists(_TREES, min_size=1, max_size=3), chained=st.booleans())
def test_bases_merge_like_nested_dicts_and_every_leaf_knows_its_line(
    trees: list[dict[str, Any]], chained: bool
) -> None:
    numbers = iter(range(100, 10_000))
    expected: dict[str, Any] = {}
    for index, tree in enumerate(trees):
        tree = _numbered(tree, numbers)
        expected = _merged(expected, tree)
        base = f"_base_: {index - 1}.yaml\n" if chained and index else ""
        write(f"{index}.yaml", base + (yaml.safe_dump(tree) if tree else "" if base else "{}"))
    if chained:
        source = read_source(Path(f"{len(trees) - 1}.yaml"))
    else:
        source = read(f"_base_: [{', '.join(f'{index}.yaml' for index in range(len(trees)))}]\n")

    assert source.data == expected
    for path, number in _leaves(expected):
        file, _, line = source.places[path].partition(":")
        assert str(number) in Path(file).read_text().splitlines()[int(line) - 1]
    # No place is left of what was replaced.
    for path in source.places:
        target: Any = source.data
        for key in path:
            target = target[key]


# Overrides


def test_an_override_replaces_or_adds_one_key() -> None:
    source = read("a: {b: 1, c: 2}\n", "a.b=3e-4", "a.d=on", "x.y.z=[1, 2]")
    assert source.data == {"a": {"b": 3e-4, "c": 2, "d": "on"}, "x": {"y": {"z": [1, 2]}}}
    assert source.where(("a", "b")) == source.where(("a", "d")) == source.where(("x", "y", "z", 1)) == "command line"
    assert source.where(("a", "c")) == "run.yaml:1"


def test_an_override_reaches_a_list_item_by_index_and_by_name() -> None:
    text = "phases:\n  - {name: warm, steps: 1}\n  - {name: tune, steps: 1}\n"
    source = read(text, "phases.0.steps=5", "phases.tune.steps=6", "phases.1.lr=7")
    assert source.data["phases"] == [{"name": "warm", "steps": 5}, {"name": "tune", "steps": 6, "lr": 7}]
    assert source.where(("phases", 1, "steps")) == source.where(("phases", 1, "lr")) == "command line"
    assert source.where(("phases", 1, "name")) == "run.yaml:3"


def test_an_items_name_goes_before_its_index() -> None:
    assert read("a: [{name: '1'}, {name: '0'}]\n", "a.1.x=5").data["a"] == [{"name": "1", "x": 5}, {"name": "0"}]


def test_the_last_of_two_overrides_wins() -> None:
    assert read("a: 1\n", "a=2", "a=3").data == {"a": 3}


def test_an_override_may_be_empty_and_may_contain_equals_signs() -> None:
    assert read("a: 1\nb: 2\n", "a=", "b=x=y").data == {"a": None, "b": "x=y"}


def test_an_overridden_subtree_forgets_its_old_places() -> None:
    source = read("a:\n  b:\n    c: 1\n", "a.b={d: 2}")
    assert source.data == {"a": {"b": {"d": 2}}}
    assert source.places == {
        (): "run.yaml:1",
        ("a",): "run.yaml:1",
        ("a", "b"): "command line",
        ("a", "b", "d"): "command line",
    }


def test_an_override_lies_over_file_and_base() -> None:
    write("base.yaml", "a: 1\nb: 1\n")
    assert read("_base_: base.yaml\na: 2\n", "a=3", "b=3").data == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("a", "expected key=value, such as optim.lr_scale=0.5"),
        ("=1", "expected key=value, such as optim.lr_scale=0.5"),
        ("a..b=1", "expected key=value, such as optim.lr_scale=0.5"),
        (".a=1", "expected key=value, such as optim.lr_scale=0.5"),
        ("a=[1", "not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a.b=1", "there is nothing below 'b''s parent"),
        ("items.warn.x=1", "'warn' is none of warm, tune, 0 to 1"),
        ("items.2=1", "'2' is none of warm, tune, 0 to 1"),
        ("items.-1=1", "'-1' is none of warm, tune, 0 to 1"),
    ],
)
def test_an_override_that_cannot_be_placed_is_quoted(override: str, complaint: str) -> None:
    text = "a: 5\nitems: [{name: warm}, {name: tune}]\n"
    assert mistakes(text, override) == [f"command line: {override!r}: {complaint}"]


QUOTED = {
    "!heads": ["a: [trunk, !heads]", "a:\n  - trunk\n  - !heads", "a: !heads", "a: [!heads, trunk]"],
    "**.bias": ["a: **.bias", "a: [**.bias]", "a: [trunk, **.bias, x]", "a:\n  - **.bias", "a: {**.bias: 0.1}"],
    "*.bias": ["a: [*.bias]", "a: *.bias"],
    "*heads": ["a: [*heads]", "a: *heads"],
    "trunk[:2]": ["a: [trunk[:2]]", "a: [x, trunk[:2], y]", "a: {trunk[:2]: 0.1}"],
    "trunk.blocks[-1].attn": ["a: [trunk.blocks[-1].attn]"],
    "@first": ["a: @first", "a: [@first:2]".replace(":2", "")],
    "%x": ["a: %x", "a: [%x]"],
    "`x`": ["a: `x`"],
    "&x.y": ["a: &x.y"],
    "re:(a|b){2}": ["a: [re:(a|b){2}]"],
    "re:.*[.]bias": ["a: [re:.*[.]bias]"],
}


@pytest.mark.parametrize(("word", "text"), [(word, text) for word, texts in QUOTED.items() for text in texts])
def test_text_that_wants_quotes_is_reported_with_its_quotes(word: str, text: str) -> None:
    (mistake,) = mistakes(f"{text}\n")
    assert mistake.startswith("run.yaml:") and mistake.endswith(f' must be in quotes: "{word}"'), mistake
    with_quotes = text.replace(word, f'"{word}"')
    read(f"{with_quotes}\n")
    if text.startswith("a: "):
        (mistake,) = mistakes("a: 5\n", text.replace(": ", "=", 1))
        assert mistake.startswith("command line") and mistake.endswith(f' must be in quotes: "{word}"'), mistake


# Merge keys


def test_merged_keys_are_read_with_the_lines_they_were_written_on() -> None:
    source = read(
        """\
        x-common: &common
          epochs: 1
          lr: {a: 1,
               b: 2}
        phases:
          - <<: *common
            name: one
          - name: two
            <<: *common
            epochs: 3
        """
    )
    first = {"epochs": 1, "lr": {"a": 1, "b": 2}, "name": "one"}
    assert source.data == {"phases": [first, {"epochs": 3, "lr": {"a": 1, "b": 2}, "name": "two"}]}
    assert source.where(("phases", 0, "epochs")) == "run.yaml:2"
    assert source.where(("phases", 0, "lr", "b")) == source.where(("phases", 1, "lr", "b")) == "run.yaml:4"
    assert source.where(("phases", 0, "name")) == "run.yaml:7"
    assert source.where(("phases", 1, "epochs")) == "run.yaml:10"


def test_a_merge_is_read_as_by_pyyaml_itself() -> None:
    text = """\
        x-a: &a {p: 1, q: 1, inner: {x: 1}}
        x-b: &b {q: 2, r: 2}
        x-c: &c {<<: [*a, *b], s: 3}
        d: {s: 4, <<: *c, inner: {y: 2}}
        e: {<<: {p: 5}, q: 6}
        f: {"<<": 7}
        """
    theirs = yaml.safe_load(dedent(text).replace('f: {"<<": 7}', ""))
    source = read(text)
    assert source.data.pop("f") == {"<<": 7}
    assert source.data == {key: value for key, value in theirs.items() if not key.startswith("x-")}
    assert list(source.data["d"]) == list(theirs["d"])


def test_a_merged_key_is_overridden_in_its_copy_alone() -> None:
    source = read("a: &a {x: 1, y: {z: 1}}\nb: {<<: *a}\n", "b.y.z=2", "b.x=3")
    assert source.data == {"a": {"x": 1, "y": {"z": 1}}, "b": {"x": 3, "y": {"z": 2}}}


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("a: &a {x: 1}\nb:\n  <<: *a\n  y: 1\n  y: 2\n", "run.yaml:5: b.y: this key is given twice"),
        ("a: &a {x: 1}\nb:\n  y: 1\n  <<: *a\n  <<: *a\n", "run.yaml:5: <<: this key is given twice; several"),
        ("b:\n  <<: {x: 1, x: 2}\n", "run.yaml:2: x: this key is given twice"),
        ("a: &a [1]\nb: {<<: *a}\n", "run.yaml:2: <<: expected the alias of a mapping"),
        ("a: 1\nb: {<<: 3}\n", "run.yaml:2: <<: expected the alias of a mapping"),
        ("a: 1\nb: {<<: []}\n", "run.yaml:2: <<: expected the alias of a mapping"),
        ("a: 1\nb: {<<: }\n", "run.yaml:2: <<: expected the alias of a mapping"),
        ("a: 1\nb: &b\n  <<: *b\n", "run.yaml:3: <<: the value contains itself"),
        ("a: 1\nb: &b\n  c:\n    <<: *b\n", "run.yaml:4: <<: the value contains itself"),
        ("a: &a {<<: *a2}\n", "run.yaml:1: not valid YAML: found undefined alias 'a2'"),
    ],
)
def test_a_merge_that_means_nothing_is_named_with_its_line(text: str, mistake: str) -> None:
    (said,) = mistakes(text)
    assert said.startswith(mistake), said


def test_a_key_for_anchors_is_of_its_own_file_and_of_the_top_alone() -> None:
    write("base.yaml", "x-base: 1\na: 1\n")
    assert read("_base_: base.yaml\nx-own: {b: 2}\nc: {x-inner: 3}\n").data == {"a": 1, "c": {"x-inner": 3}}
    assert read("a: 1\n", "x-late=2").data == {"a": 1, "x-late": 2}  # which no run takes


def test_aliases_that_grow_into_billions_are_refused_at_once() -> None:
    lines = ["x-0: &a0 [1, 1]"] + [f"x-{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    (mistake,) = mistakes("\n".join(lines))
    assert mistake == "run.yaml:1: aliases expand to more than 100,000 values; write fewer"
    lines = ["x-0: &a0 {k: 1}"] + [f"x-{n}: &a{n} {{<<: *a{n - 1}, k{n}: *a{n - 1}}}" for n in range(1, 40)]
    assert mistakes("\n".join(lines)) == ["run.yaml:1: aliases expand to more than 100,000 values; write fewer"]


@pytest.mark.parametrize("value", ["{1: 0.1}", "{true: 0.1}", "{a: {2: x}}", "[{null: x}]"])
def test_an_override_means_what_it_means_in_a_file(value: str) -> None:
    assert read("a: 0\n", f"a={value}").data == read(f"a: {value}\n").data


def test_an_override_that_gives_a_key_twice_is_an_error() -> None:
    (mistake,) = mistakes("a: 0\n", "a={b: 1, b: 2}")
    assert mistake.startswith("command line: ")
    assert "given twice" in mistake
