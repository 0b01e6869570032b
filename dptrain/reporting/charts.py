"""Line charts as inline SVG: small, without scripts, in the colours of the page, the same text for the same figures.

Drawn directly rather than with matplotlib: colours follow the page's light and dark scheme, text stays text, nothing is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 46
COLOURS = 6
DASHES = ("", "7 4", "2 4", "10 3 2 3", "4 2", "1 3")


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        name: in the legend.
        points: (x, y); what the axes cannot show is left out.
        marked: a dot at every point.
        colour: index of a colour and a dash pattern of the page; by default the position among the series.
    """

    name: str
    points: Sequence[tuple[float, float]]
    marked: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Axis:
    """One axis: its label with the unit, and its scale."""

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: float) -> bool:
        """Whether a value can be shown."""
        return math.isfinite(value) and (value > 0 or not self.log) and -1e-9 <= self.place(value) <= 1 + 1e-9

    def ticks(self) -> list[float]:
        """Round values on the axis, five or so."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**k for k in range(first, last + 1, 1 + (last - first) // 6)]
        step = round_step((self.high - self.low) / 5)
        return [step * k for k in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]

    def text(self, tick: float) -> str:
        """A tick's text, with as many digits as tell it from its neighbours."""
        if self.log:
            return number(tick)
        step, most = round_step((self.high - self.low) / 5), max(abs(self.low), abs(self.high))
        return f"{tick + 0.0:.{max(4, 2 + math.floor(math.log10(most / step)))}g}"


def round_step(size: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least ``size``."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))


def linear(label: str, values: Sequence[float], zero: bool = False, most: float | None = None) -> Axis:
    """An axis for some values: from 0 if asked for, else from a round value below the least.

    Args:
        label: with the unit.
        values: to be shown.
        zero: whether it starts at 0.
        most: a value that the axis need not pass.
    Returns:
        The axis.
    """
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = 0.0 if zero else min(known), max(known)
    if high - low <= 1e-12 * max(1.0, abs(high)):
        low, high = low - (0.0 if zero else 0.5), max(high, low + 1e-12) + (1.0 if zero and high == low else 0.5)
    step = round_step((high - low) / 5)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(label, low, min(high, most) if most is not None and most > low else high)


def number(value: float) -> str:
    """A power of ten, as it is or with its exponent."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        exponent = round(math.log10(abs(value)))
        if math.isclose(value, 10.0**exponent, rel_tol=1e-9):
            return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:.4g}"


def line_chart(
    identifier: str, title: str, description: str, x: Axis, y: Axis, series: Sequence[Series], limits: Sequence[tuple[str, float]] = ()
) -> Markup:
    """A chart.

    Args:
        identifier: unique in the page.
        title: its name, for those who cannot see it.
        description: what it shows, in a sentence.
        x, y: axes.
        series: lines.
        limits: (name, y) of horizontal lines.
    Returns:
        An ``svg`` element; its classes are styled by the page.
    """

    def at(a: float, b: float) -> tuple[float, float]:
        across = LEFT + x.place(a) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - y.place(b) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [*grid(x, y, at)]
    for name, value in limits:
        if y.holds(value):
            (x1, y1), (x2, _) = at(x.low, value), at(x.high, value)
            parts.append(f'<path class="limit" d="M{x1} {y1}H{x2}"/><text class="name" x="{x1 + 6}" y="{y1 - 5}">')
            parts.append(f"{escape(name)}</text>")
    for index, line in enumerate(series):
        parts += drawn(line, index if line.colour is None else line.colour, x, y, at)
    label = f'aria-labelledby="{identifier}-title {identifier}-text"'
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" {label}><title id="{identifier}-title">{escape(title)}</title>'
        f'<desc id="{identifier}-text">{escape(description)}</desc>{"".join(parts)}</svg>'
    )


def grid(x: Axis, y: Axis, at: Callable[[float, float], tuple[float, float]]) -> list[str]:
    """Grid lines, ticks and labels."""
    parts, bottom, left = [], HEIGHT - BOTTOM, LEFT
    for tick in x.ticks():
        across, _ = at(tick, y.low)
        parts.append(f'<path class="grid" d="M{across} {TOP}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{across}" y="{bottom + 16}" text-anchor="middle">{x.text(tick)}</text>')
    for tick in y.ticks():
        _, up = at(x.low, tick)
        parts.append(f'<path class="grid" d="M{left} {up}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{up + 4}" text-anchor="end">{y.text(tick)}</text>')
    middle, height = (left + WIDTH - RIGHT) / 2, (TOP + bottom) / 2
    parts.append(f'<path class="axis" d="M{left} {TOP}V{bottom}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(f'<text class="label" transform="translate(13 {height}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>')
    return parts


def drawn(line: Series, colour: int, x: Axis, y: Axis, at: Callable[[float, float], tuple[float, float]]) -> list[str]:
    """One line, with dots where it is marked or has a single point."""
    shown = [at(a, b) for a, b in line.points if x.holds(a) and y.holds(b)]
    if not shown:
        return []
    path = "M" + "L".join(f"{a} {b}" for a, b in shown)
    dash = DASHES[colour % len(DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    parts = [f'<path class="line c{colour % COLOURS}" d="{path}"{dashes}/>'] if len(shown) > 1 else []
    if line.marked or len(shown) == 1:
        parts += [f'<circle class="dot c{colour % COLOURS}" cx="{a}" cy="{b}" r="3"/>' for a, b in shown]
    return parts


def legend(series: Sequence[Series]) -> Markup:
    """Names of the lines, each with a piece of it; beside the chart, where it may wrap."""
    parts = []
    for index, line in enumerate(series):
        colour = index if line.colour is None else line.colour
        dash = DASHES[colour % len(DASHES)]
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        stroke = f'<path class="line c{colour % COLOURS}" d="M1 5H33"{dashes}/>'
        parts.append(f'<li><svg class="key" viewBox="0 0 34 10" aria-hidden="true">{stroke}</svg>{escape(line.name)}</li>')
    return Markup(f'<ul class="legend">{"".join(parts)}</ul>')
