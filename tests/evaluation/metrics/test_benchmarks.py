"""Metrics of benchmarks with choices, with yes and no, and with a judge."""

import random

import numpy as np
import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.data.questions import Question
from qwenvl_jax.evaluation.metrics import choices, mathvista, mmbench, mmmu, scenes, touchstone, yes_no
from qwenvl_jax.evaluation.metrics.registry import metric
from qwenvl_jax.evaluation.task import Prediction

OPTIONS = ["red", "green", "blue", "a dog"]


def scores(name: str, predictions: list[Prediction], variant: str = "official") -> dict[str, float]:
    judge = metric(name, variant)
    units = judge.units(predictions)
    return {score.name: score.compute(units, np.ones(len(units.ids))) for score in judge.scores}


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("B", 1),
        ("(B)", 1),
        ("B. green", 1),
        ("The answer is B.", 1),
        ("A or B", None),
        ("it is green", 1),
        ("red or green", None),
        ("A man stands near the house", None),  # an article, too far from the end
        ("The correct answer is **C**. Here is why: A is wrong and many more words", 2),
        ("Z", None),
        ("Cannot determine the answer, B", None),
        ("", None),
        ("E", None),
        ("a dog", 3),
        ("B one two three", 1),
        ("B one two three four", None),
        ("green" + "!" * 29, 1),
        ("green" + "!" * 30, None),  # longer than twice all choices
    ],
)
def test_the_choice_of_a_reply(reply, choice):
    assert choices.choice_of(reply, OPTIONS) == choice


def test_likelihood_goes_before_the_reply():
    reference = {"answer": 2, "choices": OPTIONS}
    made = [Prediction("1", "A", reference, choice=2), Prediction("2", "C", reference), Prediction("3", "A", reference)]
    assert scores("choice_accuracy", made)["accuracy"] == pytest.approx(200 / 3)


def test_realworldqa():
    made = [
        Prediction("1", "B.", {"answer": "B", "choices": ["left", "right"]}),
        Prediction("2", " Three. ", {"answer": "three", "choices": []}),
        Prediction("3", "3", {"answer": "three", "choices": []}),
    ]
    assert scores("realworldqa", made)["accuracy"] == pytest.approx(200 / 3)
    with pytest.raises(UserError, match="must be a letter, not 'right'"):
        scores("realworldqa", [Prediction("1", "B.", {"answer": "right", "choices": ["left", "right"]})])


def rotation(question: int, turn: int, choice: int | None, right: str = "a") -> Prediction:
    texts = ["a", "b", "c"]
    turned = texts[turn:] + texts[:turn]
    reference = {"index": turn * mmbench.ROTATION + question, "answer": turned.index(right), "choices": turned}
    return Prediction(f"{question}/{turn}", "", reference, {"category": "OCR"}, choice=choice)


def test_mmbench():
    """Question 1 is right twice of three times, question 2 always, question 3 never but in the first rotation."""
    made = [
        *(rotation(1, turn, choice) for turn, choice in enumerate((0, 2, 0))),
        *(rotation(2, turn, (0, 2, 1)[turn]) for turn in (2, 0, 1)),
        *(rotation(3, turn, choice) for turn, choice in enumerate((0, 0, 2))),
    ]
    assert scores("mmbench", made)["accuracy"] == pytest.approx(100 / 3)
    assert scores("mmbench", made, "vanilla")["accuracy"] == 100
    assert scores("mmbench", made, "qwenvl")["accuracy"] == pytest.approx(200 / 3)
    units = metric("mmbench").units(made)
    assert units.ids == [("1/0", "1/1", "1/2"), ("2/0", "2/1", "2/2"), ("3/0", "3/1", "3/2")]
    assert units.groups == {"category": ["OCR"] * 3}


def test_mmbench_ties_are_drawn_by_the_question():
    tied = [[rotation(question, 0, 0), rotation(question, 1, 0)] for question in range(40)]  # "a" and "b"
    assert all(mmbench.leaders(members) == ["a", "b"] for members in tied)
    drawn = [mmbench.majority(members) for members in tied]
    assert drawn == [mmbench.majority(members) for members in tied]
    assert set(drawn) == {"a", "b"}
    assert drawn != [mmbench.majority(members, seed=1) for members in tied]


