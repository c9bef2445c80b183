"""Sampling options against transformers' logits processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwenvl_jax.inference.sampling import SamplingOptions, candidates, controls, penalised, sample

VOCABULARY = 60
PROMPT, REPLY = [3, 3, 17, 40], [5, 5, 17, 59]

OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.7},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1},
]


def theirs(logits: np.ndarray, options: dict) -> np.ndarray:
    """Processed logits [B, V] in the order in which `generate` applies them."""
    steps = LogitsProcessorList()
    if "repetition_penalty" in options:
        steps.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    steps.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        steps.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        steps.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        steps.append(MinPLogitsWarper(options["min_p"]))
    ids = torch.tensor([PROMPT + REPLY] * len(logits))
    return steps(ids, torch.from_numpy(logits.copy())).numpy()


def history(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """in_prompt bool [B, V], counts int32 [B, V]."""
    in_prompt = np.zeros((rows, VOCABULARY), bool)
    in_prompt[:, PROMPT] = True
    counts = np.tile(np.bincount(REPLY, minlength=VOCABULARY).astype(np.int32), (rows, 1))
    return in_prompt, counts


@jax.jit
def ours(logits, options, in_prompt, counts):
    return candidates(penalised(logits, options, in_prompt, counts), options)


def random_logits(rows: int, seed: int) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((rows, VOCABULARY))).astype(np.float32)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{key}_{value}" for key, value in o.items()))
def test_processed_logits(options):
    """The same tokens are left, with the same logits, for 50 rows."""
    logits = random_logits(50, seed=len(options))
    mine = np.asarray(ours(logits, controls([SamplingOptions(**options)] * 50, (), VOCABULARY), *history(50)))
    expected = theirs(logits, options)
    np.testing.assert_array_equal(np.isfinite(mine), np.isfinite(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(mine[finite], expected[finite], rtol=1e-6)


def test_rows_with_different_options():
    """A batch gives each row what it gets alone."""
    logits = random_logits(len(OPTIONS), seed=7)
    batch = controls([SamplingOptions(**options) for options in OPTIONS], (), VOCABULARY)
    mine = np.asarray(ours(logits, batch, *history(len(OPTIONS))))
    for row, options in enumerate(OPTIONS):
        expected = theirs(logits[row : row + 1], options)[0]
        np.testing.assert_array_equal(np.isfinite(mine[row]), np.isfinite(expected), err_msg=str(options))


def test_draws_have_the_distribution_of_the_processed_logits():
    draws, options = 20000, OPTIONS[-1]
    logits = random_logits(1, seed=3)
    probabilities = torch.softmax(torch.from_numpy(theirs(logits, options)), dim=-1).numpy()[0]
    rows = controls([SamplingOptions(**options, seed=seed) for seed in range(draws)], (), VOCABULARY)
    tokens = jax.jit(sample)(np.tile(logits, (draws, 1)), rows, *history(draws), np.zeros(draws, np.int32))
    frequencies = np.bincount(np.asarray(tokens), minlength=VOCABULARY) / draws
    assert frequencies[probabilities == 0].sum() == 0
    # Five standard deviations of a binomial share.
    assert (np.abs(frequencies - probabilities) <= 5 * np.sqrt(probabilities / draws)).all()


@pytest.mark.parametrize("generated", [0, 2, 3, 4])
def test_min_new_tokens(generated):
    """Stop tokens cannot be chosen before the reply has three tokens."""
    logits = random_logits(40, seed=5)
    stops = [2, 11, *np.argmax(logits[:20], axis=-1).tolist()]
    rule = MinNewTokensLengthLogitsProcessor(len(PROMPT), 3, stops)
    ids = torch.tensor([PROMPT + [1] * generated] * 40)
    expected = rule(ids, torch.from_numpy(logits.copy())).argmax(-1).numpy()
    rows = controls([SamplingOptions(min_new_tokens=3)] * 40, stops, VOCABULARY)
    unused = np.zeros(logits.shape, np.int32)
    mine = sample(jnp.asarray(logits), rows, unused > 0, unused, np.full(40, generated, np.int32))
    np.testing.assert_array_equal(mine, expected)
