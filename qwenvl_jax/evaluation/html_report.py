"""The report of an evaluation, `report.html`: one file with everything in it, for whoever has to judge the model.

How good it is and how sure that is, beside what others published and what a guess would get; where it is weak; what it
said when it was wrong, with pictures. The page loads nothing and runs no script.
"""

import collections
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwenvl_jax.evaluation import html_parts
from qwenvl_jax.evaluation.baseline import Guess
from qwenvl_jax.evaluation.html_parts import Run, reference_text, reply_text, shortened
from qwenvl_jax.evaluation.published import Published, published_for
from qwenvl_jax.evaluation.scores import CONFIDENCE, Number, interval_text, value_text
from qwenvl_jax.evaluation.tables import OURS
from qwenvl_jax.evaluation.task import Prediction
from qwenvl_jax.pages import ranges
from qwenvl_jax.pages.page import e, facts, page, section
from qwenvl_jax.pages.ranges import Row

WORST, BEST = 24, 8  # samples shown
MOST_LABELS = 80  # of a grouping
MOST_FAILURES = 100
MOST_TOGETHER = 6  # predictions of one unit

STYLE = ranges.STYLE + html_parts.STYLE


def write_report(path: Path, run: Run, guess: Guess | None = None) -> Path:
    """Writes the page, whole or not at all."""
    return write_page(path, report(run, guess))


