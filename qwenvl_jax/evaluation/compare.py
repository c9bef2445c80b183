"""Compares two runs on the same samples, from their predictions alone:

    python -m qwenvl_jax.evaluation.compare A.jsonl B.jsonl [--metric VARIANT] [--common] [--html FILE]

Says by how much the second is better, the interval of that, and whether chance explains it (`statistics.py` has how).
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.comparison import compare
from qwenvl_jax.evaluation.html_comparison import comparison_report
from qwenvl_jax.evaluation.html_parts import Run
from qwenvl_jax.evaluation.html_report import write_page
from qwenvl_jax.evaluation.metrics import registry
from qwenvl_jax.evaluation.metrics.metric import Metric
from qwenvl_jax.evaluation.predictions import read_predictions
from qwenvl_jax.evaluation.scores import score
from qwenvl_jax.evaluation.tables import comparison_groups_table, comparison_table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qwenvl_jax.evaluation.compare", description="Compare two runs on the same samples."
    )
    parser.add_argument("first", type=Path, metavar="A.jsonl", help="the predictions to compare with")
    parser.add_argument("second", type=Path, metavar="B.jsonl", help="the predictions to judge")
    parser.add_argument(
        "--metric",
        metavar="VARIANT",
        default="official",
        help="whose rules: official (default), qwenvl, vlmevalkit, ...",
    )
    parser.add_argument("--common", action="store_true", help="compare on the samples that both have")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the comparison as a page, with samples")
    options = parser.parse_args(arguments)
    try:
        _compare(options)
    except (UserError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return 0


def _compare(options: argparse.Namespace) -> None:
    (one, first), (other, second) = read_predictions(options.first), read_predictions(options.second)
    metric = _metric(one, other, options)
    comparison = compare(first, second, metric, options.common)
    names = _names(options.first, options.second)
    console = rich.console.Console()
    console.print(comparison_table(comparison, names))
    for grouping in comparison.groups:
        console.print(comparison_groups_table(comparison, grouping))
    if options.html:
        runs = [
            Run(name, manifest, predictions, score(predictions, metric, groups=()), path.parent)
            for name, manifest, predictions, path in (
                (names[0], one, first, options.first),
                (names[1], other, second, options.second),
            )
        ]
        console.print(write_page(options.html, comparison_report(comparison, *runs)), soft_wrap=True)


def _metric(one: Mapping[str, Any], other: Mapping[str, Any], options: argparse.Namespace) -> Metric:
    """The metric that both are judged by."""
    named = [(manifest.get("task"), manifest.get("metric")) for manifest in (one, other)]
    if named[0] != named[1]:
        raise UserError(
            f"{options.first} is of task {named[0][0]!r} and metric {named[0][1]!r}, {options.second} of task"
            f" {named[1][0]!r} and metric {named[1][1]!r}; compare predictions of the same task"
        )
    if not isinstance(named[0][1], str):
        raise UserError(f"{options.first}: its first line names no metric; make the predictions anew")
    return registry.metric(named[0][1], options.metric)


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The files' names, with their folders where they are the same."""
    return (first.name, second.name) if first.name != second.name else (str(first), str(second))


if __name__ == "__main__":
    sys.exit(main())
