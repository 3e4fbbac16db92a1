"""Pydantic's errors as messages: place, key, what was expected, what came, the nearest valid choice."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic_core import ErrorDetails

from mtl.config.yaml_source import BASE_KEY, ConfigSource, KeyPath, dotted, phase_name
from mtl.runtime.text import hint

_MOST_SHOWN = 100
# Errors about keys that exclude each other: the one from the command line is to blame.
_OF_SEVERAL_KEYS = ("balance", "until", "length", "freeze", "restore", "checkpoint")
_SENTENCES = [
    ("Input should be greater", "expected a number greater"),
    ("Input should be less", "expected a number less"),
    ("Input should be a finite number", "expected a finite number"),
    ("Input should be", "expected"),
    ("Input should have", "expected"),
    ("String should match pattern", "expected text that matches"),
    ("String should have", "expected text of"),
]


def explain(error: ErrorDetails, model: type[BaseModel], source: ConfigSource, below: KeyPath = ()) -> str:
    """One line for one of pydantic's errors.

    Args:
        error: What pydantic reports.
        model: The model that was validated.
        source: The configuration as read, with the place of every key.
        below: The key path of what was validated, if that is not the whole configuration.
    """
    path, innermost = _resolve(error["loc"], model)
    path = (*below, *path)
    kind, came, context = error["type"], error["input"], error.get("ctx", {})
    expected, got = _our_sentence(error["msg"]), ", got nothing" if came is None else f", got {_value_text(came)}"
    near = f"; nearest: {context['nearest']}" if "nearest" in context else ""
    if kind == "extra_forbidden":
        expected, got, near = "unknown key", "", _fix_of_unknown_key(path, list(innermost.model_fields), came)
    elif kind in ("missing", "union_tag_not_found"):
        expected, got = "this key is required", ""
        path = (*path, _tag_key(context)) if kind == "union_tag_not_found" else path
    elif kind in ("union_tag_invalid", "literal_error"):
        if kind == "union_tag_invalid":
            path, came = (*path, _tag_key(context)), came[_tag_key(context)]
        listed = context.get("expected_tags") or context["expected"]
        choices = [choice.strip().strip("'") for choice in listed.replace(" or ", ", ").split(",")]
        expected, got, near = (
            f"expected one of {', '.join(choices)}",
            f", got {_value_text(came)}",
            hint(str(came), choices),
        )
    elif kind in ("model_type", "model_attributes_type"):
        expected = "expected keys and values"
    elif kind == "null":
        got, near = ", got nothing", "; leave out the key for its default"
    elif kind == "too_short":
        expected, got = "expected at least one", ", got none"
    elif isinstance(came, dict | list):
        got = ""
    if kind in _OF_SEVERAL_KEYS:
        path = source.overridden_below(path)
    return error_line(path, f"{expected}{got}{near}", source)


def _fix_of_unknown_key(path: KeyPath, keys: list[str], came: Any) -> str:
    if path[-1] == BASE_KEY:
        return "; write it at the top of a file"
    if near := hint(str(path[-1]), keys):
        return near
    anchors = (
        "; put anchors below a key that starts with x-" if len(path) == 1 and isinstance(came, dict | list) else ""
    )
    return f"; the keys here are {', '.join(keys)}{anchors}"


def error_line(path: KeyPath, message: str, source: ConfigSource) -> str:
    """An error in one line: the place, the key, and what is wrong with its value."""
    return f"{source.where(path)}: {key_of(path, source.data)}: {message}"


def key_of(path: KeyPath, data: Any) -> str:
    """A key as it is written on the command line; phases by their names in `data`."""

    def name_at(place: KeyPath) -> str | None:
        at = data
        for key in place:
            is_there = isinstance(at, Mapping) or (isinstance(at, list) and isinstance(key, int) and key < len(at))
            at = None if not is_there else at.get(key) if isinstance(at, Mapping) else at[key]
        return phase_name(at)

    return dotted(path, name_at)


def _value_text(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}... ({len(text):,} characters)"


def _tag_key(context: Mapping[str, Any]) -> str:
    """The key whose value selects the model of a mapping."""
    # A key in quotes, or a function that is named after it: `_by_type()`.
    key: str = context["discriminator"].strip("'").removesuffix("()").removeprefix("_by_")
    return key


def _our_sentence(message: str) -> str:
    """Pydantic's sentence in our form: `expected ...`."""
    message = message.removeprefix("Value error, ")
    for theirs, ours in _SENTENCES:
        message = message.replace(theirs, ours)
    return message


def _resolve(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[KeyPath, type[BaseModel]]:
    """The key path of pydantic's location, without its markers for union members and keys.

    Returns:
        The path, and the innermost model on it.
    """
    path: list[int | str] = []
    annotation: Any = model
    for key in location:
        annotation, is_mark = _descend(annotation, key)
        if not is_mark:
            path.append(key)
        members = _members(annotation)
        if len(members) == 1 and isinstance(members[0][0], type) and issubclass(members[0][0], BaseModel):
            model = members[0][0]
    return tuple(path), model


def _descend(annotation: Any, key: int | str) -> tuple[Any, bool]:
    """The annotation below a key, and whether the key is a marker of pydantic's."""
    members = _members(annotation)
    if len(members) > 1:
        return next((member for member, tags in members if key in tags), None), True
    kind = members[0][0]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(key))
        return (None if field is None else field.annotation), False
    return (get_args(kind) or (None,))[-1], key == "[key]"


def _members(annotation: Any) -> list[tuple[Any, tuple[str, ...]]]:
    """The types of a union without None, each with the tags that select it; one for anything else."""
    tags: tuple[str, ...] = ()
    while get_origin(annotation) is Annotated:
        annotation, *extras = get_args(annotation)
        tags += tuple(extra.tag for extra in extras if isinstance(extra, Tag))
    if get_origin(annotation) in (Union, UnionType):
        return [m for member in get_args(annotation) if member is not NoneType for m in _members(member)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for key in ("type", "name"):
            field = annotation.model_fields.get(key)
            if field is not None and get_origin(field.annotation) is Literal:
                tags += get_args(field.annotation)
    return [(annotation, tags)]
