"""Captions: CIDEr, BLEU, ROUGE-L and METEOR against what people wrote (Flickr30K, NoCaps, COCO).

reference: {"references": [str, ...]}. Reads the reply. Usual group: domain (NoCaps).

Percentages, as papers give them, so CIDEr may go to 1000. CIDEr weighs words by how many pictures of this very set
have them: a part of a test set has other numbers than the same predictions among all, and breakdowns by group keep the
weights of all.

official: pycocoevalcap's tokens, which a Java program makes (`java.py`). qwenvl: the same.
official_meteor: METEOR as well, another Java program that needs 2 GB and some seconds to start.
vlmevalkit: captions are parted at blanks alone, so case and punctuation count: tens of points less.

Not here: SPICE, whose Stanford models are no part of pycocoevalcap.
"""

from collections.abc import Callable, Sequence

import numpy as np

from qwenvl_jax.evaluation.metrics import meteor, ngrams
from qwenvl_jax.evaluation.metrics.java import ptb_tokens
from qwenvl_jax.evaluation.metrics.metric import Metric, Score, Units, mean
from qwenvl_jax.evaluation.metrics.reading import labels, texts
from qwenvl_jax.evaluation.task import Prediction

Tokenizer = Callable[[Sequence[str]], list[str]]


def as_they_are(captions: Sequence[str]) -> list[str]:
    """Captions as tokens without a tokenizer."""
    return list(captions)


def tokens(
    references: Sequence[Sequence[str]], captions: Sequence[str], tokenize: Tokenizer = ptb_tokens
) -> tuple[list[list[str]], list[str]]:
    """References of each picture and captions, tokenised in one go."""
    flat = iter(tokenize([*(reference for group in references for reference in group), *captions]))
    return [[next(flat) for _ in group] for group in references], list(flat)


def _units(tokenize: Tokenizer, with_meteor: bool = False) -> Callable[[Sequence[Prediction]], Units]:
    def units(predictions: Sequence[Prediction]) -> Units:
        references, captions = tokens(
            [texts(prediction, "references") for prediction in predictions],
            ["" if prediction.error is not None else prediction.reply for prediction in predictions],
            tokenize,
        )
        columns = ngrams.columns(references, captions)
        if with_meteor:
            columns |= meteor.columns(references, captions)
        for name in ("cider", "rouge_l"):  # which an empty caption does not lose to an empty reference
            columns[name][[prediction.error is not None for prediction in predictions]] = 0.0
        return Units([(prediction.id,) for prediction in predictions], columns, labels(predictions))

    return units


def _of_sums(score: Callable[[dict[str, float]], float]) -> Callable[[Units, np.ndarray], float]:
    """A score of the weighted sums of all columns."""

    def compute(units: Units, weights: np.ndarray) -> float:
        if not weights.sum():
            return float("nan")
        return 100 * score({name: float(weights @ column) for name, column in units.columns.items()})

    return compute


def _bleu(n: int) -> Score:
    return Score(f"BLEU-{n}", _of_sums(lambda sums: ngrams.bleu(sums, n)))


SCORES = (
    Score("CIDEr", mean("cider"), 1000),
    *(_bleu(n) for n in (1, 2, 3, 4)),
    Score("ROUGE-L", mean("rouge_l")),
)
VARIANTS = {
    "official": Metric("captions", "official", _units(ptb_tokens), SCORES),
    "qwenvl": Metric("captions", "qwenvl", _units(ptb_tokens), SCORES),
    "official_meteor": Metric(
        "captions",
        "official_meteor",
        _units(ptb_tokens, with_meteor=True),
        (*SCORES, Score("METEOR", _of_sums(meteor.meteor))),
        "with METEOR",
    ),
    "vlmevalkit": Metric(
        "captions", "vlmevalkit", _units(as_they_are), SCORES, "parted at blanks alone: case and punctuation count"
    ),
}
