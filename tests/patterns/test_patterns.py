from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.patterns import PatternError, partition, select

DEPTH = ["trunk.layer1.0.weight", "trunk.layer1.0.bias", "trunk.layer10.0.weight", "trunk.layer2.0.weight"]
NORMS = ["trunk.norm.weight", "trunk.norm.bias"]
HEADS = ["heads.depth.weight", "heads.depth.bias", "heads.depth_fine.weight", "heads.depth-raw.weight"]
NAMES = [*DEPTH, *NORMS, *HEADS, "scale"]

CHECKED = settings(max_examples=100, derandomize=True)


# What each form selects, by hand


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        # a module or a tensor, and only at a dot
        ("trunk", "trunk.a.w trunk.a.b trunk.ab.w trunk.c.w"),
        ("trunk.a", "trunk.a.w trunk.a.b"),
        ("trunk.a.w", "trunk.a.w"),
        ("trunk.ab", "trunk.ab.w"),
        ("scale", "scale"),
        ("trunk-2", "trunk-2.w"),
        # * inside one segment
        ("*", "trunk.a.w trunk.a.b trunk.ab.w trunk.c.w trunk-2.w heads.a.out.w scale"),
        ("trunk.*", "trunk.a.w trunk.a.b trunk.ab.w trunk.c.w"),
        ("trunk.a*", "trunk.a.w trunk.a.b trunk.ab.w"),
        ("trunk.*b", "trunk.ab.w"),
        ("trunk.a*b", "trunk.ab.w"),
        ("*.a", "trunk.a.w trunk.a.b heads.a.out.w"),
        ("*.*.w", "trunk.a.w trunk.ab.w trunk.c.w"),
        ("tr*k*.w", "trunk-2.w"),
        ("*.w", "trunk-2.w"),
        ("s*e", "scale"),
        # ** across segments, none included
        ("**", "trunk.a.w trunk.a.b trunk.ab.w trunk.c.w trunk-2.w heads.a.out.w scale"),
        ("**.w", "trunk.a.w trunk.ab.w trunk.c.w trunk-2.w heads.a.out.w"),
        ("**.a", "trunk.a.w trunk.a.b heads.a.out.w"),
        ("**.trunk", "trunk.a.w trunk.a.b trunk.ab.w trunk.c.w"),
        ("**.scale", "scale"),
        ("trunk.**.w", "trunk.a.w trunk.ab.w trunk.c.w"),
        ("trunk.**.a.w", "trunk.a.w"),
        ("heads.**.w", "heads.a.out.w"),
        ("**.a.**.w", "trunk.a.w heads.a.out.w"),
        ("trunk.**", "trunk.a.w trunk.a.b trunk.ab.w trunk.c.w"),
        # ~ any text, and nothing but text
        ("~a", "trunk.a.w trunk.a.b trunk.ab.w heads.a.out.w scale"),
        ("~.a", "trunk.a.w trunk.a.b trunk.ab.w heads.a.out.w"),
        ("~.a.", "trunk.a.w trunk.a.b heads.a.out.w"),
        ("~k-2.", "trunk-2.w"),
        ("~scale", "scale"),
    ],
)
def test_a_pattern_selects(pattern: str, selected: str) -> None:
    names = ["trunk.a.w", "trunk.a.b", "trunk.ab.w", "trunk.c.w", "trunk-2.w", "heads.a.out.w", "scale"]
    assert select([pattern], names).names == tuple(selected.split())


def test_layer1_is_never_layer10() -> None:
    assert select(["trunk.layer1"], NAMES).names == ("trunk.layer1.0.weight", "trunk.layer1.0.bias")
    assert select(["heads.depth"], NAMES).names == ("heads.depth.weight", "heads.depth.bias")