def test_mmbench_submission():
    made = [rotation(1, turn, choice) for turn, choice in enumerate((0, 2, 0))] + [rotation(2, 0, None)]
    assert mmbench.submission_rows(made) == [
        {"index": 1, "prediction": "A"},
        {"index": 1_000_001, "prediction": "C"},
        {"index": 2_000_001, "prediction": "B"},
        {"index": 2, "prediction": "Z"},
    ]
    assert [row["prediction"] for row in mmbench.submission_rows(made, vote=False)] == ["A", "C", "A", "Z"]


def test_seed_bench_is_of_pictures_and_videos():
    made = [
        Prediction("1", "", {"answer": 0, "choices": OPTIONS, "type": 1}, choice=0),
        Prediction("2", "", {"answer": 0, "choices": OPTIONS, "type": 9}, choice=1),
        Prediction("3", "", {"answer": 0, "choices": OPTIONS, "type": 10}, choice=0),
    ]
    found = scores("seed_bench", made)
    assert found == pytest.approx({"accuracy": 200 / 3, "image accuracy": 50, "video accuracy": 100})
    assert np.isnan(scores("seed_bench", made[:2])["video accuracy"])
    with pytest.raises(UserError, match="'type' of its reference must be a whole number, not 'x'"):
        scores("seed_bench", [Prediction("1", "", {"answer": 0, "choices": OPTIONS, "type": "x"}, choice=0)])


@pytest.mark.parametrize(
    ("reply", "mme", "lmms_eval", "vlmevalkit", "pope", "whole"),
    [
        ("Yes", "yes", "yes", "yes", "yes", "yes"),
        ("  Yes", "other", "yes", "yes", "yes", "yes"),
        ("No, it is not. Yes", "no", "no", "other", "no", "other"),
        ("Nope", "no", "no", "other", "yes", "other"),
        ("y", "other", "yes", "other", "yes", "other"),
        ("I think yes.", "other", "other", "yes", "yes", "other"),
        ("", "other", "other", "other", "yes", "other"),
        ("There is no dog", "other", "other", "no", "no", "other"),
        ("NO", "no", "no", "no", "yes", "no"),
    ],
)
def test_yes_or_no(reply, mme, lmms_eval, vlmevalkit, pope, whole):
    assert yes_no.first_characters(reply) == mme
    assert yes_no.first_characters_or_letter(reply) == lmms_eval
    assert yes_no.only_word(reply) == vlmevalkit
    assert yes_no.yes_unless_denied(reply) == pope
    assert yes_no.whole_reply(reply) == whole


def line(task: str, image: str, answer: str, reply: str) -> Prediction:
    return Prediction(f"{task}/{image}/{answer}", reply, {"task": task, "image": image, "answer": answer})


def test_mme():
    made = [
        line("count", "1", "Yes", "Yes"),
        line("count", "1", "No", "No"),
        line("count", "2", "Yes", "Yes"),
        line("count", "2", "No", "Yes"),
        line("code_reasoning", "1", "Yes", "Yes"),  # the picture's second question was not asked
    ]
    found = scores("mme", made)
    assert (found["count"], found["perception"]) == (75 + 50, 125)
    assert (found["code_reasoning"], found["cognition"], found["total"]) == (100, 100, 225)
    assert np.isnan(found["OCR"])
    with pytest.raises(UserError, match="MME has no task 'counts'"):
        scores("mme", [line("counts", "1", "Yes", "Yes")])
    with pytest.raises(UserError, match="must be yes or no, not 'maybe'"):
        scores("mme", [line("count", "1", "maybe", "Yes")])


