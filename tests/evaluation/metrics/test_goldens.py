"""Every metric against predictions that the published evaluation code scored.

Reads all files of the folder QWENVL_METRIC_GOLDEN, else tests/golden/metrics; a file is judged by what its name begins
with ("mme.json", "mme_more.json"), and everything in it is compared. What is in the files: one JSON per metric, inputs
and what the original made of them (`expected`), see CHECKS below.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import TESTS

from qwenvl_jax.evaluation.metrics import anls, exact_match, grounding, mmbench, mme, ngrams, vqa_accuracy, yes_no
from qwenvl_jax.evaluation.metrics.captions import tokens
from qwenvl_jax.evaluation.metrics.metric import Metric, Units
from qwenvl_jax.evaluation.metrics.reading import text
from qwenvl_jax.evaluation.metrics.registry import metric
from qwenvl_jax.evaluation.metrics.relaxed_accuracy import qwenvl_relaxed_accuracy
from qwenvl_jax.evaluation.task import Prediction

FOLDER = Path(os.environ.get("QWENVL_METRIC_GOLDEN", TESTS / "golden" / "metrics"))
FILES = sorted(FOLDER.glob("*.json"))
TOLERANCE = 1e-6
IOU_TOLERANCE = 1e-5
LETTERS = "ABCD"


def close(value):
    return pytest.approx(value, abs=TOLERANCE, rel=0, nan_ok=True)


def rounded(value):
    """A value of which the original kept two places."""
    return pytest.approx(value, abs=0.005 + TOLERANCE, rel=0)


def strings(answers) -> list[str]:
    return [text(answer) for answer in (answers if isinstance(answers, list) else [answers])]


def scores(judge: Metric, units: Units, weights: np.ndarray | None = None) -> dict[str, float]:
    weights = np.ones(len(units.ids)) if weights is None else weights
    return {score.name: score.compute(units, weights) for score in judge.scores}


def by_group(judge: Metric, units: Units, name: str) -> dict[str, float]:
    """The headline for each label of a grouping."""
    labels = np.array(units.groups[name])
    return {label: judge.scores[0].compute(units, (labels == label).astype(float)) for label in dict.fromkeys(labels)}


def judged(judge: Metric, items: list[dict], reply: str, **fields: str) -> Units:
    """Units of golden items: `fields` says which part of the reference is which field of an item."""
    predictions = [
        Prediction(
            str(number),
            text(item[reply]),
            {part: item[field] for part, field in fields.items()},
            {name: text(item[name]) for name in ("question_type", "answer_type") if name in item},
        )
        for number, item in enumerate(items)
    ]
    return judge.units(predictions)


def known(found: dict, *names: str) -> None:
    """Nothing in a file goes unlooked at."""
    assert set(found) <= set(names)


def check_vqa_accuracy(golden: dict) -> None:
    items = golden["items"]
    known(golden["expected"], "official", "qwen_eval_mm")
    for key, variant, accuracy in (
        ("official", "official", vqa_accuracy.vqa_accuracy),
        ("qwen_eval_mm", "qwenvl", vqa_accuracy.qwenvl_accuracy),
    ):
        expected = golden["expected"].get(key)
        if expected is None:
            continue
        known(expected, "accuracy", "per_question", "prediction_after_punctuation", "prediction_after_digit_article")
        found = {
            str(item["question_id"]): round(100 * accuracy(strings(item["answers"]), text(item["prediction"])), 2)
            for item in items
        }
        assert found == close(expected["per_question"])
        plain = [vqa_accuracy.without_punctuation(vqa_accuracy.one_line(text(item["prediction"]))) for item in items]
        assert plain == expected["prediction_after_punctuation"]
        assert list(map(vqa_accuracy.without_articles, plain)) == expected["prediction_after_digit_article"]
        judge = metric("vqa_accuracy", variant)
        units = judged(judge, items, "prediction", answers="answers")
        known(expected["accuracy"], "overall", "perQuestionType", "perAnswerType")
        assert scores(judge, units)["VQA accuracy"] == rounded(expected["accuracy"]["overall"])
        for part, name in (("perQuestionType", "question_type"), ("perAnswerType", "answer_type")):
            assert by_group(judge, units, name) == rounded(expected["accuracy"][part])


def check_anls(golden: dict) -> None:
    for key, expected in golden["expected"].items():
        threshold = float(key.removeprefix("threshold_"))
        known(expected, "score", "per_question")
        found = {
            str(item["questionId"]): anls.anls(strings(item["answers"]), text(item["prediction"]), threshold)
            for item in golden["items"]
        }
        assert found == close(expected["per_question"])
        assert sum(found.values()) / len(found) == close(expected["score"])
        if threshold == anls.THRESHOLD:
            judge = metric("anls")
            units = judged(judge, golden["items"], "prediction", answers="answers")
            assert scores(judge, units)["ANLS"] / 100 == close(expected["score"])


def check_relaxed_accuracy(golden: dict) -> None:
    expected = golden["expected"]
    known(expected, "relaxed_accuracy", "per_item")
    found = [qwenvl_relaxed_accuracy(strings(item["annotation"]), text(item["answer"])) for item in golden["items"]]
    assert found == [bool(value) for value in expected["per_item"]]
    judge = metric("relaxed_accuracy", "qwenvl")
    units = judged(judge, golden["items"], "answer", answers="annotation")
    assert scores(judge, units)["relaxed accuracy"] / 100 == close(expected["relaxed_accuracy"])


def check_exact_match_gqa(golden: dict) -> None:
    items, expected = golden["items"], golden["expected"]
    known(expected, "accuracy", "per_item", "gqa_cleaned", "gqa_accuracy", "gqa_per_item")
    pairs = [(strings(item["annotation"]), text(item["answer"])) for item in items]
    assert [exact_match.exact_match(*pair) for pair in pairs] == expected["per_item"]
    assert [exact_match.gqa_answer(answer) for _, answer in pairs] == expected["gqa_cleaned"]
    assert [exact_match.gqa_accuracy(*pair) for pair in pairs] == expected["gqa_per_item"]
    for name, variant, key in (("exact_match", "official", "accuracy"), ("gqa", "qwenvl", "gqa_accuracy")):
        judge = metric(name, variant)
        units = judged(judge, items, "answer", answers="annotation")
        assert scores(judge, units)["accuracy"] / 100 == close(expected[key])


def check_grounding(golden: dict) -> None:
    items, expected = golden["items"], golden["expected"]
    known(expected, "precision_at_1", "iou", "correct")
    found = [grounding.qwenvl_iou(text(item["answer"]), item["gt_bbox"], *item["hw"][::-1]) for item in items]
    for value, wanted in zip(found, expected["iou"], strict=True):
        assert value == pytest.approx(np.nan if wanted is None else wanted, abs=IOU_TOLERANCE, rel=0, nan_ok=True)
    assert [value >= grounding.THRESHOLD for value in found] == expected["correct"]
    judge = metric("grounding", "qwenvl")
    predictions = [
        Prediction(
            str(number),
            text(item["answer"]),
            {"box": item["gt_bbox"], "width": item["hw"][1], "height": item["hw"][0]},
        )
        for number, item in enumerate(items)
    ]
    assert scores(judge, judge.units(predictions))["accuracy at IoU 0.5"] / 100 == close(expected["precision_at_1"])


def check_mmbench(golden: dict) -> None:
    for part in golden.values():
        known(part, "rows", "predictions", "tie_ids", "expected")
        known(part["expected"], "global_top1", "opencompass_style")
        rows = {row["index"]: row for row in part["rows"]}
        predictions = []
        for made in part["predictions"]:
            row = rows[made["index"]]
            reference = {
                "index": row["index"],
                "answer": LETTERS.index(row["answer"]),
                "choices": options(row),
            }
            predictions.append(Prediction(str(row["index"]), "", reference, choice=made["prediction"]))
        check_circular(predictions, part["expected"]["global_top1"])
        check_vote(predictions, part["expected"]["opencompass_style"], part.get("tie_ids", []))


def options(row: dict) -> list[str]:
    """The choices of a row; what the table had no text for is none."""
    return [str(row[letter]) for letter in LETTERS if row.get(letter) not in (None, "") and row[letter] == row[letter]]


def check_circular(predictions: list[Prediction], expected: dict) -> None:
    known(expected, "correct", "total", "wrong_cycle_indices")
    judge = metric("mmbench")
    units = judge.units(predictions)
    assert (units.columns["right"].sum(), len(units.ids)) == (expected["correct"], expected["total"])
    assert scores(judge, units)["accuracy"] == close(100 * expected["correct"] / expected["total"])
    # The first rotation of each question that is wrong.
    first_wrong = [
        next(one.reference["index"] for one in members if one.choice != one.reference["answer"])
        for members in mmbench.rotations(predictions).values()
        if not mmbench.circular(members)
    ]
    assert sorted(first_wrong) == sorted(expected["wrong_cycle_indices"])


def check_vote(predictions: list[Prediction], expected: list[dict], ties: list[int]) -> None:
    """The original draws between equals without a seed: what it may give lies between losing and winning all draws."""
    questions = mmbench.rotations(predictions)
    tied = {key for key, members in questions.items() if len(mmbench.leaders(members)) > 1}
    assert tied == set(ties)
    surely = sum(mmbench.majority_right(members) for key, members in questions.items() if key not in tied)
    answers = {
        key: members[0].reference["choices"][members[0].reference["answer"]] for key, members in questions.items()
    }
    perhaps = surely + sum(answers[key] in mmbench.leaders(questions[key]) for key in tied)
    for result in expected:
        known(result, "correct", "total", "percent")
        assert result["total"] == len(questions)
        assert surely <= result["correct"] <= perhaps
        assert 100 * result["correct"] / result["total"] == close(result["percent"])
    judge = metric("mmbench", "qwenvl")
    accuracy = scores(judge, judge.units(predictions))["accuracy"]
    if tied:
        assert 100 * surely / len(questions) - TOLERANCE <= accuracy <= 100 * perhaps / len(questions) + TOLERANCE
    else:
        assert accuracy == close(expected[0]["percent"])


def check_mme(golden: dict) -> None:
    expected = golden["expected"]
    known(expected, "perception", "cognition", "task_scores", "task_metrics", "parsed")
    predictions = [
        # Two lines are a picture's, whatever the picture is called.
        Prediction(
            f"{task}/{number}",
            text(line["prediction"]),
            {"task": task, "image": str(number // 2), "answer": line["gt"]},
            {"task": task},
        )
        for task, lines in golden["tasks"].items()
        for number, line in enumerate(lines)
    ]
    judge = metric("mme")
    units = judge.units(predictions)
    found = scores(judge, units)
    assert found["perception"] == close(expected["perception"])
    assert found["cognition"] == close(expected["cognition"])
    assert {task: found[task] for task in golden["tasks"]} == close(expected["task_scores"])
    assert by_group(judge, units, "task") == close(expected["task_scores"])  # of one task the total is its score
    for task in golden["tasks"]:
        members = [one for one in predictions if one.groups["task"] == task]
        answers = [yes_no.first_characters(one.reply) for one in members]
        assert answers == expected["parsed"][task]
        counts = mme.counts(answers, [yes_no.truth(one) for one in members])
        chosen = np.array(units.groups["task"]) == task
        asked, right = units.columns["asked"][chosen].sum(), units.columns["right"][chosen].sum()
        every = {
            "TP": counts.true_yes,
            "FN": counts.missed_yes,
            "TN": counts.true_no,
            "FP": counts.false_yes,
            "precision": counts.precision,
            "recall": counts.recall,
            "other_num": counts.other,
            "acc": right / asked,
            "acc_plus": units.columns["both"][chosen].mean(),
        }
        known(expected["task_metrics"][task], *every)
        assert {name: every[name] for name in expected["task_metrics"][task]} == close(expected["task_metrics"][task])


def check_captions(golden: dict) -> None:
    items, expected = golden["items"], golden["expected"]
    known(
        expected, "ptb_references", "ptb_predictions", "BLEU", "BLEU_per_item", "CIDEr", "CIDEr_per_item", "ROUGE_L",
        "ROUGE_L_per_item",
    )  # fmt: skip
    references, captions = expected["ptb_references"], expected["ptb_predictions"]
    check_tokenised_captions(references, captions, expected)
    assert len(items) == len(captions)


def check_tokenised_captions(references: list[list[str]], captions: list[str], expected: dict) -> None:
    assert ngrams.cider(references, captions) == close(expected["CIDEr_per_item"])
    rouge = [ngrams.rouge_l(*pair) for pair in zip(references, captions, strict=True)]
    assert rouge == close(expected["ROUGE_L_per_item"])
    counts = [ngrams.bleu_counts(*pair) for pair in zip(references, captions, strict=True)]
    for n in (1, 2, 3, 4):
        assert [ngrams.bleu(one, n) for one in counts] == close(expected["BLEU_per_item"][n - 1])
    # The variant that needs no Java takes tokens as they are.
    judge = metric("captions", "vlmevalkit")
    units = judge.units(
        [
            Prediction(str(number), caption, {"references": group})
            for number, (group, caption) in enumerate(zip(references, captions, strict=True))
        ]
    )
    found = {name: value / 100 for name, value in scores(judge, units).items()}
    assert found == close(
        {
            "CIDEr": expected["CIDEr"],
            "ROUGE-L": expected["ROUGE_L"],
            **{f"BLEU-{n}": expected["BLEU"][n - 1] for n in (1, 2, 3, 4)},
        }
    )


CHECKS = {
    "anls": check_anls,
    "captions": check_captions,
    "exact_match_gqa": check_exact_match_gqa,
    "grounding": check_grounding,
    "mmbench": check_mmbench,
    "mme": check_mme,
    "relaxed_accuracy": check_relaxed_accuracy,
    "vqa_accuracy": check_vqa_accuracy,
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_scores_are_those_of_the_published_evaluation(file: Path):
    check = next((CHECKS[name] for name in sorted(CHECKS, key=len, reverse=True) if file.stem.startswith(name)), None)
    assert check is not None, f"{file.name} is no golden of a metric: names begin with {', '.join(CHECKS)}"
    check(json.loads(file.read_text(encoding="utf-8")))


def test_there_are_goldens():
    assert FILES, f"no golden of a metric in {FOLDER}"


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem.startswith("captions")], ids=lambda file: file.stem
)
def test_captions_are_tokenised_like_the_published_evaluation(file: Path, with_java):
    golden = json.loads(file.read_text(encoding="utf-8"))
    found = tokens(
        [strings(item["references"]) for item in golden["items"]],
        [text(item["prediction"]) for item in golden["items"]],
    )
    assert found == (golden["expected"]["ptb_references"], golden["expected"]["ptb_predictions"])
