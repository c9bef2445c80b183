"""Records of a preferred and a rejected answer: one prompt with its pictures, and two branches that continue it.

In a row such a record is one document: prompt, chosen answer, rejected answer. Both answers see the prompt and
themselves, and their positions begin where the prompt ends, so that the numbers are those of two conversations of
which the shared part is computed once.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwenvl_jax.data.measure import Measures, Source, measure
from qwenvl_jax.data.problems import Problem
from qwenvl_jax.processing import template
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.template import IGNORED, Segment


def pair_tokens(
    messages: list[dict[str, Any]], rejected_text: str, processor: Processor
) -> tuple[Segment, np.ndarray, np.ndarray, list[Image.Image]]:
    """Tokens of prompt and both answers, their labels and branches int32 [T], and RGB pictures.

    messages: as in `Record`, the chosen answer last. Labels are the answers' tokens with the closing `<|im_end|>` of
    each, and IGNORED in the prompt. Branches are 0 in the prompt, 1 in the chosen answer, 2 in the rejected one. Raises
    UserError as `Processor.training` does.
    """
    prompt, chosen, pictures = processor.answered_tokens(messages)
    rejected = processor.answer_tokens(rejected_text)
    labels = np.array([IGNORED] * len(prompt) + chosen.ids + rejected.ids, np.int32)
    branch = np.repeat(np.arange(3, dtype=np.int32), [len(prompt), len(chosen), len(rejected)])
    return prompt + chosen + rejected, labels, branch, pictures


def measure_pairs(source: Source, processor: Processor, *, cache: Path | None = None, workers: int = 0) -> Measures:
    """`measure` for records of pairs: tokens are those of `pair_tokens`, and none may be cut off.

    A record without a rejected answer is a bad one.
    """
    measures = measure(source, processor, cache=cache, workers=workers)
    tokens, trained, problems = measures.tokens.copy(), measures.trained.copy(), dict(measures.problems)
    between = len(template.newline(processor.tokenizer))  # behind a conversation, but not behind an answer here
    for index in range(len(source)):
        if index in problems:
            continue
        record = source[index]
        if record.rejected is None:
            problem = Problem(record.where, "rejected", "missing", "give the answer that is liked less than the last")
            problems[index], tokens[index] = str(problem), 0
        else:
            rejected = len(processor.answer_tokens(record.rejected))
            tokens[index] += rejected - between
            trained[index] += rejected
    return dataclasses.replace(measures, tokens=tokens, needed=tokens, trained=trained, problems=problems)