def test_pope():
    made = [
        Prediction(str(number), reply, {"answer": answer})
        for number, (answer, reply) in enumerate(
            [("yes", "Yes"), ("yes", "No"), ("no", "Yes"), ("no", "No"), ("no", "no.")]
        )
    ]
    assert scores("pope", made) == pytest.approx(
        {"accuracy": 60, "F1": 50, "precision": 50, "recall": 50, "yes ratio": 40}
    )
    # An evasive reply is a yes to POPE, a no to VLMEvalKit, and to lmms-eval neither.
    made = [Prediction(text, text, {"answer": "yes"}) for text in ("Maybe", "Yes", "No")]
    recalls = {variant: scores("pope", made, variant)["recall"] for variant in ("official", "vlmevalkit", "lmms_eval")}
    assert recalls == pytest.approx({"official": 200 / 3, "vlmevalkit": 100 / 3, "lmms_eval": 50})
    never = [Prediction("1", "no", {"answer": "yes"})]
    assert scores("pope", never) == {"accuracy": 0, "F1": 0, "precision": 0, "recall": 0, "yes ratio": 0}


def hallusion(category: str, figure: int, question: int, reply: str) -> Prediction:
    reference = {"answer": "1", "category": category, "subcategory": "chart", "set_id": 0}
    return Prediction(
        f"{category}{figure}{question}", reply, {**reference, "figure_id": figure, "question_id": question}
    )


def test_hallusionbench():
    made = [
        hallusion("VS", 0, 0, "no"),
        hallusion("VS", 1, 0, "yes"),
        hallusion("VS", 1, 1, "yes"),
        hallusion("VD", 0, 0, "yes"),
        hallusion("VD", 1, 0, "Yes and no"),
    ]
    found = scores("hallusionbench", made)
    assert found["aAcc"] == 60
    assert found["fAcc"] == pytest.approx(200 / 3)  # VS 1, VD 0 and VD 1; VS 0 is no figure
    assert found["qAcc"] == pytest.approx(100 / 3)  # only the second of VS is right with each figure
    assert found["average"] == pytest.approx((60 + 200 / 3 + 100 / 3) / 3)
    assert scores("hallusionbench", made, "vlmevalkit")["fAcc"] == 50


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("(B)", "B"),
        ("(A) is wrong, (C) is right", "C"),
        ("B.", "B"),
        ("I say A or B", "B"),
        ("I say A or B or A", "A"),
        ("say that it is green", "D"),  # five words are too few; drawn
        ("The colour that I can see there is green", "B"),
        ("First green, and then, in the end, clearly red", "A"),
    ],
)
def test_mmmu_letters(reply, letter):
    assert mmmu.parse_choice(reply, OPTIONS, random.Random(0)) == letter


def test_mmmu_draws_what_it_cannot_find_with_the_official_seed():
    reference = {"question_type": "multiple-choice", "answer": "A", "choices": OPTIONS}
    made = [Prediction(str(number), "?", reference) for number in range(30)]
    rng = random.Random(42)
    expected = [rng.choice("ABCD") == "A" for _ in range(30)]
    assert metric("mmmu").units(made).columns["right"].tolist() == expected
    assert not metric("mmmu", "vlmevalkit").units(made).columns["right"].any()


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        ("3.14", "So the result is 3.141", True),
        ("1000", "the total = 1,000", True),
        ("apple", "It is an apple pie.", True),
        ("apple", "It is a pear", False),
        (["4", "four"], "Therefore four", True),
        ("a", "apple", False),  # a single letter must have a blank beside it
        ("x", "take x or y", True),
        ("", "anything", True),  # the empty text is in every text
    ],
)
def test_mmmu_open_questions(answer, reply, right):
    made = [Prediction("1", reply, {"question_type": "open", "answer": answer, "choices": []})]
    assert metric("mmmu").units(made).columns["right"].tolist() == [right]


