"""Metrics of short answers: VQA accuracy, ANLS, relaxed accuracy, exact match, OCRBench."""

import pytest

from qwenvl_jax.evaluation.metrics import anls, exact_match, ocrbench, relaxed_accuracy, vqa_accuracy
from qwenvl_jax.evaluation.metrics.registry import metric
from qwenvl_jax.evaluation.task import Prediction


@pytest.mark.parametrize(("equal", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_three_other_people_are_enough(equal, accuracy):
    answers = ["red"] * equal + [f"other {number}" for number in range(10 - equal)]
    assert vqa_accuracy.vqa_accuracy(answers, "red") == pytest.approx(accuracy)


def test_evaluations_normalise_different_sides():
    """The same answers and prediction, as each evaluation sees them."""
    mixed = ["The Dog"] * 9 + ["dog"]
    assert vqa_accuracy.vqa_accuracy(mixed, "dog") == 1  # all of them are "dog"
    assert vqa_accuracy.qwenvl_accuracy(mixed, "dog") == pytest.approx(0.3)  # nine are "The Dog"
    same = ["2"] * 10
    assert vqa_accuracy.vqa_accuracy(same, "two") == 0  # as they are
    assert vqa_accuracy.qwenvl_accuracy(same, "two") == 1
    assert vqa_accuracy.always_normalised(same, "two", vqa_accuracy.normalised) == 1


@pytest.mark.parametrize(
    ("answer", "official", "vlmevalkit"),
    [
        ("3.", "3", "3."),
        ("3.5", "3.5", "3.5"),
        (".5", ".5", ".5"),
        ("U.S.", "us", "us"),
        ("1,000", "1000", "1000"),
        ("a/b", "b", "b"),
        ("dont know", "don't know", "don't know"),
        ("The Two\tdogs\n", "2 dogs", "2 dogs"),
        ("somebodyll", "somebody'll", "somebody'll"),
        ("", "", ""),
    ],
)
def test_normalisation(answer, official, vlmevalkit):
    assert vqa_accuracy.normalised(answer) == official
    assert vqa_accuracy.vlmevalkit_normalised(answer) == vlmevalkit


def test_only_thirty_two_full_stops_go():
    assert vqa_accuracy.without_punctuation("." * 40) == "." * 8


def test_mmf_parts_the_genitive():
    assert vqa_accuracy.mmf_normalised("Joe's, bar?") == "joe 's bar"
    assert vqa_accuracy.normalised("Joe's, bar?") != "joe 's bar"


def test_several_commas_are_a_number_to_lmms_eval():
    assert vqa_accuracy.lmms_eval_normalised("1,,2 a/b") == "12 ab"
    assert vqa_accuracy.normalised("1,,2 a/b") == "1 2 b"


def test_the_textvqa_variant_and_breakdown_by_question_type():
    judge = metric("vqa_accuracy", "textvqa")
    units = judge.units([Prediction("1", "Joe's", {"answers": ["joe 's"] * 10}, {"question_type": "what"})])
    assert units.columns["accuracy"].tolist() == [1.0]
    assert units.groups == {"question_type": ["what"]}


@pytest.mark.parametrize(
    ("answers", "prediction", "similarity"),
    [
        (["abcd"], "abcd", 1.0),
        (["abcd"], "ab", 0.5),  # half is kept
        (["abcd"], "a", 0.0),
        (["zzzz", "abcd"], "abcx", 0.75),
        (["A  b"], "a b", 1.0),
        ([""], "", 1.0),
        (["x"], "", 0.0),
        ([], "x", 0.0),
        (["straße"], "strasse", 1 - 2 / 7),
    ],
)
def test_anls(answers, prediction, similarity):
    assert anls.anls(answers, prediction) == pytest.approx(similarity)


def test_anls_counts_raw_lengths():
    """The distance is that of "a b" to "a c", 1; the length is that of the reply with its blanks, 7."""
    assert anls.anls(["a c"], "a     b") == pytest.approx(1 - 1 / 7)


@pytest.mark.parametrize(
    ("first", "second", "distance"), [("", "", 0), ("a", "", 1), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
)
def test_edit_distance(first, second, distance):
    assert anls.edit_distance(first, second) == anls.edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("target", "prediction", "official", "qwenvl"),
    [
        ("100", "105", True, True),
        ("100", "95", True, False),  # 5 of 95 is more than 5%
        ("100", "105.2", False, True),
        ("0", "0.0", False, False),  # nothing is within 5% of nothing
        ("0", "0", True, True),
        ("0", "0.01", False, False),
        ("12%", "0.12", True, True),
        ("5%%", "0.05", True, True),
        ("nan", "nan", False, False),
        ("inf", "inf", False, False),
        ("Red", "red ", True, True),
        ("", "", True, True),
        ("1_000", "1000", True, True),
        ("1,000", "1000", False, False),
    ],
)
def test_relaxed_accuracy(target, prediction, official, qwenvl):
    assert relaxed_accuracy.relaxed_accuracy([target], prediction) is official
    assert relaxed_accuracy.qwenvl_relaxed_accuracy([target], prediction) is qwenvl


def test_answers_may_be_numbers_and_the_best_counts():
    found = metric("relaxed_accuracy").units([Prediction("1", "41", {"answers": [7, 40.0]})])
    assert found.columns["right"].tolist() == [1.0]


def test_blanks_count_in_lmms_eval():
    assert not relaxed_accuracy.unstripped_relaxed_accuracy(["red"], "red ")


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("It is a red dog.", "red dog"),
        ("the roof of the house", "roof"),
        ("They are on the left, I think", "left"),
        ("this is.", "is"),  # for "this " ends in the word
        ("Yes!", "yes"),
        ("", ""),
        ("the man is the boss", "boss"),
        ("is this is that", "th"),
    ],
)
def test_gqa_cleaning(reply, answer):
    assert exact_match.gqa_answer(reply) == answer


def test_gqa_variants():
    judged = {
        variant: metric("gqa", variant).units([Prediction("1", "The dog.", {"answers": "dog"})]).columns["right"][0]
        for variant in ("official", "qwenvl", "lmms_eval")
    }
    assert judged == {"official": 0, "qwenvl": 1, "lmms_eval": 0}
    assert exact_match.unpunctuated_match(["dog"], "Dog.")


def test_ocrbench():
    assert ocrbench.occurs(["Exit\nNow"], "it says exit now!")
    assert not ocrbench.occurs(["X ^ 2"], "x^2", formula=True)
    assert ocrbench.occurs(["X ^ 2"], "$X^2$", formula=True)
    assert not ocrbench.occurs(["ABC"], "ＡＢＣ")
    assert ocrbench.half_width_occurs(["ABC"], "ＡＢＣ　１")
    assert not ocrbench.half_width_occurs(["ABC"], "ＡＢＣ", formula=True)
    reference = {"answers": ["x"], "type": ocrbench.FORMULAS}
    units = metric("ocrbench").units([Prediction("1", "X", reference), Prediction("2", "x", reference)])
    assert units.columns["right"].tolist() == [0, 1]
