"""Line charts as SVG, with the phases as bands behind the lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtl.results.report.markup import Html, number, tag
from mtl.results.report.palette import NUM_LINES
from mtl.results.report.run import PhaseSpan

# In units of the picture, which is drawn about as wide as they are pixels.
_WIDTH, _HEIGHT = 340.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 8.0, 16.0, 22.0
# Points of a line; more are put together.
_MOST_POINTS = 160
# A mark may take this many times the room of the values.
_MOST_STRETCHED = 4.0
# Lines with fewer points than these show each of them.
_MOST_DOTS = 40

Point = tuple[float, float | None]


@dataclass(frozen=True)
class ChartLine:
    """One line.

    Attributes:
        name: What it shows.
        points: Steps and values, in the order of steps; None breaks the line.
        number: Of its colour.
    """

    name: str
    points: Sequence[Point]
    number: int = 0


@dataclass(frozen=True)
class _Bin:
    """Neighbouring points, put together: their middle step, mean, least and greatest value."""

    step: float
    mean: float | None
    low: float
    high: float


class _Scale:
    """From steps and values to places in the picture."""

    def __init__(self, steps: tuple[float, float], values: tuple[float, float]) -> None:
        (self.first, self.last), (self.low, self.high) = steps, values

    def x(self, step: float) -> float:
        width = self.last - self.first or 1
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - self.first) / width, 1)

    def y(self, value: float) -> float:
        height = self.high - self.low or 1
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - self.low) / height, 1)


def points(rows: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """The values of a metric over steps, where it was logged."""
    return [(row["step"], row[key]) for row in rows if key in row]


def line_chart(
    title: str,
    lines: Sequence[ChartLine],
    spans: Sequence[PhaseSpan] = (),
    note: str = "",
    mark: tuple[str, float] | None = None,
) -> Html:
    """A chart with its caption; empty if it has nothing to show.

    Args:
        title: Its caption.
        lines: What is drawn over steps.
        spans: The phases, numbered from 1 above the picture.
        note: A second, smaller line of the caption.
        mark: A value to compare with and its name: a dashed line, unless the lines would be flat next to it.
    """
    values = [value for line in lines for value in _numbers(line)]
    if not values:
        return Html()
    drawn = [_binned(line.points) for line in lines]
    is_near = mark is not None and _is_near(mark[1], values)
    bounds = [*values, *([mark[1]] if mark and is_near else [])]
    ticks = nice_ticks(min(bounds), max(bounds))
    steps = [step for line in lines for step, _ in line.points]
    first, last = min([*steps, *(span.begin for span in spans)]), max([*steps, *(span.end for span in spans)])
    scale = _Scale((first, last), (min(ticks[0], *bounds), max(ticks[-1], *bounds)))
    pieces = [
        *_bands(spans, scale),
        *_axes(ticks, scale),
        *(_reference(mark[1], scale) if mark and is_near else ()),
        *(piece for line, bins in zip(lines, drawn, strict=True) for piece in _line(line, bins, scale)),
    ]
    picture = tag(
        "svg",
        tag("title", f"{title}: {'; '.join(_in_words(line) for line in lines)}"),
        *pieces,
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
    )
    compared = "" if mark is None else f"{'dashed: ' if is_near else ''}{mark[0]} {number(mark[1])}"
    small = [piece for piece in (note, compared) if piece]
    caption = tag("figcaption", title, tag("small", "; ".join(small)) if small else None)
    return tag("figure", caption, picture)


def keys_html(names: Sequence[str]) -> Html:
    """Which line is whose."""
    return tag(
        "ul",
        *(tag("li", tag("i", class_=f"line tint-{at % NUM_LINES}"), name) for at, name in enumerate(names)),
        class_="keys",
    )


def nice_ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Two or more round numbers that are evenly spaced and cover a range of values."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [float(f"{place * size:.12g}") for place in range(first, last + 1)]


def _is_near(mark: float, values: Sequence[float]) -> bool:
    """Whether a chart with a mark in it still shows how its values change."""
    low, high = min(values), max(values)
    return max(high, mark) - min(low, mark) <= _MOST_STRETCHED * (high - low or 1)


def _numbers(line: ChartLine) -> list[float]:
    return [value for _, value in line.points if value is not None and math.isfinite(value)]


def _binned(points: Sequence[Point]) -> list[_Bin]:
    """At most `_MOST_POINTS` bins of neighbouring points; a bin without a number has none."""
    size = max(1, math.ceil(len(points) / _MOST_POINTS))
    bins = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        own = [value for _, value in part if value is not None and math.isfinite(value)]
        mean = sum(own) / len(own) if own else None
        bins.append(_Bin((part[0][0] + part[-1][0]) / 2, mean, min(own, default=0), max(own, default=0)))
    return bins


def _bands(spans: Sequence[PhaseSpan], scale: _Scale) -> list[Html]:
    """Every other phase is shaded; each has its number above, if there is room for it."""
    pieces = []
    for at, span in enumerate(spans):
        left, right = scale.x(span.begin), scale.x(span.end)
        if at % 2 == 0 and right > left:
            height = _HEIGHT - _TOP - _BOTTOM
            pieces.append(tag("rect", x=left, y=_TOP, width=right - left, height=height, class_="band"))
        if right - left >= 10:
            pieces.append(tag("text", str(at + 1), x=(left + right) / 2, y=11, text_anchor="middle"))
    return pieces


def _axes(ticks: Sequence[float], scale: _Scale) -> list[Html]:
    pieces = []
    for tick in ticks:
        y = scale.y(tick)
        pieces.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        pieces.append(tag("text", _short(tick), x=_LEFT - 6, y=y + 3.5, text_anchor="end"))
    for step in nice_ticks(scale.first, scale.last, 3):
        if scale.first <= step <= scale.last:
            anchor = "end" if scale.x(step) > _WIDTH - 24 else "middle"
            x = min(scale.x(step), _WIDTH - _RIGHT)
            pieces.append(tag("text", f"{step:,.0f}", x=x, y=_HEIGHT - 6, text_anchor=anchor))
    return pieces


def _reference(value: float, scale: _Scale) -> list[Html]:
    y = scale.y(value)
    return [tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="zero")]


def _line(line: ChartLine, bins: Sequence[_Bin], scale: _Scale) -> list[Html]:
    colour = line.number % NUM_LINES
    pieces, parts = [], _unbroken(bins)
    if len(bins) < len(line.points):
        for part in parts:
            above = [f"{scale.x(each.step):g},{scale.y(each.high):g}" for each in part]
            below = [f"{scale.x(each.step):g},{scale.y(each.low):g}" for each in reversed(part)]
            pieces.append(tag("polygon", points=" ".join([*above, *below]), class_=f"range range-{colour}"))
    for part in parts:
        places = " ".join(f"{scale.x(each.step):g},{scale.y(each.mean or 0):g}" for each in part)
        pieces.append(tag("polyline", points=places, class_=f"line line-{colour}"))
    if sum(map(len, parts)) <= _MOST_DOTS:
        pieces += [
            tag(
                "circle",
                tag("title", f"{line.name}, step {each.step:,.0f}: {number(each.mean)}"),
                cx=scale.x(each.step),
                cy=scale.y(each.mean or 0),
                r="2.6",
                class_=f"dot-{colour}",
            )
            for part in parts
            for each in part
        ]
    return pieces


def _unbroken(bins: Sequence[_Bin]) -> list[list[_Bin]]:
    parts: list[list[_Bin]] = [[]]
    for each in bins:
        if each.mean is None:
            parts.append([])
        else:
            parts[-1].append(each)
    return [part for part in parts if part]


def _in_words(line: ChartLine) -> str:
    values = _numbers(line)
    if not values:
        return f"{line.name}: no value"
    first, last = number(values[0]), number(values[-1])
    return f"{line.name} from {first} to {last}, between {number(min(values))} and {number(max(values))}"


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or abs(value) < 1e-3:
        return f"{value:.2g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:,.4g}" if abs(value) < 1e3 else f"{value:,.0f}"