def test_mmmu_open_questions_have_two_choices_in_vlmevalkit():
    reference = {"question_type": "open", "answer": "7", "choices": []}
    made = [Prediction("1", "A", reference), Prediction("2", "7", reference), Prediction("3", "B", reference)]
    assert metric("mmmu", "vlmevalkit").units(made).columns["right"].tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("reply", "kind", "extraction"),
    [
        ("12", ("free_form", "integer"), "12"),
        ("There are 3 cats and 1,204 dogs.", ("free_form", "integer"), "1204"),
        ("about -.5 m", ("free_form", "float"), "-.5"),
        ('The answer is "7".', ("free_form", "integer"), "7"),
        ("between [2007, 2008] I think", ("free_form", "list"), "[2007, 2008]"),
        ("red", ("multi_choice", "text"), "red"),
        ("Well, I would say (C), which it is", ("multi_choice", "text"), "C"),
        ("no idea", ("multi_choice", "text"), ""),
        ("none", ("free_form", "integer"), ""),
    ],
)
def test_mathvista_extraction(reply, kind, extraction):
    assert mathvista.extract(reply, *kind, OPTIONS) == extraction


@pytest.mark.parametrize(
    ("extraction", "kind", "normalised"),
    [
        ("(B) green", ("multi_choice", "text"), "green"),
        ("(b), not (C)", ("multi_choice", "text"), "green"),
        ("B", ("multi_choice", "text"), "green"),
        ("gren", ("multi_choice", "text"), "green"),
        ("", ("multi_choice", "text"), None),
        ("3.7", ("free_form", "integer"), "3"),
        ("1.25", ("free_form", "float"), "1.2"),
        ("inf", ("free_form", "integer"), None),
        ("many", ("free_form", "float"), None),
        ("[1, 2]", ("free_form", "list"), "[1, 2]"),
    ],
)
def test_mathvista_normalisation(extraction, kind, normalised):
    assert mathvista.normalised(extraction, *kind, OPTIONS, precision=1.0) == normalised


def test_mathvista_takes_a_judges_extraction():
    reference = {"question_type": "free_form", "answer_type": "integer", "precision": None, "answer": "7"}
    made = Prediction("1", "It is 7, not 8", {**reference, "choices": None})
    assert scores("mathvista", [made])["accuracy"] == 0
    judged = Prediction("1", made.reply, {**made.reference, "extraction": "7"})
    assert scores("mathvista", [judged])["accuracy"] == 100


@pytest.mark.parametrize(
    ("judgement", "found"),
    [
        ("8 9", (8, 9)),
        (" 7.5 10 \nBecause ...", (7.5, 10)),
        ("8, 9", None),
        ("8 9 10", None),
        ("Assistant 1 is better", None),
        ("", None),
        (None, None),
    ],
)
def test_touchstone_judgements(judgement, found):
    assert touchstone.scores_of(judgement) == found


def test_touchstone():
    made = [
        Prediction("1", "x", {"judgements": ["10 6", "8 9"]}),
        Prediction("2", "x", {"judgements": ["10 4", "cannot say"]}),
        Prediction("3", "x", {"judgements": [None, None]}),
    ]
    found = scores("touchstone", made)
    assert found == pytest.approx({"score": 100 * (6 + 8 + 4) / 3, "reference answer": 100 * 29 / 3, "judged": 50})
    with pytest.raises(UserError, match="list of two replies"):
        scores("touchstone", [Prediction("1", "x", {"judgements": "8 9"})])


def test_scenes_read_boxes_in_either_form():
    question = Question("ground", "Where?", "there", "zh", {"box": [10, 10, 20, 20]}, held_out="pair")
    reference = dict(question.__dict__)
    made = [
        Prediction("1", "<box>(100,100),(200,200)</box>", {**reference, "width": 100, "height": 100}),
        Prediction("2", "there", {**reference, "boxes": [[10, 10, 20, 21]]}),
        Prediction("3", "<box>(100,100),(200,200)</box>", reference),
    ]
    assert scenes.boxes_of(made[0]) == [[10, 10, 20, 20]]
    assert scenes.boxes_of(made[1]) == [[10, 10, 20, 21]]
    units = metric("scenes").units(made)
    assert units.columns["right"].tolist() == [1, 1, 0]
    assert units.groups == {"kind": ["ground"] * 3, "language": ["zh"] * 3, "held_out": ["pair"] * 3}
