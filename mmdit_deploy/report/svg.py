"""A plot with a logarithmic y axis, as inline SVG.

Its colours come from the page's style sheet, so that they follow its dark and light schemes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree as ET

WIDTH, LEFT, RIGHT, TOP, HEIGHT = 920, 58, 14, 34, 250
BAND = 22  # the strips for what a logarithm cannot show: above for NaN and Inf, below for exact zeros
CHAR = 6.3  # width of a digit at the size of the tick labels, on average
Marker = Literal["circle", "diamond", "bar"]
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Point:
    """One figure: its place on the x axis, its value, what hovering over it says, whether it is out."""

    x: int
    value: float
    title: str
    out: bool


@dataclass(frozen=True)
class Series:
    """Points of one kind; a line joins the worst at each place. Colour and marker tell it from another."""

    label: str
    marker: Marker
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Plot:
    """What to draw.

    Args:
        title: for readers that cannot see it, too.
        x_title: what the x axis counts.
        labels: one for each place on the x axis; may have several lines.
        series: the data.
        breaks: places at which the lines start anew.
        bound: where to draw the dashed line, and its label in the legend.
        mark: a place on the x axis to point at, and the words for it.
    """

    title: str
    x_title: str
    labels: tuple[str, ...]
    series: tuple[Series, ...]
    breaks: frozenset[int] = frozenset()
    bound: tuple[float, str] | None = None
    mark: tuple[int, str] | None = None


@dataclass(frozen=True)
class _Scale:
    low: int
    high: int
    places: int
    top: float
    bottom: float

    @property
    def slot(self) -> float:
        return (WIDTH - LEFT - RIGHT) / self.places

    def x(self, place: int) -> float:
        return LEFT + (place + 0.5) * self.slot

    def y(self, value: float) -> float:
        """Height of a value; NaN and Inf lie in the strip above the plot, 0 in the one below."""
        if not math.isfinite(value):
            return self.top - BAND / 2
        if value <= 0:
            return self.bottom + BAND / 2
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.bottom - share * (self.bottom - self.top)


def draw(plot: Plot) -> str:
    """A plot as one ``<svg>`` element: well-formed XML, without a namespace, for use inside an HTML page."""
    values = [p.value for series in plot.series for p in series.points]
    strips = (any(not math.isfinite(v) for v in values), any(v == 0 for v in values))
    shown = [v for v in values if math.isfinite(v) and v > 0] + ([plot.bound[0]] if plot.bound else [])
    low = math.floor(math.log10(min(shown, default=1e-6)) - 0.05)
    high = max(math.ceil(math.log10(max(shown, default=1.0)) + 0.05), low + 1)
    top = TOP + (BAND if strips[0] else 0) + (16 if plot.mark else 0)
    scale = _Scale(low, high, max(len(plot.labels), 1), top, top + HEIGHT)

    svg = ET.Element("svg", {"class": "plot", "role": "img", "aria-label": plot.title})
    ET.SubElement(svg, "title").text = plot.title
    _legend(svg, plot)
    _grid(svg, scale, strips)
    foot = scale.bottom + (BAND if strips[1] else 0)
    foot = _x_axis(svg, scale, plot, foot)
    if plot.mark:
        _mark(svg, scale, *plot.mark)
    if plot.bound:
        y = scale.y(plot.bound[0])
        _line(svg, "bound", LEFT, y, WIDTH - RIGHT, y)
    # The first series is drawn last, on top: it is the one that the tolerance binds.
    for i, series in reversed(list(enumerate(plot.series))):
        _series(svg, scale, series, i, plot.breaks)
    svg.set("viewBox", f"0 0 {WIDTH} {foot:.0f}")
    return ET.tostring(svg, encoding="unicode")


def _legend(svg: ET.Element, plot: Plot) -> None:
    _text(svg, "label", LEFT - 8, 14, "rel-L2", anchor="end")
    x = float(LEFT)
    for i, series in enumerate(plot.series):
        _line(svg, f"trace {_style(series, i)}", x, 10, x + 24, 10)
        _marker(svg, series.marker, x + 12, 10, _style(series, i), 3.6)
        _text(svg, "label", x + 30, 14, series.label, anchor="start")
        x += 52 + CHAR * len(series.label)
    if plot.bound:
        _line(svg, "bound", x, 10, x + 24, 10)
        _text(svg, "label", x + 30, 14, plot.bound[1], anchor="start")


def _grid(svg: ET.Element, scale: _Scale, strips: tuple[bool, bool]) -> None:
    decades = scale.high - scale.low
    step = math.ceil(decades / 8)
    for decade in range(scale.low, scale.high + 1):
        y = scale.y(10.0**decade)
        _line(svg, "grid", LEFT, y, WIDTH - RIGHT, y)
        if (decade - scale.low) % step == 0:
            _text(svg, "tick", LEFT - 8, y + 4, "10" + str(decade).translate(SUPERSCRIPTS), anchor="end")
        if decades <= 5 and decade < scale.high:
            for digit in range(2, 10):
                y = scale.y(digit * 10.0**decade)
                _line(svg, "grid minor", LEFT, y, WIDTH - RIGHT, y)
    if strips[0]:
        _strip(svg, "strip bad", scale.top - BAND, "NaN, Inf")
    if strips[1]:
        _strip(svg, "strip", scale.bottom, "exact 0")


def _strip(svg: ET.Element, style: str, y: float, label: str) -> None:
    box = {"x": LEFT, "y": y, "width": WIDTH - LEFT - RIGHT, "height": BAND}
    ET.SubElement(svg, "rect", {"class": style, **{name: f"{value:.1f}" for name, value in box.items()}})
    _text(svg, "tick", LEFT - 8, y + BAND / 2 + 4, label, anchor="end")


def _x_axis(svg: ET.Element, scale: _Scale, plot: Plot, foot: float) -> float:
    """Draw as many labels as fit, upright or else slanted, and give where the plot ends."""
    _line(svg, "axis", LEFT, foot, WIDTH - RIGHT, foot)
    lines = [label.split("\n") for label in plot.labels]
    longest = max((len(line) for label in lines for line in label), default=0)
    width = longest * CHAR + 8
    slanted = width > scale.slot and longest > 4
    step = _nice_step((15 if slanted else width) / scale.slot)
    for place in range(0, len(lines), step):
        x = scale.x(place)
        _line(svg, "axis", x, foot, x, foot + 4)
        if slanted:
            text = " · ".join(lines[place])
            _text(svg, "tick", x + 3, foot + 14, text, anchor="end", slant=True)
        else:
            for i, line in enumerate(lines[place]):
                _text(svg, "tick", x, foot + 17 + 13 * i, line)
    if slanted:
        # Slanted by 40 degrees, sin 40° = 0.64.
        foot += 18 + 0.64 * CHAR * max((len(" · ".join(label)) for label in lines), default=0)
    else:
        foot += 20 + 13 * max((len(label) for label in lines), default=1)
    _text(svg, "label", (LEFT + WIDTH - RIGHT) / 2, foot + 8, plot.x_title)
    return foot + 16


def _nice_step(least: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50 … that is not below `least`."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if step >= least:
                return step
        power *= 10


def _mark(svg: ET.Element, scale: _Scale, place: int, words: str) -> None:
    x = scale.x(place)
    _line(svg, "mark", x, TOP + 4, x, scale.bottom)
    right = x > WIDTH / 2
    _text(svg, "label bad", x + (6 if right else -6), TOP, words, anchor="end" if right else "start")


def _series(svg: ET.Element, scale: _Scale, series: Series, index: int, breaks: Set[int]) -> None:
    group = ET.SubElement(svg, "g", {"class": _style(series, index)})
    for run in _runs(series.points, breaks):
        points = " ".join(f"{scale.x(x):.1f},{scale.y(value):.1f}" for x, value in run)
        ET.SubElement(group, "polyline", {"class": "trace", "points": points})
    radius = min(3.2, max(1.6, scale.slot / 4))
    for point in series.points:
        marker = series.marker if math.isfinite(point.value) else "cross"
        style = "bad" if point.out else ""
        size = radius + 0.8 if point.out else radius
        dot = _marker(group, marker, scale.x(point.x), scale.y(point.value), style, size)
        ET.SubElement(dot, "title").text = point.title


def _runs(points: Sequence[Point], breaks: Set[int]) -> list[list[tuple[int, float]]]:
    """The worst at each place, in runs of what a line may join: not NaN, Inf or 0, nor over breaks."""
    worst: dict[int, float] = {}
    for p in points:
        value = math.inf if math.isnan(p.value) else p.value
        worst[p.x] = max(worst.get(p.x, value), value)
    runs: list[list[tuple[int, float]]] = [[]]
    for x, value in sorted(worst.items()):
        if x in breaks:
            runs.append([])
        if math.isfinite(value) and value > 0:
            runs[-1].append((x, value))
        else:
            runs.append([])
    return [run for run in runs if len(run) > 1]


def _style(series: Series, index: int) -> str:
    """What colours it: bars are a background to the others."""
    return "series-floor" if series.marker == "bar" else f"series-{index}"


def _marker(parent: ET.Element, marker: str, x: float, y: float, style: str, size: float) -> ET.Element:
    style = f"dot {style}".strip()
    if marker == "circle":
        attributes = {"class": style, "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{size:.1f}"}
        return ET.SubElement(parent, "circle", attributes)
    if marker == "diamond":
        s = size * 1.3
        path = f"M{x:.1f} {y - s:.1f}l{s:.1f} {s:.1f}l{-s:.1f} {s:.1f}l{-s:.1f} {-s:.1f}z"
        return ET.SubElement(parent, "path", {"class": f"{style} hollow", "d": path})
    if marker == "bar":
        box = {"x": x - 2 * size, "y": y - size / 2, "width": 4 * size, "height": size}
        return ET.SubElement(parent, "rect", {"class": style, **{name: f"{value:.1f}" for name, value in box.items()}})
    s = size * 1.2
    path = f"M{x - s:.1f} {y - s:.1f}l{2 * s:.1f} {2 * s:.1f}m0 {-2 * s:.1f}l{-2 * s:.1f} {2 * s:.1f}"
    return ET.SubElement(parent, "path", {"class": f"{style} cross", "d": path})


def _line(svg: ET.Element, style: str, x1: float, y1: float, x2: float, y2: float) -> None:
    places = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    ET.SubElement(svg, "line", {"class": style, **{name: f"{value:.1f}" for name, value in places.items()}})


def _text(
    svg: ET.Element, style: str, x: float, y: float, text: str, *, anchor: str = "middle", slant: bool = False
) -> None:
    attributes = {"class": style, "x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    if slant:
        attributes["transform"] = f"rotate(-40 {x:.1f} {y:.1f})"
    ET.SubElement(svg, "text", attributes).text = text