def write_page(path: Path, text: str) -> Path:
    """Writes a page, whole or not at all. Half a surrogate pair, which JSON can name and no file can hold, is spelt."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(text.encode("utf-8", "backslashreplace"))
    return partial.replace(path)


def report(run: Run, guess: Guess | None = None) -> str:
    """The page about a run."""
    task = str(run.manifest.get("task", run.name))
    scores = run.scores
    sections = [
        _head(run, task),
        section("Scores", _numbers(scores.numbers) if len(scores.numbers) > 1 else ""),
        section("Beside others", _beside(run, task, guess)),
        *(section(f"By {grouping.replace('_', ' ')}", _group(run, grouping)) for grouping in scores.groups),
        section("Worst samples", _samples(run, WORST, worst=True)),
        section("Best samples", _samples(run, BEST, worst=False)),
        section("Replies", _replies(run.predictions)),
        section("Failed", _failures(run)),
        section("Made with", f'<div class="manifest">{facts(html_parts.manifest_facts(run.manifest))}</div>'),
    ]
    return page(f"{task}: {run.name}", sections, STYLE)


def _head(run: Run, task: str) -> str:
    scores, headline = run.scores, run.scores.headline
    counted = f"{scores.samples:,}"
    if scores.pictures < len(scores.ids):
        counted += f" about {scores.pictures:,} picture{'s' if scores.pictures > 1 else ''}"
    known = {"Samples": counted, "Metric": f"{scores.metric}, {scores.variant} rules", "Failed": f"{headline.failed:,}"}
    if len(scores.ids) != scores.samples:
        known["Judged together"] = f"as {len(scores.ids):,} units"
    interval = f" <small>{CONFIDENCE} interval {interval_text(headline)}</small>" if interval_text(headline) else ""
    return (
        f'<header><p class="over">Evaluation of {shortened(run.name, 200)}</p><h1>{shortened(task, 200)}</h1>'
        f'<p class="figure">{value_text(headline.value, headline.best)}{interval}</p>'
        f'<p class="lead">{e(headline.name)}{_of(headline)}</p>{facts(known)}'
        + (f'<p class="soft">These rules: {e(scores.note)}</p>' if scores.note else "")
        + "</header>\n"
    )


def _of(number: Number) -> str:
    return ", in percent" if number.best == 100 else f", of at most {number.best:,.0f}"


def _numbers(numbers: Sequence[Number]) -> str:
    """All scores, those on one scale in one table."""
    tables = []
    for best, of in _by_scale(numbers).items():
        rows = [_row(number.name, number, number is numbers[0]) for number in of]
        tables.append(ranges.ranges(("", "value", CONFIDENCE), rows, 0.0, _top(of, best)))
    return "".join(tables)


def _by_scale(numbers: Sequence[Number]) -> dict[float, list[Number]]:
    found: dict[float, list[Number]] = collections.defaultdict(list)
    for number in numbers:
        found[number.best].append(number)
    return found


def _row(label: str, number: Number, strong: bool = False, *cells: str) -> Row:
    shown = (*cells, value_text(number.value, number.best), interval_text(number))
    return Row(label, shown, number.value, number.low, number.high, strong=strong)


def _top(numbers: Sequence[Number], best: float, others: Sequence[float] = ()) -> float:
    """Where the scale ends: at the best score there can be, or above the highest there is where that is far below."""
    ends = [value for number in numbers for value in (number.value, number.high)]
    highest = max((value for value in [*ends, *others] if not math.isnan(value)), default=best)
    if best <= 100 or highest > best / 2:
        return max(best, highest) if math.isfinite(best) else highest or 1.0
    step = 10.0 ** math.floor(math.log10(highest)) if highest > 0 else best
    return step * math.ceil(highest / step)


def _beside(run: Run, task: str, guess: Guess | None) -> str:
    """The headline among published scores, later families apart."""
    headline = run.scores.headline
    found = published_for(task, headline.name, headline=True)
    if not found and not guess:
        return ""
    splits = any(row.task != task for row in found)  # else the column says nothing
    rows = [_row(f"this run: {run.name[:80]}", headline, True, *[""] * splits)]
    if guess:
        shown = (*[""] * splits, value_text(guess.value, headline.best), "")
        rows.append(Row(f"always {guess.reply[:60]!r}", shown, guess.value))
    ours = [row for row in found if row.model.startswith(OURS[0])]
    later = [row for row in found if row not in ours]

    def rows_of(of: Sequence[Published]) -> list[Row]:
        return [
            Row(
                row.model,
                (*[row.task] * splits, value_text(row.value, headline.best), "" if row.verified else "not verified"),
                row.value,
            )
            for row in of
        ]

    heads = ("", *["split"] * splits, "value", CONFIDENCE)
    top = _top([headline], headline.best, [row.value for row in found])
    table = ranges.ranges(heads, rows + rows_of(ours), 0.0, top, headline.value)
    if later:
        more = ranges.ranges(heads, rows_of(later), 0.0, top, headline.value)
        table += f"<details><summary>Later families</summary>{more}</details>"
    return f'<p class="soft">{e(headline.name)}; the dashed line is this run.</p>{table}{_sources(found, guess)}'


def _sources(found: Sequence[Published], guess: Guess | None) -> str:
    lines = []
    if guess:
        lines.append(
            "Always: the best of a few fixed replies, chosen on these very samples; what one gets without looking."
        )
    for source, where in dict.fromkeys((row.source, row.where) for row in found):
        models = ", ".join(dict.fromkeys(row.model for row in found if row.source == source))
        lines.append(f"{models}: {source} ({where})")
    lines += dict.fromkeys(f"{row.model}: {row.note}" for row in found if row.note and row.model in OURS)
    if any(not row.verified for row in found):
        lines.append("Not verified: by a third party, or not checked against its source.")
    return '<ul class="soft list">' + "".join(f"<li>{e(line)}</li>" for line in lines) + "</ul>"


def _group(run: Run, grouping: str) -> str:
    """The headline score of each label, best first, against the whole."""
    labels = sorted(run.scores.groups[grouping].items(), key=lambda item: -_finite(item[1][0].value))
    shown = [numbers[0] for _, numbers in labels]
    rows = [_row(label, numbers[0], False, f"{numbers[0].n:,}") for label, numbers in labels[:MOST_LABELS]]
    headline = run.scores.headline
    top = _top(shown, headline.best)
    mark = headline.value if headline.value <= top else math.nan  # a sum over labels is on no scale of theirs
    told = headline.name + ("" if math.isnan(mark) else "; the dashed line is the whole") + "."
    if len(labels) > MOST_LABELS:
        told += f" {len(labels) - MOST_LABELS:,} more are not shown."
    table = ranges.ranges(("", "n", "value", CONFIDENCE), rows, 0.0, top, mark)
    return f'<p class="soft">{e(told)}</p>{table}'


def _finite(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _samples(run: Run, count: int, worst: bool) -> str:
    """Units with the lowest or highest value, equal ones in random order so that they stand for all."""
    name, values = next(iter(run.scores.columns.items()), ("", []))
    if not len(values):
        return ""
    sign = 1 if worst else -1
    end = max(values) if worst else min(values)  # where all are alike, none is worst
    shuffled = np.random.default_rng(0).permutation(len(values)).tolist()
    order = [place for place in shuffled if values[place] != end]
    order = sorted(order, key=lambda place: sign * _finite(values[place]))[:count]
    if not order:
        return ""
    known = {prediction.id: prediction for prediction in run.predictions}
    cards = "".join(unit_card(run, place, known) for place in order)
    alike = sum(value == values[order[0]] for value in values)
    drawn = f"; {len(order):,} of them, drawn at random" if alike > len(order) else ""
    told = f"Ranked by {name.replace('_', ' ')}: {alike:,} of {len(values):,} have {values[order[0]]:.3g}{drawn}."
    return f'<p class="soft">{e(told)}</p><div class="cards">{cards}</div>'


def unit_card(run: Run, place: int, known: dict[str, Prediction]) -> str:
    """One unit: its picture, its questions, what was expected and what was said."""
    together = [known[id] for id in run.scores.ids[place] if id in known]
    values = ", ".join(
        f"{name.replace('_', ' ')} {column[place]:.3g}" for name, column in list(run.scores.columns.items())[:2]
    )
    shown = "".join(sample(prediction) for prediction in together[:MOST_TOGETHER])
    if len(together) > MOST_TOGETHER:
        shown += f'<p class="more">and {len(together) - MOST_TOGETHER} more questions</p>'
    first = together[0] if together else None
    image = html_parts.picture({"answered": first}, run.folder) if first else ""
    labels = "".join(f"<li>{shortened(label, 60)}</li>" for label in (first.groups.values() if first else ()) if label)
    tags = f'<ul class="tags">{labels}</ul>' if labels else ""
    return f'<article>{image}{shown}{tags}<p class="where">{e(values)}</p></article>'


def sample(prediction: Prediction) -> str:
    """A question, the expected answer and the reply."""
    ended = f", {prediction.tokens:,} tokens" if prediction.tokens else ""
    ended += ", cut off at the limit" if prediction.finish_reason == "length" else ""
    return (
        f'<div class="sample"><p class="question">{shortened(prediction.question or prediction.id)}</p><dl>'
        f"<div><dt>Expected</dt><dd>{reference_text(prediction.reference)}</dd></div>"
        f"<div><dt>Answered{ended}</dt><dd>{reply_text(prediction)}</dd></div></dl>"
        f'{html_parts.likelihoods(prediction)}<p class="where">{shortened(prediction.id, 120)}</p></div>'
    )


def _replies(predictions: Sequence[Prediction]) -> str:
    """How long replies are, and which are the most frequent."""
    replied = [prediction for prediction in predictions if prediction.error is None]
    if not replied:
        return ""
    counted = any(prediction.tokens for prediction in replied)
    lengths = [prediction.tokens if counted else len(prediction.reply) for prediction in replied]
    figure = ranges.histogram("Length of replies", lengths, "tokens" if counted else "letters")
    limited = sum(prediction.finish_reason == "length" for prediction in replied)
    empty = sum(not prediction.reply.strip() for prediction in replied)
    common = collections.Counter(prediction.reply for prediction in replied).most_common(8)
    lines = "".join(
        f"<tr><td>{count:,}</td><td>{shortened(reply, 120)}</td></tr>" for reply, count in common if count > 1
    )
    table = f"<figure><figcaption>Most frequent replies</figcaption><table>{lines}</table></figure>" if lines else ""
    told = {"Cut off at the token limit": f"{limited:,}", "Empty": f"{empty:,}"}
    return f'<div class="charts">{figure}{table}</div>{facts(told)}'


def _failures(run: Run) -> str:
    failures = run.scores.failures
    if not failures:
        return ""
    items = "".join(
        f"<li>{shortened(failure.id, 120)}: {shortened(failure.error, 300)}</li>"
        for failure in failures[:MOST_FAILURES]
    )
    rest = f"<p>and {len(failures) - MOST_FAILURES:,} more</p>" if len(failures) > MOST_FAILURES else ""
    told = f"{len(failures):,} samples got no reply and count as wrong"
    return f"<details open><summary>{told}</summary><ul>{items}</ul>{rest}</details>"
