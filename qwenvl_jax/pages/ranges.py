"""Values with their intervals as rows of a table, and histograms: charts whose labels are the page's own text, so that
they wrap on a phone and can be read aloud."""

import dataclasses
import html
import math
from collections.abc import Sequence

from qwenvl_jax.pages.charts import number_text

e = html.escape


@dataclasses.dataclass(frozen=True)
class Row:
    """A value with an interval where it has one. cells: text between label and bar. strong: rows that matter most."""

    label: str
    cells: tuple[str, ...]
    value: float
    low: float = math.nan
    high: float = math.nan
    strong: bool = False


def ranges(heads: Sequence[str], rows: Sequence[Row], low: float, high: float, mark: float = math.nan) -> str:
    """A table of rows with a bar each from `low` to `high`. heads: of the label and the cells. mark: a value that all
    are to be seen against."""
    if not rows:
        return ""
    ticks = [low + (high - low) * part / 4 for part in range(5)]
    scale = "".join(f"<span>{number_text(tick)}</span>" for tick in ticks)
    head = "".join(f'<th scope="col">{e(name)}</th>' for name in heads)
    shown = "".join(_row(row, heads[1:], low, high, mark) for row in rows)
    return (
        f'<table class="ranges"><thead><tr>{head}<td class="scale" aria-hidden="true"><div>{scale}</div></td></tr>'
        f"</thead><tbody>{shown}</tbody></table>"
    )


def _row(row: Row, heads: Sequence[str], low: float, high: float, mark: float) -> str:
    def place(value: float) -> str:
        return f"{100 * min(max((value - low) / (high - low), 0.0), 1.0):.2f}%"

    style = "c0" if row.strong else "plain"
    parts = [f'<line class="grid" x1="{at}%" x2="{at}%" y1="0" y2="100%"/>' for at in (0, 25, 50, 75, 100)]
    if not math.isnan(mark):
        parts.append(f'<line class="mark" x1="{place(mark)}" x2="{place(mark)}" y1="0" y2="100%"/>')
    if not math.isnan(row.low):
        ends = f'x1="{place(row.low)}" x2="{place(row.high)}"'
        parts.append(f'<line class="{style} spread" {ends} y1="50%" y2="50%"/>')
    if not math.isnan(row.value):
        parts.append(f'<circle class="{style}" cx="{place(row.value)}" cy="50%" r="5"/>')
    cells = "".join(f'<td data-head="{e(head)}">{e(cell)}</td>' for head, cell in zip(heads, row.cells, strict=True))
    return (
        f'<tr{" class=strong" if row.strong else ""}><th scope="row">{e(row.label)}</th>{cells}'
        f'<td class="bar"><svg aria-hidden="true">{"".join(parts)}</svg></td></tr>'
    )


def histogram(title: str, values: Sequence[float], unit: str, bins: int = 24) -> str:
    """A figure of how often whole numbers occur, in at most `bins` bars of equal width; "" without any."""
    if not values:
        return ""
    highest = int(max(values))
    width = max(1, -(-(highest + 1) // bins))
    counts = [0] * (highest // width + 1)
    for value in values:
        counts[int(value) // width] += 1
    step = 100 / len(counts)
    bars = "".join(
        f'<rect class="fill" x="{number * step + step * 0.08:.2f}%" width="{step * 0.84:.2f}%"'
        f' y="{100 - 100 * count / max(counts):.2f}%" height="{100 * count / max(counts):.2f}%"/>'
        for number, count in enumerate(counts)
    )
    middle = sorted(values)[len(values) // 2]
    label = f"{title}: from {min(values):,.0f} to {highest:,} {unit}, median {middle:,.0f}"
    return (
        f"<figure><figcaption>{e(title)}</figcaption>"
        f'<svg class="histogram" role="img" aria-label="{e(label)}">{bars}</svg>'
        f'<p class="axis"><span>0</span><span>median {middle:,.0f}</span><span>{highest:,} {e(unit)}</span></p>'
        "</figure>"
    )


STYLE = """
.ranges { width: 100%; }
.ranges th:first-child { overflow-wrap: anywhere; min-width: 7rem; width: 26%; }
.ranges td { white-space: nowrap; vertical-align: middle; } .ranges td:not(.bar) { text-align: right; }
.ranges th:not(:first-child) { text-align: right; }
.ranges .strong > * { font-weight: 600; }
.ranges .bar, .ranges .scale { width: 42%; padding: 0 14px 0 18px; }
.ranges .scale div { display: flex; justify-content: space-between; color: var(--soft); font-size: 0.8rem; }
.ranges .scale span { width: 0; display: flex; justify-content: center; }
.bar svg { display: block; width: 100%; height: 30px; overflow: visible; }
.bar .grid { opacity: 0.55; } .bar .mark { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 3 3; }
.bar .plain { stroke: var(--soft); } .bar circle.plain { fill: var(--soft); }
.bar .spread { stroke-width: 4; stroke-linecap: round; opacity: 0.45; }
.bar circle { stroke-width: 0; } .bar circle.c0 { fill: var(--c0); }
.histogram { display: block; width: 100%; height: 120px; border-bottom: 1px solid var(--rule); }
.fill { fill: var(--c0); }
.axis { display: flex; justify-content: space-between; margin: 4px 0 0; color: var(--soft); font-size: 0.85rem; }
@media (max-width: 640px) {
  .ranges, .ranges :is(thead, tbody) { display: block; } .ranges thead th { display: none; }
  .ranges tr { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 14px; padding: 8px 0;
    border-bottom: 1px solid var(--rule); }
  .ranges th, .ranges td { border: 0; padding: 0; } .ranges tbody th:first-child { flex: 1 1 100%; }
  .ranges td:empty { display: none; }
  .ranges tbody td:not(.bar)::before { content: attr(data-head) " "; color: var(--soft); font-size: 0.85rem; }
  .ranges :is(.bar, .scale) { width: 100%; flex: 1 1 100%; padding: 0 10px; } .bar svg { height: 24px; }
}
"""
