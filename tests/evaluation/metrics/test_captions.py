"""Captions: what goldens do not show, and the Java programs."""

import numpy as np
import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.metrics import captions, java, meteor, ngrams
from qwenvl_jax.evaluation.metrics.registry import metric
from qwenvl_jax.evaluation.task import Prediction

REFERENCES = [["a dog runs on the beach", "the dog is running"], ["two cats sleep"], ["a red bus stops here now"]]
CAPTIONS = ["a dog runs on a beach", "two cats sleep", "the quick fox"]

# What meteor-1.5.jar says of these three, and of "the cat sat on the mats" for "the man sat on a mat".
COUNTS = [
    "6.0 6.0 3.0 3.0 2.0 2.0 2.0 2.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 1.0 1.0 1.0 1.0 1.0 6.0 6.0",
    "3.0 3.0 1.0 1.0 2.0 2.0 1.0 1.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 1.0 3.0 3.0",
    "3.0 6.0 1.0 1.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0",
    "6.0 6.0 3.0 3.0 1.0 1.0 2.0 2.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 2.0 3.0 3.0",
]
ALONE = [0.8666666666666667, 1.0, 0.0, 0.18613968879623477]
TOGETHER = 0.2849455317351583


def predictions() -> list[Prediction]:
    return [
        Prediction(str(number), caption, {"references": references})
        for number, (references, caption) in enumerate(zip(REFERENCES, CAPTIONS, strict=True))
    ]


def test_one_picture_alone_tells_nothing():
    assert ngrams.cider([["a dog"]], ["a dog"]) == [0.0]
    assert ngrams.cider([], []) == []
    assert ngrams.cider([[], ["a dog"]], ["a dog", "a dog"])[0] == 0.0


def test_empty_captions():
    assert ngrams.rouge_l([""], "") == 1.0  # one empty word each, as the package has it
    assert ngrams.rouge_l(["a dog"], "") == 0.0
    assert ngrams.bleu(ngrams.bleu_counts(["a dog"], ""), 4) == pytest.approx(0.0)


def test_bleu_takes_the_nearest_length_the_shorter_of_two():
    counts = ngrams.bleu_counts(["a", "a b c", "a b c d e f"], "a b")
    assert (counts["bleu_words"], counts["bleu_reference"]) == (2, 1)


def test_common_words():
    assert ngrams.common_words([*"abcd"], [*"bxd"]) == 2
    assert ngrams.common_words([], ["a"]) == 0


def test_weights_choose_captions():
    judge = metric("captions", "vlmevalkit")
    units = judge.units(predictions())
    only_cats = {score.name: score.compute(units, np.array([0.0, 1.0, 0.0])) for score in judge.scores}
    assert only_cats["ROUGE-L"] == 100
    assert only_cats["BLEU-3"] == pytest.approx(100)


def test_without_java_there_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no java") as raised:
        metric("captions").units(predictions())
    assert "\n" not in str(raised.value)


def test_without_the_package_there_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "java").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delitem(__import__("sys").modules, "pycocoevalcap", raising=False)
    with pytest.raises(UserError, match=r"pip install 'qwenvl-jax\[eval\]'"):
        java.ptb_tokens(["a dog"])


def test_lines_of_tokens_are_those_of_captions(with_java):
    """Whatever takes a line of its own, and letters of any script; brackets stay, for the list has them in capitals."""
    given = ["", "A dog.", "", "two\nlines\r\nmore\u2028end", "Café, 中文!", " ", '(it\'s) -- 3.5%; "so"', ""]
    assert captions.ptb_tokens(given) == [
        "", "a dog", "", "two lines more end", "café 中文", "", "-lrb- it 's -rrb- 3.5 % so", "",
    ]  # fmt: skip


def test_meteor_is_what_the_program_makes_of_its_counts():
    """Each caption alone, and all together."""
    found = meteor.counts(COUNTS)
    each = [meteor.meteor({name: column[row] for name, column in found.items()}) for row in range(4)]
    assert each == pytest.approx(ALONE, abs=1e-12)
    assert meteor.meteor({name: column.sum() for name, column in found.items()}) == pytest.approx(TOGETHER, abs=1e-12)


@pytest.mark.long
def test_the_variant_with_meteor(with_java):
    """The program gives the counts above; starting it takes some seconds."""
    judge = metric("captions", "official_meteor")
    units = judge.units([*predictions(), Prediction("x", "a dog", {"references": ["a dog"]}, error="no")])
    assert judge.scores[-1].name == "METEOR"
    for row in range(3):
        assert judge.scores[-1].compute(units, np.eye(4)[row]) == pytest.approx(100 * ALONE[row])
    assert judge.scores[-1].compute(units, np.eye(4)[3]) == 0
