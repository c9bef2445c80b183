"""Line charts as inline SVG: they take the page's colours, light or dark, and say in words what they
show."""

import html
import itertools
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26  # margins
MOST_POINTS = 300  # of a line
COLOURS = 6  # classes c0, c1, ... of the page's style; the next six lines are dashed

Points = Sequence[tuple[float, float]]


def line_chart(title: str, lines: Mapping[str, Points], *, log: bool = False, percent: bool = False) -> str:
    """A figure of lines over steps; "" where there is nothing to draw. log: only values above 0 have a place."""
    lines = {name: [p for p in points if not log or p[1] > 0] for name, points in lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    steps, values = zip(*itertools.chain(*lines.values()), strict=True)
    across = _scale(min(steps), max(steps), LEFT, WIDTH - RIGHT, log=False)
    low, high = min(values), max(values)
    if percent:
        low, high = 0.0, max(high, 0.01)
    elif not log:
        low = min(low, 0.0) if low < 0.5 * high else low
    up = _scale(low, high, HEIGHT - BOTTOM, TOP, log=log)
    parts = [_grid(across(min(steps)), across(max(steps)), up, _ticks(low, high, log), percent)]
    for step in sorted({min(steps), max(steps)}):
        anchor = "end" if step == max(steps) else "start"
        label = f"step {step:,}" if anchor == "end" else f"{step:,}"
        parts.append(f'<text x="{across(step):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{label}</text>')
    parts += [_line(points, across, up, number) for number, points in enumerate(lines.values())]
    told = "; ".join(
        f"{name} {number_text(points[0][1], percent)} at step {points[0][0]:,}"
        f" to {number_text(points[-1][1], percent)} at step {points[-1][0]:,}"
        for name, points in lines.items()
    )
    label = html.escape(f"{title}: {told}")
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    legend = "" if len(lines) == 1 else _legend(list(lines))
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{picture}{legend}</figure>"


def number_text(value: float, percent: bool = False) -> str:
    """A number as short as a person would write it: 12.3k, 0.0012, 1e-5, 41 %."""
    if percent:
        return f"{100 * value:.3g} %"
    if 1e3 <= abs(value) < 1e4:
        return f"{value:,.0f}"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def _scale(low: float, high: float, start: float, end: float, *, log: bool):
    """From values to places."""
    if log:
        inner = _scale(math.log(low), math.log(high), start, end, log=False)
        return lambda value: inner(math.log(value))
    if low == high:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """A few round numbers between the two."""
    if log:
        factors = (1,) if high / low > 100 else (1, 2, 5)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [tick for power in powers for factor in factors if low <= (tick := factor * 10.0**power) <= high]
        if len(found) > 1:
            return found[:: -(-len(found) // 6)]
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 3))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 4)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)] or [low]


def _grid(left: float, right: float, up, ticks: list[float], percent: bool) -> str:
    parts = []
    for tick in ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number_text(tick, percent)}</text>')
    return "".join(parts)


def _line(points: Points, across, up, number: int) -> str:
    thinned = [*points[:: -(-len(points) // MOST_POINTS)], points[-1]]
    places = [f"{across(step):.1f},{up(value):.1f}" for step, value in thinned]
    drawn = f'<polyline class="{_style(number)}" points="{" ".join(places)}"/>'
    if len(points) <= 12:  # few enough to be marked, and one alone would not be seen
        dots = (place.split(",") for place in places)
        drawn += "".join(f'<circle class="{_style(number)}" cx="{x}" cy="{y}" r="3"/>' for x, y in dots)
    return drawn


def _legend(names: list[str]) -> str:
    line = '<line class="{}" x1="0" x2="24" y1="4" y2="4"/>'
    swatch = f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true">{line}</svg>'
    items = (f"<li>{swatch.format(_style(i))}{html.escape(name)}</li>" for i, name in enumerate(names))
    return f'<ul class="legend">{"".join(items)}</ul>'


def _style(number: int) -> str:
    return f"c{number % COLOURS}" + (" dashed" if number // COLOURS % 2 else "")