def test_a_substring_is_the_classic_loop_and_does_catch_layer10() -> None:
    classic = ["layer1", "bias"]
    by_hand = tuple(name for name in NAMES if any(text in name for text in classic))
    assert "trunk.layer10.0.weight" in by_hand
    assert select([f"~{text}" for text in classic], NAMES).names == by_hand


@pytest.mark.parametrize("pattern", ["~l.yer1", "~layer*", "~trunk|heads", "~^trunk", "~Trunk"])
def test_a_substring_is_no_expression(pattern: str) -> None:
    with pytest.raises(PatternError, match="matches nothing"):
        select([pattern], NAMES)


def test_a_double_star_at_the_end_stands_for_no_segment_too() -> None:
    assert select(["**.scale.**"], ["scale", "trunk.scale", "trunk.scale.weight"]).names == (
        "scale",
        "trunk.scale",
        "trunk.scale.weight",
    )


@pytest.mark.parametrize(
    ("patterns", "selected"),
    [
        ([], []),
        (["trunk.norm", "scale"], [*NORMS, "scale"]),
        (["scale", "trunk.norm"], [*NORMS, "scale"]),  # the order is that of the names
        (["scale", "scale"], ["scale"]),
        (["heads", "!heads.depth"], ["heads.depth_fine.weight", "heads.depth-raw.weight"]),
        (["heads", "!heads.depth", "heads.depth.bias"], [*HEADS[1:]]),
        (["heads", "!heads.depth", "heads"], HEADS),
        (["heads.depth.bias", "heads", "!heads"], []),
        (["**", "!~weight"], ["trunk.layer1.0.bias", "trunk.norm.bias", "heads.depth.bias", "scale"]),
        (["trunk", "!trunk.layer*", "trunk.layer10"], ["trunk.layer10.0.weight", *NORMS]),
        (["trunk", "!**.bias", "!trunk.norm.*"], ["trunk.layer1.0.weight", *DEPTH[2:]]),
        (["trunk.norm", "!**.bias"], ["trunk.norm.weight"]),  # it may reach beyond what was selected
    ],
)
def test_the_last_pattern_that_matches_decides(patterns: list[str], selected: list[str]) -> None:
    assert select(patterns, NAMES).names == tuple(selected)


def test_a_selection_says_which_pattern_decided_each_name() -> None:
    selection = select(["trunk", "!trunk.norm", "**.bias"], ["trunk.a.w", "trunk.norm.w", "trunk.norm.bias", "scale"])
    assert selection.names == ("trunk.a.w", "trunk.norm.bias")
    assert selection.decided_by == {"trunk.a.w": 0, "trunk.norm.w": 1, "trunk.norm.bias": 2}


# Errors


@pytest.mark.parametrize(
    ("pattern", "nearest", "there"),
    [
        ("trunk.layr2", "trunk.layer2", "below 'trunk' there are: layer1, layer10, layer2, norm"),
        ("trunk.layer2.1", "trunk.layer2.0", "below 'trunk.layer2' there are: 0"),
        ("!trunk.nrm", "trunk.norm", "below 'trunk' there are: layer1, layer10, layer2, norm"),
        ("heds.depth", "heads.depth", "the names start with: trunk, heads, scale"),
        ("scale.weight", None, "the names start with: trunk, heads, scale"),
        ("heads.*.q.*.z", None, "below 'heads' there are: depth, depth_fine, depth-raw"),
        ("zzz", None, "the names start with: trunk, heads, scale"),
        ("~layer3", None, "the names start with: trunk, heads, scale"),
        ("!~layer3", None, "the names start with: trunk, heads, scale"),
    ],
)
def test_a_dead_pattern_is_an_error_with_near_misses(pattern: str, nearest: str | None, there: str) -> None:
    with pytest.raises(PatternError) as caught:
        select(["trunk", pattern], NAMES)
    assert caught.value.index == 1
    message = str(caught.value)
    assert message.startswith(f"pattern {pattern!r} matches nothing ({f'nearest: {nearest}' if nearest else there}")
    assert message.endswith(f"{there})")


