"""METEOR of captions (Denkowski and Lavie 2014), whose matching of stems, synonyms and paraphrases is a Java program.

The program gives 23 counts per caption; what it makes of them, alone or summed, is computed here, as a score of
weighted captions needs it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from qwenvl_jax.evaluation.metrics.java import METEOR, run

# Version 1.5, English: recall's weight, the penalty's exponent and weight, the weight of content words; and that of a
# match by the very word, by stem, by synonym, by paraphrase.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MATCHES = np.array([1.0, 0.6, 0.8, 0.6])
COLUMNS = (
    "meteor_matches", "meteor_reference_matches", "meteor_length", "meteor_reference_length", "meteor_chunks",
    "meteor_words",
)  # fmt: skip


def columns(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, np.ndarray]:
    """What METEOR adds up, of tokenised captions each against its best reference."""
    lines = [
        " ||| ".join(("SCORE", *group, caption.replace("|||", "").replace("  ", " ")))
        for group, caption in zip(references, captions, strict=True)
    ]
    arguments = ("-Xmx2G", "-jar", "JAR", "-", "-", "-stdio", "-l", "en", "-norm")  # the table of paraphrases is large
    return counts(run(METEOR, arguments, lines)[: len(lines)] if lines else [])


def counts(lines: Sequence[str]) -> dict[str, np.ndarray]:
    """What METEOR adds up, of the program's lines of 23 numbers, one for each caption."""
    table = np.array([[float(value) for value in line.split()] for line in lines]).reshape(-1, 23)
    lengths, functions, stages = table[:, 0:2], table[:, 2:4], table[:, 4:20].reshape(-1, 4, 4)
    content, function = stages[:, :, 0:2], stages[:, :, 2:4]  # each of the caption and of the reference
    matches = np.einsum("m,nmk->nk", MATCHES, DELTA * content + (1 - DELTA) * function)
    weighted = DELTA * (lengths - functions) + (1 - DELTA) * functions
    chunks, words = table[:, 20], table[:, 21:23]
    whole = (chunks == 1) & (words == lengths).all(axis=1)  # the caption is the reference: nothing is out of order
    parts = (matches[:, 0], matches[:, 1], weighted[:, 0], weighted[:, 1], chunks - whole, words.mean(axis=1))
    return dict(zip(COLUMNS, parts, strict=True))


def meteor(sums: Mapping[str, float]) -> float:
    """METEOR of counts, those of one caption or the sums of many."""
    matches, reference_matches, length, reference_length, chunks, words = (sums[name] for name in COLUMNS)
    if not matches or not reference_matches:
        return 0.0
    precision, recall = matches / length, reference_matches / reference_length
    mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
    return max(0.0, mean * (1 - GAMMA * (chunks / words) ** BETA))
