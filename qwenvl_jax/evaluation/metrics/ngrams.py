"""BLEU, ROUGE-L and CIDEr of captions that are tokens already, with blanks between: numbers per caption.

The scores of COCO's caption evaluation (Chen et al. 2015), whose arithmetic this is, written out here because a score
of weighted captions needs counts where the package returns sums. Tokenizing is in `java.py`.
"""

import collections
import math
from collections.abc import Mapping, Sequence

import numpy as np

LONGEST = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of CIDEr's length penalty
BETA = 1.2  # recall's weight over precision in ROUGE-L
SMALL, TINY = 1e-9, 1e-15  # keep BLEU from dividing by 0
BLEU_COLUMNS = ("bleu_words", "bleu_reference", *(f"bleu_{kind}_{n}" for kind in ("right", "of") for n in range(1, 5)))

Counts = collections.Counter[tuple[str, ...]]


def ngrams(caption: str) -> Counts:
    """How often each run of one to four words occurs."""
    words = caption.split()
    return collections.Counter(
        tuple(words[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(words) - n + 1)
    )


def bleu_counts(references: Sequence[str], caption: str) -> dict[str, float]:
    """What BLEU adds up: words of the caption and of the reference of nearest length, n-grams that occur and all."""
    words, found = len(caption.split()), ngrams(caption)
    lengths = [len(reference.split()) for reference in references]
    allowed: Counts = collections.Counter()
    for reference in references:
        allowed |= ngrams(reference)
    right = [0] * LONGEST
    for ngram, count in found.items():
        right[len(ngram) - 1] += min(count, allowed[ngram])
    nearest = min(((abs(length - words), length) for length in lengths), default=(0, 0))[1]
    return dict(zip(BLEU_COLUMNS, (words, nearest, *right, *(max(0, words - n) for n in range(LONGEST))), strict=True))


def bleu(counts: Mapping[str, float], n: int) -> float:
    """BLEU-n of counts, those of one caption or the sums of many."""
    product = 1.0
    for k in range(1, n + 1):
        product *= (counts[f"bleu_right_{k}"] + TINY) / (counts[f"bleu_of_{k}"] + SMALL)
    ratio = (counts["bleu_words"] + TINY) / (counts["bleu_reference"] + SMALL)
    return product ** (1 / n) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def common_words(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        previous = row
        row = [0]
        for place, other in enumerate(second, 1):
            row.append(previous[place - 1] + 1 if word == other else max(previous[place], row[-1]))
    return row[-1]


def rouge_l(references: Sequence[str], caption: str) -> float:
    """The F-measure of the longest common subsequence, precision and recall each that of the best reference."""
    words = caption.split(" ")  # not split(): an empty caption is one empty word
    precision = recall = 0.0
    for reference in references:
        others = reference.split(" ")
        common = common_words(words, others)
        precision, recall = max(precision, common / len(words)), max(recall, common / len(others))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def cider(references: Sequence[Sequence[str]], captions: Sequence[str]) -> list[float]:
    """CIDEr of each caption against its references, times 10 as the package has it.

    How much an n-gram tells comes from the pictures of this very set: from one picture alone nothing does, and all is
    0. The package's form is CIDEr-D's: no stemming, n-grams count as often as the reference has them, and other
    lengths, counted in pairs of words, are penalised.
    """
    counted = [[ngrams(reference) for reference in group] for group in references]
    pictures = collections.Counter(ngram for group in counted for ngram in set().union(*group))
    everywhere = math.log(max(1, len(references)))

    def vector(counts: Counts) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * (everywhere - math.log(max(1, pictures[ngram])))
        norms = [math.sqrt(sum(weight**2 for weight in part.values())) for part in weights]
        return weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    scores = []
    for group, caption in zip(counted, captions, strict=True):
        mine, my_norms, my_length = vector(ngrams(caption))
        total = 0.0
        for reference in group:
            theirs, their_norms, their_length = vector(reference)
            penalty = math.exp(-((my_length - their_length) ** 2) / (2 * SIGMA**2))
            for n in range(LONGEST):
                shared = sum(
                    min(weight, theirs[n][ngram]) * theirs[n][ngram]
                    for ngram, weight in mine[n].items()
                    if ngram in theirs[n]
                )
                norm = my_norms[n] * their_norms[n]
                total += penalty * (shared / norm if norm else shared)
        scores.append(10 * total / LONGEST / len(group) if group else 0.0)
    return scores


def columns(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, np.ndarray]:
    """All of the above by the names of columns."""
    pairs = list(zip(references, captions, strict=True))
    counts = [bleu_counts(*pair) for pair in pairs]
    table = {
        "cider": cider(references, captions),
        "rouge_l": [rouge_l(*pair) for pair in pairs],
        **{name: [row[name] for row in counts] for name in BLEU_COLUMNS},
    }
    return {name: np.array(values, np.float64) for name, values in table.items()}
