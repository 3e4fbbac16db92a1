"""Makes docs/config.md: every key of a configuration, from the models and docstrings of mtl/config.

python scripts/docs/config_docs.py                            # prints the page
python scripts/docs/config_docs.py --write docs/config.md     # writes it
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator, Tag
from pydantic.fields import FieldInfo

from mtl.config import DataConfig, FileData, OwnData, OwnTaskConfig, RunConfig
from mtl.config.mixed import MixedData
from mtl.config.optim import OwnLrScheduleConfig
from mtl.config.phase import PhaseConfig, RepeatConfig, UntilConfig
from mtl.config.public_data import PublicDataConfig
from mtl.config.transform import OwnTransformConfig
from mtl.config.types import CountedConfig
from written import write_page

HEAD = """# All configuration keys

`python scripts/docs/config_docs.py --write docs/config.md` makes this page from the models in `mtl/config/`; a test
keeps it up to date. [configuration.md](configuration.md) shows a configuration and the name patterns,
[phases.md](phases.md) explains phases.

- **Keys** are shown as the command line takes them: `mtl train CONFIG data.batch_size=64`. In a file, each dot is a
  level of indentation. `<task>` and `<phase>` stand for a name of your own; a phase is addressed by its name,
  `phases.finetune.epochs=2`.
