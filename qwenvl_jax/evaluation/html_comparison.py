"""Two runs on the same samples as one page: which is better and how sure that is, where, and what each said."""

import math
from collections.abc import Sequence

import numpy as np

from qwenvl_jax.evaluation import html_parts
from qwenvl_jax.evaluation.comparison import Compared, Comparison, p_text
from qwenvl_jax.evaluation.html_parts import Run, reference_text, reply_text, shortened
from qwenvl_jax.evaluation.html_report import MOST_LABELS, MOST_TOGETHER, STYLE
from qwenvl_jax.evaluation.scores import CONFIDENCE, value_text
from qwenvl_jax.evaluation.tables import notes, signed_text, verdict_text
from qwenvl_jax.evaluation.task import Prediction
from qwenvl_jax.pages import ranges
from qwenvl_jax.pages.page import e, facts, page, section
from qwenvl_jax.pages.ranges import Row

SHOWN = 12  # samples for each of the two


def comparison_report(comparison: Comparison, first: Run, second: Run) -> str:
    """The page about run B, the second, against run A."""
    task = str(second.manifest.get("task", second.name))
    better = comparison.second - comparison.first
    sections = [
        _head(comparison, first, second, task),
        section("Scores", _differences({number.name: number for number in comparison.numbers})),
        *(
            section(f"By {grouping.replace('_', ' ')}", _group(comparison, grouping))
            for grouping, labels in comparison.groups.items()
            if len(labels) > 1
        ),
        section("Agreement", _agreement(comparison)),
        section("Where B is better", _samples(comparison, first, second, better)),
        section("Where A is better", _samples(comparison, first, second, -better)),
        section("Made with", _manifests(first, second)),
    ]
    return page(f"{task}: {second.name} against {first.name}", sections, STYLE + COMPARISON_STYLE)


def _head(comparison: Comparison, first: Run, second: Run, task: str) -> str:
    headline = comparison.numbers[0]
    found = headline.difference
    low, high = (signed_text(value, headline.best) for value in (found.low, found.high))
    names = f'<p class="names"><b class="a">A</b> {e(first.name)}<br><b class="b">B</b> {e(second.name)}</p>'
    known = {
        "Verdict": verdict_text(headline),
        "p": f"{p_text(found.p)} ({found.test})",
        "Samples": f"{comparison.common:,}",
        "Metric": f"{comparison.metric}, {comparison.variant} rules",
    }
    warned = "".join(f'<p class="message">{e(line)}</p>' for line in notes(comparison))
    return (
        f'<header><p class="over">Two runs compared</p><h1>{shortened(task, 200)}</h1>{names}'
        f'<p class="figure">{e(signed_text(found.value, headline.best))}'
        f" <small>{CONFIDENCE} interval {e(low)} to {e(high)}</small></p>"
        f'<p class="lead">{e(headline.name)} of B, {value_text(headline.second, headline.best)}, less that of A,'
        f" {value_text(headline.first, headline.best)}</p>{facts(known)}{warned}</header>\n"
    )


def _differences(numbers: dict[str, Compared]) -> str:
    """B less A with intervals, around nought; scores of unequal scales as parts of the best there is."""
    same = len({number.best for number in numbers.values()}) == 1
    rows = []
    for label, number in numbers.items():
        found = number.difference
        scale = 1.0 if same else number.best / 100
        low, high = (signed_text(value, number.best) for value in (found.low, found.high))
        values = (value_text(value, number.best) for value in (number.first, number.second))
        difference = signed_text(found.value, number.best)
        cells = (f"{number.n:,}", *values, difference, f"{low} to {high}", p_text(found.p))
        strong = number.verdict != 0
        rows.append(Row(label, cells, found.value / scale, found.low / scale, found.high / scale, strong))
    ends = [abs(value) for row in rows for value in (row.value, row.low, row.high) if not math.isnan(value)]
    top = _round_up(max(ends, default=1.0))
    return ranges.ranges(("", "n", "A", "B", "B − A", CONFIDENCE, "p"), rows, -top, top, mark=0.0)


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... that is not below."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)


