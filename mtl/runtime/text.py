"""Words for users: lists of names in short, counts, bytes, and the nearest valid choice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches


def condense(names: Iterable[str], every_name: Iterable[str]) -> list[str]:
    """The modules and tensors that cover exactly these names: a module in place of all that is registered on it.

    Where the names are those of modules, one without some of the modules in it is listed by its own name all the same.

    Args:
        names: The names to cover.
        every_name: All names there are.
    """
    wanted = dict.fromkeys(names)
    partly = {start for name in every_name if name not in wanted for start in _starts(name)}
    return list(dict.fromkeys(next((start for start in _starts(name) if start not in partly), name) for name in wanted))


def _starts(name: str) -> Iterator[str]:
    """The names of the modules around a tensor from the outermost on, then its own."""
    end = name.find(".")
    while end != -1:
        yield name[:end]
        end = name.find(".", end + 1)
    yield name


# Under these names torch.compile, FSDP and activation checkpointing keep the module that they wrap.
INNER_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def parents(name: str) -> Iterator[str]:
    """The paths of all modules around a tensor, from the innermost on; the last is the root's, which is empty."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def shorten(items: list[str], most: int) -> str:
    """Some items in a line, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def short_repr(value: object) -> str:
    """A value as Python writes it, in at most 60 characters."""
    text = repr(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def with_article(noun: str) -> str:
    """`a tensor`, `an array`."""
    return f"{'an' if noun[:1] in 'aeiou' else 'a'} {noun}"


def count(number: float, what: str) -> str:
    """A number of things: `1 epoch`, `1,200 steps`."""
    written = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{written} {what}{'' if number == 1 else 's'}"


def in_bytes(number: int) -> str:
    """Bytes in the unit that fits, of powers of a thousand."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}" if number < 1000 * factor else f"{number / factor:,.0f} {unit}"
    return f"{number} B"


def hint(word: str, choices: Iterable[str], most: int = 1, cutoff: float = 0.5) -> str:
    """`; nearest: ...` to put after a message, or nothing if no choice is near."""
    near = get_close_matches(word, list(choices), n=most, cutoff=cutoff)
    return f"; nearest: {', '.join(near)}" if near else ""
