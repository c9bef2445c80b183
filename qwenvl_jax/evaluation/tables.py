"""Scores as tables for the terminal."""

from collections.abc import Sequence

import rich.table
from rich.text import Text

from qwenvl_jax.evaluation.baseline import Guess
from qwenvl_jax.evaluation.comparison import Compared, Comparison, p_text
from qwenvl_jax.evaluation.published import Published, published_for
from qwenvl_jax.evaluation.scores import CONFIDENCE, Number, Scores, interval_text, value_text

OURS = ("Qwen-VL", "Qwen-VL-Chat")  # whose published scores stand beside ours


def scores_table(scores: Scores, task: str, guess: Guess | None = None) -> rich.table.Table:
    """Every score with its interval, beside what was published of it."""
    beside = [published_for(task, number.name, headline=place == 0) for place, number in enumerate(scores.numbers)]
    models = [model for model in OURS if any(row.model == model for rows in beside for row in rows)]
    table = _table(Text(f"{task}: {scores.metric}, {scores.variant}"), "score")
    for column in ("value", CONFIDENCE, "n", "failed", *models):
        table.add_column(column, justify="right")
    for number, rows in zip(scores.numbers, beside, strict=True):
        table.add_row(Text(number.name), *_cells(number), *(_published(rows, model, number.best) for model in models))
    table.caption = Text("\n".join(_captions(scores, task, guess, [row for rows in beside for row in rows])))
    return table


def _table(title: Text, first: str) -> rich.table.Table:
    table = rich.table.Table(title=title, caption_justify="left", title_justify="left")
    table.add_column(first, overflow="fold")
    return table


def _cells(number: Number) -> tuple[str, ...]:
    return value_text(number.value, number.best), interval_text(number), f"{number.n:,}", f"{number.failed:,}"


def _published(rows: Sequence[Published], model: str, best: float) -> str:
    row = next((row for row in rows if row.model == model), None)
    return "" if row is None else value_text(row.value, best) + ("" if row.verified else "?")


def _captions(scores: Scores, task: str, guess: Guess | None, rows: Sequence[Published]) -> list[str]:
    """What one has to know to read the table."""
    lines = []
    if guess:
        value = value_text(guess.value, scores.headline.best)
        lines.append(f"The best fixed reply ({guess.reply[:40]!r} to everything) would get {value}.")
    if scores.note:
        lines.append(scores.note)
    shown = [row for row in rows if row.model in OURS]
    lines += dict.fromkeys(f"Published: {row.source} ({row.where})" for row in shown)
    if other := {row.task for row in shown} - {task}:
        lines.append(f"Published of {', '.join(sorted(other))}, another split than this.")
    if any(not row.verified for row in shown):
        lines.append("?: by a third party, or not checked against its source.")
    return lines


def groups_table(scores: Scores, grouping: str) -> rich.table.Table:
    """The scores of each label of a grouping."""
    table = _table(Text(f"by {grouping}"), grouping)
    for column in (scores.headline.name, CONFIDENCE, "n", "failed", *(number.name for number in scores.numbers[1:])):
        table.add_column(column, justify="right")
    for label, numbers in scores.groups[grouping].items():
        others = (value_text(number.value, number.best) for number in numbers[1:])
        table.add_row(Text(label), *_cells(numbers[0]), *others)
    return table


def comparison_table(comparison: Comparison, names: tuple[str, str]) -> rich.table.Table:
    """Both runs' scores, and whether chance explains their difference."""
    table = _comparison(f"B against A: {comparison.metric}, {comparison.variant}", "score")
    for number in comparison.numbers:
        _add(table, number.name, number)
    lines = [f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)]
    lines.append(f"p: {' or '.join(dict.fromkeys(number.difference.test for number in comparison.numbers))} test.")
    lines += notes(comparison)
    table.caption = Text("\n".join(lines))
    return table


def notes(comparison: Comparison) -> list[str]:
    """What limits a comparison."""
    lines = []
    if comparison.only_first or comparison.only_second:
        lines.append(
            f"Compared on the {comparison.common:,} samples of both; left out: {comparison.only_first:,} of A only,"
            f" {comparison.only_second:,} of B only."
        )
    if comparison.other_references:
        lines.append(f"{comparison.other_references:,} samples have other reference answers in B than in A.")
    return lines


def comparison_groups_table(comparison: Comparison, grouping: str) -> rich.table.Table:
    """The headline of each label of a grouping in both runs."""
    table = _comparison(f"by {grouping}: {comparison.numbers[0].name}", grouping)
    for label, number in comparison.groups[grouping].items():
        _add(table, label, number)
    table.caption = Text(f"p values are adjusted for {len(comparison.groups[grouping])} tests (Holm).")
    return table


def _comparison(title: str, first: str) -> rich.table.Table:
    table = _table(Text(title), first)
    for column in ("n", "A", "B", "B - A", CONFIDENCE, "p", ""):
        table.add_column(column, justify="left" if not column else "right")
    return table


def _add(table: rich.table.Table, name: str, number: Compared) -> None:
    found = number.difference
    values = (value_text(value, number.best) for value in (number.first, number.second))
    signed = (signed_text(value, number.best) for value in (found.value, found.low, found.high))
    difference, low, high = signed
    table.add_row(
        Text(name), f"{number.n:,}", *values, difference, f"{low} to {high}", p_text(found.p), verdict_text(number)
    )


def signed_text(value: float, best: float) -> str:
    """A difference with its sign; none where it is zero."""
    text = value_text(abs(value), best)
    return text if not text.strip("0.,-") else f"{'-' if value < 0 else '+'}{text}"


def verdict_text(number: Compared) -> str:
    """Who is better, in words."""
    return {1: "B is better", -1: "A is better", 0: "no difference can be told"}[number.verdict]