def _group(comparison: Comparison, grouping: str) -> str:
    labels = sorted(comparison.groups[grouping].items(), key=lambda item: -_finite(item[1].difference.value))
    told = (
        f"{comparison.numbers[0].name}: B less A; p adjusted for {len(labels)} tests (Holm)."
        " In colour: more than chance explains."
    )
    if len(labels) > MOST_LABELS:
        told += f" {len(labels) - MOST_LABELS:,} in the middle are not shown."
        labels = labels[: MOST_LABELS // 2] + labels[-MOST_LABELS // 2 :]
    return f'<p class="soft">{e(told)}</p>{_differences(dict(labels))}'


def _finite(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _agreement(comparison: Comparison) -> str:
    """How many samples both have right, one alone, none; or by value where that is no matter of right and wrong."""
    first, second = comparison.first, comparison.second
    if _shares(comparison):
        told = {
            "Both right": int((first * second).sum()),
            "B alone": int(((second == 1) & (first == 0)).sum()),
            "A alone": int(((first == 1) & (second == 0)).sum()),
            "Both wrong": int(((first == 0) & (second == 0)).sum()),
        }
    else:
        told = {
            "B higher": int((second > first).sum()),
            "A higher": int((first > second).sum()),
            "Same": int((first == second).sum()),
        }
    return facts({name: f"{count:,} ({count / max(len(first), 1):.1%})" for name, count in told.items()})


def _shares(comparison: Comparison) -> bool:
    """Whether units are right or wrong, and nothing between."""
    return bool(np.isin(comparison.first, (0, 1)).all() and np.isin(comparison.second, (0, 1)).all())


def _samples(comparison: Comparison, first: Run, second: Run, better: np.ndarray) -> str:
    """The units with the largest gain, equal ones in random order."""
    shuffled = np.random.default_rng(0).permutation(len(better))
    order = [place for place in shuffled[np.argsort(-better[shuffled], kind="stable")].tolist() if better[place] > 0]
    if not order:
        return ""
    known = tuple({prediction.id: prediction for prediction in run.predictions} for run in (first, second))
    cards = "".join(_card(comparison, place, first, known) for place in order[:SHOWN])
    told = f"{min(SHOWN, len(order)):,} of {len(order):,}, the largest differences first and else at random."
    return f'<p class="soft">{e(told)}</p><div class="cards">{cards}</div>'


def _card(comparison: Comparison, place: int, first: Run, known: Sequence[dict[str, Prediction]]) -> str:
    ids = comparison.ids[place]
    values = comparison.first[place], comparison.second[place]
    shown = "".join(_sample(known[0][id], known[1][id], values, _shares(comparison)) for id in ids[:MOST_TOGETHER])
    image = html_parts.picture({"A": known[0][ids[0]], "B": known[1][ids[0]]}, first.folder)
    return f"<article>{image}{shown}</article>"


def _sample(one: Prediction, other: Prediction, values: tuple[float, float], shares: bool) -> str:
    def answered(letter: str, prediction: Prediction, value: float, rival: float) -> str:
        style = "as" if value > rival else "otherwise" if value < rival else ""
        verdict = ("wrong", "right")[int(value)] if shares else f"{value:.3g}"
        return (
            f'<div><dt><b class="{letter.lower()}">{letter}</b> <span class="{style}">{verdict}</span></dt>'
            f"<dd>{reply_text(prediction)}</dd></div>"
        )

    return (
        f'<div class="sample"><p class="question">{shortened(other.question or other.id)}</p><dl>'
        f"<div><dt>Expected</dt><dd>{reference_text(other.reference)}</dd></div>"
        f"{answered('A', one, values[0], values[1])}{answered('B', other, values[1], values[0])}</dl>"
        f'<p class="where">{shortened(other.id, 120)}</p></div>'
    )


def _manifests(first: Run, second: Run) -> str:
    """Both manifests beside each other, what differs in bold."""
    one, other = html_parts.manifest_facts(first.manifest), html_parts.manifest_facts(second.manifest)
    lines = []
    for name in dict.fromkeys((*one, *other)):
        values = one.get(name, ""), other.get(name, "")
        style = ' class="differs"' if values[0] != values[1] else ""
        cells = "".join(f"<td>{e(value)}</td>" for value in values)
        lines.append(f'<tr{style}><th scope="row">{e(name)}</th>{cells}</tr>')
    head = '<th scope="col">A</th><th scope="col">B</th>'
    return (
        f'<div class="wide"><table class="manifests"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        if lines
        else ""
    )


COMPARISON_STYLE = """
.names { margin: 8px 0 0; overflow-wrap: anywhere; }
b.a, b.b { display: inline-block; min-width: 1.5em; text-align: center; border-radius: 4px; color: var(--paper); }
b.a { background: var(--c1); } b.b { background: var(--c0); }
.manifests td { overflow-wrap: anywhere; max-width: 28rem; min-width: 7rem; }
.manifests .differs > * { font-weight: 600; }
@media (min-width: 641px) {
  .ranges th:first-child { width: 20%; } .ranges .bar, .ranges .scale { width: 32%; } }
"""