def test_near_misses_are_cut_short() -> None:
    with pytest.raises(PatternError) as caught:
        select(["blocks.x"], [f"blocks.{index}.weight" for index in range(13)])
    assert str(caught.value).endswith("below 'blocks' there are: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...)")


def test_without_names_every_pattern_is_dead() -> None:
    assert select([], []).names == ()
    with pytest.raises(PatternError, match=r"^pattern '\*\*' matches nothing$"):
        select(["**"], [])


@pytest.mark.parametrize(
    ("patterns", "index", "count"),
    [
        (["!trunk.norm"], 0, 2),
        (["heads", "!trunk.norm"], 1, 2),
        (["heads", "!heads", "!heads.depth"], 2, 2),
        (["trunk", "!trunk.norm", "!~norm", "trunk.norm"], 2, 2),
    ],
)
def test_taking_back_what_nothing_selected_is_an_error(patterns: list[str], index: int, count: int) -> None:
    with pytest.raises(PatternError) as caught:
        select(patterns, NAMES)
    assert caught.value.index == index
    assert str(caught.value) == (
        f"pattern {patterns[index]!r} deselects nothing: no pattern before it selects any of its {count} names;"
        " leave it out or move it down"
    )


@pytest.mark.parametrize(
    ("pattern", "segment"),
    [
        ("", ""),
        (".", ""),
        ("trunk.", ""),
        (".trunk", ""),
        ("a..b", ""),
        ("trunk[", "trunk["),
        ("a**b", "a**b"),
        ("**b", "**b"),
        ("trunk.***.b", "***"),
        ("trunk.layer 1", "layer 1"),
        ("trunk/layer1", "trunk/layer1"),
        ("trunk\n", "trunk\n"),
        ("(trunk)", "(trunk)"),
        ("trunk|heads", "trunk|heads"),
        ("trunk.!norm", "!norm"),
        ("trunk.~norm", "~norm"),
        ("tru?k", "tru?k"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "!"])
def test_a_malformed_pattern_is_named_at_its_malformed_segment(prefix: str, pattern: str, segment: str) -> None:
    with pytest.raises(PatternError) as caught:
        select(["trunk", prefix + pattern], NAMES)
    assert caught.value.index == 1
    assert f"{prefix + pattern!r} cannot be read at {segment!r}: expected names joined by dots" in str(caught.value)


@pytest.mark.parametrize("pattern", ["~", "!~"])
def test_a_substring_needs_text(pattern: str) -> None:
    with pytest.raises(PatternError, match="has no text after ~") as caught:
        select(["trunk", pattern], NAMES)
    assert caught.value.index == 1


def test_nothing_can_be_taken_back_twice_in_one_pattern() -> None:
    with pytest.raises(PatternError, match="cannot be read at '!trunk'"):
        select(["trunk", "!!trunk"], NAMES)


# Against a naive matcher that shares no code with the real one


def matches(pattern: str, name: str) -> bool:
    if pattern.startswith("~"):
        return pattern[1:] in name
    return _starts(pattern.split("."), name.split("."))


def _starts(pattern: list[str], name: list[str]) -> bool:
    """Whether the segments of a pattern, read from the left, use up the first segments of a name, or all of them."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return _starts(pattern[1:], name) or (name != [] and _starts(pattern, name[1:]))
    return name != [] and fnmatchcase(name[0], pattern[0]) and _starts(pattern[1:], name[1:])


def reference(patterns: list[str], names: list[str]) -> list[str] | int:
    """The selected names; or the index of the first pattern that selects nothing or takes nothing back."""
    selected: list[str] = []
    for index, pattern in enumerate(patterns):
        matched = [name for name in names if matches(pattern.removeprefix("!"), name)]
        if not matched or (pattern.startswith("!") and not set(matched) & set(selected)):
            return index
        selected = [name for name in names if (not pattern.startswith("!") if name in matched else name in selected)]
    return selected


_SEGMENTS = st.sampled_from(["a", "b", "ab", "ba", "a1", "a-b"])
_NAMES = st.lists(st.lists(_SEGMENTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=8, unique=True)


@st.composite
def one_pattern(draw: st.DrawFn, names: list[str]) -> str:
    """A pattern made from one of the names: shortened, with stars in it, or a piece of its text."""
    name = draw(st.sampled_from(names))
    takes_back = draw(st.sampled_from(["", "", "!"]))
    if draw(st.integers(0, 3)) == 0:
        start = draw(st.integers(0, len(name) - 1))
        return f"{takes_back}~{name[start : draw(st.integers(start + 1, len(name)))]}"
    segments = name.split(".")[: draw(st.integers(1, 4))]
    for place, segment in enumerate(segments):
        # A `**` at the end has a test of its own.
        stars = ["*", f"{segment[0]}*", f"*{segment[-1]}", *(["**"] if place < len(segments) - 1 else [])]
        segments[place] = draw(st.sampled_from([segment, segment, *stars]))
    if draw(st.integers(0, 3)) == 0:
        segments.insert(draw(st.integers(0, len(segments) - 1)), "**")
    return takes_back + ".".join(segments)


@st.composite
def any_patterns(draw: st.DrawFn, names: list[str]) -> list[str]:
    """Patterns, dead ones among them: some are made from names that are not there."""
    others = draw(_NAMES)
    return draw(st.lists(one_pattern([*names, *others]), max_size=4))


@st.composite
def live_patterns(draw: st.DrawFn, names: list[str]) -> list[str]:
    """Patterns each of which does something."""
    patterns: list[str] = []
    for pattern in draw(st.lists(one_pattern(names), max_size=5)):
        if not isinstance(reference([*patterns, pattern], names), int):
            patterns.append(pattern)
    return patterns


@CHECKED
@given(st.data())
def test_select_agrees_with_the_naive_matcher(data: st.DataObject) -> None:
    names = data.draw(_NAMES)
    patterns = data.draw(any_patterns(names))
    expected = reference(patterns, names)
    if isinstance(expected, int):
        with pytest.raises(PatternError) as caught:
            select(patterns, names)
        assert caught.value.index == expected
    else:
        assert select(patterns, names).names == tuple(expected)


@CHECKED
@given(st.data())
def test_a_pattern_taken_back_at_once_selects_nothing_of_itself(data: st.DataObject) -> None:
    names = data.draw(_NAMES)
    before = data.draw(live_patterns(names))
    pattern = data.draw(one_pattern(names)).removeprefix("!")
    left = select([*before, pattern, f"!{pattern}"], names).names
    assert left == tuple(name for name in select(before, names).names if not matches(pattern, name))


@CHECKED
@given(st.data())
def test_the_order_of_the_names_does_not_matter(data: st.DataObject) -> None:
    names = data.draw(_NAMES)
    patterns = data.draw(live_patterns(names))
    shuffled = data.draw(st.permutations(names))
    selected = select(patterns, names).names
    assert select(patterns, shuffled).names == tuple(name for name in shuffled if name in selected)


# Partitions


@CHECKED
@given(st.data())
def test_a_partition_puts_every_name_on_one_side_in_order(data: st.DataObject) -> None:
    names = data.draw(_NAMES)
    is_buffer = {name: data.draw(st.booleans()) for name in names}
    parameters = [name for name in names if not is_buffer[name]]
    buffers = [name for name in names if is_buffer[name]]
    patterns = data.draw(live_patterns(names))
    line = partition(patterns, parameters, buffers)

    chosen = reference(patterns, names)
    assert isinstance(chosen, list)
    assert line.frozen == tuple(name for name in parameters if name in chosen)
    assert line.trainable == tuple(name for name in parameters if name not in chosen)

    def is_frozen(buffer: str) -> bool:
        if any(matches(pattern.removeprefix("!"), buffer) for pattern in patterns):
            return buffer in chosen
        module = buffer.split(".")[:-1]
        beside = [name in chosen for name in parameters if name.split(".")[:-1] == module]
        return beside != [] and all(beside)

    assert line.frozen_buffers == tuple(name for name in buffers if is_frozen(name))
    assert line.free_buffers == tuple(name for name in buffers if not is_frozen(name))


BN = ["bn.weight", "bn.bias"]
STATISTICS = ["bn.running_mean", "bn.running_var"]


@pytest.mark.parametrize(
    ("patterns", "frozen", "frozen_buffers"),
    [
        ([], [], []),
        (["bn"], [*BN, "bn.inner.weight"], [*STATISTICS, "bn.inner.mean"]),
        (["bn.weight"], ["bn.weight"], []),  # the bias next to it trains
        (["bn.weight", "bn.bias"], BN, STATISTICS),  # said of the parameters only: the buffers go with them
        (["**.bias", "**.weight"], [*BN, "bn.inner.weight", "conv.weight"], [*STATISTICS, "bn.inner.mean"]),
        (["bn.*", "!bn.running_*"], [*BN, "bn.inner.weight"], ["bn.inner.mean"]),  # taken back by name
        (["bn.weight", "bn.bias", "bn.running_mean", "!bn.running_mean"], BN, ["bn.running_var"]),
        (["bn.running_mean"], [], ["bn.running_mean"]),  # a buffer alone
        (["~running"], [], STATISTICS),
        (["conv"], ["conv.weight"], []),
        (["bn.inner"], ["bn.inner.weight"], ["bn.inner.mean"]),  # nothing of the module around it
        (["anchors"], [], ["anchors.grid"]),  # a module without parameters: only by name
        (["conv", "bn.inner"], ["bn.inner.weight", "conv.weight"], ["bn.inner.mean"]),
    ],
)
def test_a_buffer_is_frozen_with_all_parameters_next_to_it_or_by_name(
    patterns: list[str], frozen: list[str], frozen_buffers: list[str]
) -> None:
    parameters = [*BN, "bn.inner.weight", "conv.weight"]
    buffers = [*STATISTICS, "bn.inner.mean", "anchors.grid", "step"]
    line = partition(patterns, parameters, buffers)
    assert line.frozen == tuple(frozen)
    assert line.frozen_buffers == tuple(frozen_buffers)
    assert line.trainable == tuple(name for name in parameters if name not in frozen)
    assert line.free_buffers == tuple(name for name in buffers if name not in frozen_buffers)


def test_a_module_without_parameters_keeps_its_buffers_free_when_all_else_is_frozen() -> None:
    line = partition(["bn.weight"], ["bn.weight"], ["anchors.grid", "bn.mean"])
    assert (line.frozen_buffers, line.free_buffers) == (("bn.mean",), ("anchors.grid",))


def test_buffers_of_the_root_go_with_the_parameters_of_the_root() -> None:
    assert partition(["scale"], ["scale", "bn.weight"], ["step"]).frozen_buffers == ("step",)
    assert partition(["bn"], ["scale", "bn.weight"], ["step"]).frozen_buffers == ()


def test_a_partition_says_which_pattern_decided() -> None:
    line = partition(["bn", "!bn.mean"], ["bn.weight"], ["bn.mean", "bn.var"])
    assert line.decided_by == {"bn.weight": 0, "bn.mean": 1, "bn.var": 0}
    # The rule of the parameters next to it is no pattern.
    assert partition(["bn.weight"], ["bn.weight"], ["bn.var"]).decided_by == {"bn.weight": 0}


def test_a_partition_rejects_what_select_rejects() -> None:
    with pytest.raises(PatternError, match=r"pattern 'bnn' matches nothing .*nearest: bn"):
        partition(["bn", "bnn"], ["bn.weight"], ["bn.mean"])