- **Default**: *required* has to be written; *not set* means that the setting is off unless the meaning says otherwise.
- **Type**: `pattern -> number` is a mapping from [name patterns](configuration.md#patterns) to numbers.
- Unknown keys, values of another type, and a key without a value are errors. So is what the table calls refused. A
  setting that no phase reads is an error on the command line and a warning in a file.
"""

# Keys of list items and mapping values, in a path.
_NAMED = {"tasks": "<task>", "phases": "<phase>"}
# Items of lists that are not addressed by a path.
_TITLES: dict[type[BaseModel], str] = {
    CountedConfig: "A pattern with a count",
    RepeatConfig: "A `repeat` in place of a phase",
}
# Classes of the user's own, and the key that names them.
_OWN: dict[type[BaseModel], str] = {
    OwnData: "name",
    OwnLrScheduleConfig: "name",
    OwnTaskConfig: "type",
    OwnTransformConfig: "name",
}
# Models whose keys others have too: listed once, and not again with each of those.
_SHARED: dict[type[BaseModel], str] = {
    DataConfig: "`data`, whatever its name",
    FileData: "`data` that is read from files",
    PublicDataConfig: "`data` of a public data set",
}
_WORDS: dict[type[BaseModel], str] = {
    CountedConfig: "pattern with a count",
    OwnData: "your own",
    OwnLrScheduleConfig: "your own",
    OwnTaskConfig: "your own",
    OwnTransformConfig: "your own",
    PhaseConfig: "phase",
    RepeatConfig: "repeat",
    UntilConfig: "condition",
}


@dataclass(frozen=True)
class Section:
    """One model of the configuration.

    Attributes:
        path: The key that it is under.
        model: The model.
        of: The word that chooses the model around it; empty if none does.
    """

    path: tuple[str, ...]
    model: type[BaseModel]
    of: str = ""

    @property
    def title(self) -> str:
        if not self.path:
            return "The run"
        place = f"`{_dotted(self.path)}`"
        if self.model in _SHARED:
            return _SHARED[self.model]
        if self.model in _OWN:
            return f"{place} with a {_OWN[self.model]} of your own"
        for name in ("type", "name"):
            if words := _words(self.model, name):
                return f"{place} with `{name}: {words[0]}`" + "".join(f" or `{word}`" for word in words[1:])
        return _TITLES.get(self.model, f"{place} of `{self.of}`" if self.of else place)

    def key(self, key: str) -> str:
        """One of the model's keys, dotted."""
        return key if self.model in _TITLES else _dotted((*self.path, key))


def page() -> str:
    """The whole page."""
    sections = _sections()
    anchors: dict[type[BaseModel], str] = {}
    for section in sections:
        anchors[section.model] = anchor(section.title)
    parts = [HEAD.rstrip()]
    for section in sections:
        level = "#" * max(2, min(4, 1 + len([each for each in section.path if not each.startswith("<")])))
        parts += [f"{level} {section.title}", *_paragraphs(section.model), _table(section, anchors)]
    return "\n\n".join(parts) + "\n"


def anchor(title: str) -> str:
    """What a link to a heading is named on GitHub."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _sections() -> list[Section]:
    """Every model once, at the first key that takes it; a model before those inside it."""
    found: dict[type[BaseModel], Section] = {}

    def visit(model: type[BaseModel], path: tuple[str, ...], of: str = "") -> None:
        if model in found:
            return
        for base in reversed(model.__mro__[1:]):
            if base in _SHARED:
                visit(base, path)
        found[model] = Section(path, model, of)
        word = next((words[0] for name in ("type", "name") if (words := _words(model, name))), "")
        inner = [(key, inside(field.annotation)) for key, field in model.model_fields.items()]
        # The run's `optim` and `balance` come first, so that a phase's refer to them.
        for key, models in inner:
            below = (*path, key, _NAMED[key]) if key in _NAMED and not path else (*path, key)
            # The sets of a mixed data set are what `data` may be alone.
            for each in sorted(models, key=lambda own: own is MixedData):
                visit(each, path if key == "phases" and path else below, word if key == "options" else "")

    visit(RunConfig, ())
    return list(found.values())


def inside(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for each in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from inside(each)


def _paragraphs(model: type[BaseModel]) -> list[str]:
    """A model's docstring up to its list of attributes."""
    text = cleandoc(model.__doc__ or "").partition("Attributes:")[0]
    return [_prose(each) for each in text.split("\n\n") if each.strip()]


def _prose(text: str) -> str:
    """Text of a docstring on one line, with pages of the documentation as links."""
    return re.sub(r"\bdocs/(\w+)\.md", r"[\1.md](\1.md)", " ".join(text.split()))


def _table(section: Section, anchors: Mapping[type[BaseModel], str]) -> str:
    meanings = _meanings(section.model)
    rows = [("key", "type", "default", "meaning"), ("---", "---", "---", "---")]
    # A model's own keys before those of its bases.
    own = sorted(section.model.model_fields.items(), key=lambda item: item[0] not in section.model.__annotations__)
    for key, field in own:
        is_shared = any(key in base.model_fields for base in section.model.__mro__[1:] if base in _SHARED)
        if is_shared and key not in section.model.__annotations__:
            continue
        if key not in meanings:
            raise ValueError(f"{section.model.__name__}: expected every field among its Attributes, {key} is missing")
        kind = _type(field.annotation, field.metadata, anchors)
        rows += [(f"`{section.key(key)}`", kind, _default(field), meanings[key])]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """The attributes that the docstrings of a model and its bases explain."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        listed = cleandoc(base.__doc__ or "").partition("Attributes:\n")[2].split("\n\n")[0]
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", listed, flags=re.MULTILINE):
            found[name] = _prose(text)
    return found


def _type(annotation: Any, metadata: Sequence[Any], anchors: Mapping[type[BaseModel], str]) -> str:
    """A type in words.

    Args:
        annotation: The type.
        metadata: What its field adds to it: bounds and short forms.
        anchors: Of each model, the heading to link to.
    """
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        flat = [each for one in more for each in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return _type(inner, [*metadata, *flat], anchors)
    tag = next((each.tag for each in metadata if isinstance(each, Tag)), None)
    short = next((form for each in metadata if isinstance(each, BeforeValidator) if (form := _short_form(each))), "")
    return short + _bare_type(annotation, metadata, tag, anchors)


def _bare_type(
    annotation: Any, metadata: Sequence[Any], tag: str | None, anchors: Mapping[type[BaseModel], str]
) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        kinds = [_type(each, [], anchors) for each in args if each is not types.NoneType]
        return (" or " if len(kinds) < 3 else ", ").join(dict.fromkeys(kinds))
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in args)
    if origin is list:
        return f"list of: {_type(args[0], [], anchors)}"
    if origin is dict:
        return f"{'pattern' if tag == 'table' else 'name'} -> {_type(args[1], [], anchors)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{_word(annotation)}](#{anchors[annotation]})"
    word = {bool: "`true`, `false`", str: "text", int: "whole number", float: "number"}.get(annotation, "anything")
    return (tag if tag == "pattern" else word) + _bounds(metadata)


def _word(model: type[BaseModel]) -> str:
    """What a link to a model says: the word that chooses it, or `keys`."""
    for name in ("type", "name"):
        if words := _words(model, name):
            return ", ".join(f"`{word}`" for word in words)
    return _WORDS.get(model, "keys")


def _short_form(validator: BeforeValidator) -> str:
    """What may be written in place of a mapping or a list, found by handing a word to the validator."""
    func: Any = validator.func
    made = func("word")
    if isinstance(made, dict):
        return f"a `{next(iter(made))}` alone, or "
    return "one or a " if isinstance(made, list) else ""


def _bounds(metadata: Iterable[Any]) -> str:
    said = []
    for each in metadata:
        for kind, word in ((Gt, "> "), (Ge, ">= "), (Lt, "< "), (Le, "<= ")):
            if isinstance(each, kind):
                said.append(f"{word}{_number(getattr(each, kind.__name__.lower()))}")
    return f" {', '.join(said)}" if said else ""


def _number(value: Any) -> str:
    power = value.bit_length() - 1 if isinstance(value, int) and value > 2**16 else 0
    return f"2^{power}" if power and value == 2**power else f"{value:,}"


def _words(model: type[BaseModel], key: str) -> tuple[str, ...]:
    """The words that a key can be; none if it can be any text, or is not there."""
    field = model.model_fields.get(key)
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.default
    if isinstance(value, BaseModel):
        chosen = value.model_dump(exclude_unset=True)
        return f"`{next(iter(chosen.values()))}`" if len(chosen) == 1 else "*as below*"
    if value is None:
        return "*not set*"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _dotted(path: Sequence[str]) -> str:
    return ".".join(path)


def main(arguments: Sequence[str] | None = None) -> None:
    write_page(page, __doc__, arguments)


if __name__ == "__main__":
    main()
