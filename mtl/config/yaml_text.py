"""YAML text: parsed to a tree of nodes, scalars read by the rules of YAML 1.2, and data written back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from mtl.config.errors import ConfigError
from mtl.config.yaml_nodes import TreeError, expand
from mtl.config.yaml_quotes import quote_hint, quoted

# Torch's integers have 64 bits, into which all numbers of this length fit.
_MOST_DIGITS = 18


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-3` is a number, `010` is ten, and `on`, `off`, `yes`, `no` are words."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: text that looks like a number is quoted, and no alias is used.

    The words that are truth values in YAML 1.1 (`on`) are quoted too, for those who read the file with PyYAML.
    """

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


NULL, _BOOL, _INT, _FLOAT, _TEXT, LIST, MAPPING = (
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")
)
_SCALARS = [
    (NULL, r"~|null|Null|NULL|", "~nN"),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?[0-9]+", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
]
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _tag, _expression, _first in _SCALARS:
    # PyYAML looks resolvers up by the first character; empty text, which is null, by none.
    for _character in [*_first, *([""] if _tag == NULL else [])]:
        _RESOLVERS.setdefault(_character, []).append((_tag, re.compile(f"^(?:{_expression})$")))
_Loader.yaml_implicit_resolvers = _RESOLVERS
_WORDS = re.compile("^(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$")
_Dumper.yaml_implicit_resolvers = {
    first: [*_RESOLVERS.get(first, ()), *([(_BOOL, _WORDS)] if first in "yYnNoO" else [])]
    for first in {*_RESOLVERS, *"yYnNoO"}
}


def dump_yaml(data: Any) -> str:
    """Writes plain data as YAML that `read_source` reads back as the same data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def compose(text: str, place: Callable[[int], str]) -> yaml.Node | None:
    """Parses YAML to its node tree; `place` names a line."""
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
        if node is not None:
            expand(node)
    except TreeError as error:
        raise ConfigError([f"{place(error.line + 1)}: {error}"]) from None
    except RecursionError:
        raise ConfigError([f"{place(1)}: not valid YAML: its lists and tables are nested too deeply"]) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError([f"{place(line)}: not valid YAML: the character {chr(error.character)!r}"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        hint = quote_hint(text, mark.line, mark.column) if mark else ""
        raise ConfigError([f"{place(mark.line + 1 if mark else 1)}: not valid YAML: {problem}{hint}"]) from None
    return node


def read_scalar(node: yaml.Node, where: str) -> Any:
    """A scalar node as a Python value; `where` is the place and key for messages."""
    text = node.value
    if node.tag == _INT and isinstance(text, str) and (digits := len(text.lstrip("+-0"))) > _MOST_DIGITS:
        raise ConfigError([f"{where}: expected a whole number of at most {_MOST_DIGITS} digits, got one of {digits}"])
    try:
        if isinstance(text, str) and b"\0" in text.encode():
            raise ValueError
        if isinstance(text, str) and node.tag in (NULL, _BOOL, _INT, _FLOAT, _TEXT):
            if node.tag == _FLOAT:
                return float(text.replace(".inf", "inf").replace(".nan", "nan") if text[-1:].isalpha() else text)
            return {NULL: lambda: None, _BOOL: lambda: text.lower() == "true", _INT: lambda: int(text)}.get(
                node.tag, lambda: text
            )()
    except ValueError:
        pass
    hint = quoted(node.tag.rstrip(",")) if node.tag.startswith("!") else ""
    raise ConfigError([f"{where}: cannot be read as {node.tag.removeprefix('tag:yaml.org,2002:')}{hint}"])
