"""Two runs compared: the same samples or a clear refusal, and the tables and the command that tell the result."""

import dataclasses
import io
import json

import numpy as np
import pytest
import rich.console
from evaluation.runs import ACCURACY, run

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.baseline import Guess
from qwenvl_jax.evaluation.compare import main
from qwenvl_jax.evaluation.comparison import compare, p_text
from qwenvl_jax.evaluation.metrics.metric import Metric
from qwenvl_jax.evaluation.predictions import line
from qwenvl_jax.evaluation.scores import score
from qwenvl_jax.evaluation.tables import comparison_groups_table, comparison_table, groups_table, scores_table


def text(table) -> str:
    """What a terminal shows, without the breaks of lines."""
    console = rich.console.Console(width=140, file=io.StringIO(), record=True)
    console.print(table)
    return " ".join(console.export_text().split())


def test_a_better_run_is_told():
    found = compare(run(["no"] * 10), run(["yes"] * 8 + ["no"] * 2), ACCURACY, resamples=200)
    (number,) = found.numbers
    assert (number.first, number.second, number.difference.value) == (0, pytest.approx(80), pytest.approx(80))
    assert number.difference.p == pytest.approx(2 / 2**8)
    assert number.verdict == 1
    assert compare(run(["yes"] * 8), run(["no"] * 8), ACCURACY, resamples=20).numbers[0].verdict == -1
    assert compare(run(["yes", "no"]), run(["no", "no"]), ACCURACY, resamples=20).numbers[0].verdict == 0


def test_the_order_of_a_file_makes_no_difference():
    first, second = run(["yes", "no", "no", "yes"]), run(["no", "yes", "no", "yes"])
    straight, turned = (compare(first, other, ACCURACY, resamples=50) for other in (second, second[::-1]))
    assert straight.numbers == turned.numbers
    assert np.array_equal(straight.second, turned.second)


def test_other_samples_are_refused_and_counted():
    first, second = run(["yes"] * 5), run(["yes"] * 9)[2:]
    with pytest.raises(
        UserError, match=r"2 are in the first only and 4 in the second only \(such as '0'\).*the 3 that"
    ):
        compare(first, second, ACCURACY)
    found = compare(first, second, ACCURACY, common=True, resamples=20)
    assert (found.common, found.only_first, found.only_second) == (3, 2, 4)
    assert "left out: 2 of A only, 4 of B only" in text(comparison_table(found, ("a", "b")))
    with pytest.raises(UserError, match="no sample in common"):
        compare(first, [dataclasses.replace(p, id=f"x{p.id}") for p in second], ACCURACY, common=True)


def test_a_sample_that_is_there_twice_is_refused():
    with pytest.raises(UserError, match="the second run has 2 predictions of the sample '0'"):
        compare(run(["yes"]), run(["yes"]) * 2, ACCURACY)


def test_other_answers_are_noted():
    found = compare(run(["yes"] * 3), run(["yes"] * 3, answer="no"), ACCURACY, resamples=20)
    assert found.other_references == 3
    assert "3 samples have other reference answers" in text(comparison_table(found, ("a", "b")))


def test_a_metric_that_groups_by_reply_cannot_compare():
    def units(predictions):
        return ACCURACY.units([p for p in predictions if p.reply == "yes"])

    with pytest.raises(UserError, match="groups the samples of the two runs differently"):
        compare(run(["yes", "no"]), run(["no", "yes"]), Metric("odd", "official", units, ACCURACY.scores))


def test_groups_are_adjusted_for_their_number():
    labels = ["a"] * 6 + ["b"] * 6
    one, other = (
        [dataclasses.replace(p, groups={"kind": label}) for p, label in zip(run(replies), labels, strict=True)]
        for replies in (["no"] * 12, ["yes"] * 6 + ["no"] * 6)
    )
    found = compare(one, other, ACCURACY, resamples=50)
    assert found.groups["kind"]["a"].difference.p == pytest.approx(2 * 2 / 2**6)
    assert found.groups["kind"]["b"].difference.p == 1
    shown = text(comparison_groups_table(found, "kind"))
    assert "adjusted for 2 tests" in shown
    assert "+100.00" in shown


def test_scores_stand_beside_published_ones():
    found = score(run(["yes", None, "no"]), ACCURACY, resamples=50)
    shown = text(scores_table(found, "docvqa_val", Guess("[bold]yes", 66.7)))
    for told in ("33.33", "Qwen-VL", "65.10", "62.60?", "docvqa_test, another split", "not checked", "[bold]yes"):
        assert told in shown
    assert "Qwen-VL" not in text(scores_table(found, "mine"))


def test_groups_have_a_table():
    predictions = [dataclasses.replace(p, groups={"kind": "[red]x"}) for p in run(["yes", "no"])]
    shown = text(groups_table(score(predictions, ACCURACY, resamples=50), "kind"))
    assert "[red]x" in shown
    assert "50.00" in shown


@pytest.mark.parametrize(("p", "shown"), [(0.00049, "< 0.001"), (0.0213, "0.021"), (0.4, "0.40"), (float("nan"), "-")])
def test_p_values_are_short(p, shown):
    assert p_text(p) == shown


def write(path, predictions, **manifest):
    first = json.dumps({"manifest": {"task": "mine", "metric": "exact_match"} | manifest}) + "\n"
    path.write_text(first + "".join(map(line, predictions)))
    return str(path)


def test_the_command_compares(tmp_path, capsys):
    first = write(tmp_path / "a.jsonl", run(["no"] * 8))
    second = write(tmp_path / "b.jsonl", run(["yes"] * 8), checkpoint="other")
    assert main([first, second, "--html", str(tmp_path / "page.html")]) == 0
    told = capsys.readouterr().out
    assert "B is better" in told
    assert "0.008" in told  # 2 / 2**8
    page = (tmp_path / "page.html").read_text()
    assert "B is better" in page
    assert "checkpoint" in page


@pytest.mark.parametrize(
    ("manifest", "arguments", "message"),
    [
        ({}, ["--metric", "no_such"], "no_such"),
        ({"task": "other"}, [], "compare predictions of the same task"),
        ({}, ["--html", "no/such/folder.html"], "no/such"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, manifest, arguments, message):
    first = write(tmp_path / "a.jsonl", run(["no"] * 2))
    second = write(tmp_path / "b.jsonl", run(["yes"] * 2), **manifest)
    assert main([first, second, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.jsonl"), str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
