import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TESTS

from qwenvl_jax.config import UserError
from qwenvl_jax.inference.sampling import SamplingOptions, candidates, controls, penalised, sample

FOLDER = TESTS / "golden" / "fixtures"
TOP_P = [
    key.removesuffix("/ids") for key in np.load(FOLDER / "e2e.npz").files if "/topp_" in key and key.endswith("ids")
]


def numpy_candidates(logits: np.ndarray, option: SamplingOptions) -> np.ndarray:
    """Which tokens are left, by sorting; float64 [V]."""
    logits = logits.astype(np.float64) / option.temperature
    order = np.argsort(-logits)
    if option.top_k:
        order = order[: option.top_k]
    probabilities = np.exp(logits[order] - logits[order[0]])
    probabilities /= probabilities.sum()
    if option.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        order = order[before < option.top_p]
        probabilities = probabilities[: len(order)]
    order = order[probabilities >= option.min_p * probabilities[0]]
    kept = np.zeros(len(logits), bool)
    kept[order] = True
    return kept


def draw(logits: np.ndarray, options: list[SamplingOptions], **changes) -> np.ndarray:
    """One token per row, with an empty prompt and reply unless `changes` says otherwise."""
    rows, vocabulary = logits.shape
    state = {
        "in_prompt": np.zeros((rows, vocabulary), bool),
        "counts": np.zeros((rows, vocabulary), np.int32),
        "generated": np.zeros(rows, np.int32),
    } | changes
    return np.asarray(jax.jit(sample)(logits, controls(options, [], vocabulary), **state))


@pytest.mark.parametrize("key", TOP_P)
def test_top_p_keeps_the_tokens_of_the_original(key):
    with np.load(FOLDER / "e2e.npz") as values:
        case, numbers = key.split("/topp_")
        temperature, top_p = (float(number[1:]) for number in numbers.split("_"))
        logits = values[f"{case}/logits"][-1:]
        option = SamplingOptions(temperature=temperature, top_p=top_p)
        kept = np.asarray(candidates(logits, controls([option], [], logits.shape[1])))[0]
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(kept)), np.sort(values[f"{key}/ids"]))
        probabilities = np.asarray(jax.nn.softmax(kept))
        np.testing.assert_allclose(probabilities[values[f"{key}/ids"]], values[f"{key}/probs"], atol=1e-4, rtol=0)


def test_candidates_are_those_that_sorting_finds():
    random = np.random.default_rng(0)
    logits = random.normal(scale=3, size=(64, 300)).astype(np.float32)
    options = [
        SamplingOptions(
            temperature=random.uniform(0.1, 2),
            top_p=random.choice([1.0, random.uniform(0.05, 1)]),
            top_k=int(random.choice([0, 1, random.integers(1, 300), 1000])),
            min_p=random.choice([0.0, random.uniform(0, 0.3)]),
        )
        for _ in logits
    ]
    kept = np.isfinite(candidates(logits, controls(options, [], 300)))
    expected = [numpy_candidates(row, option) for row, option in zip(logits, options, strict=True)]
    np.testing.assert_array_equal(kept, expected)


def test_penalties_follow_their_definitions():
    random = np.random.default_rng(1)
    logits = random.normal(scale=3, size=(3, 50)).astype(np.float32)
    in_prompt = random.random((3, 50)) < 0.3
    counts = random.integers(0, 3, (3, 50)).astype(np.int32)
    options = [
        SamplingOptions(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.25),
        SamplingOptions(repetition_penalty=0.8),
        SamplingOptions(),
    ]
    result = np.asarray(penalised(logits, controls(options, [], 50), in_prompt, counts))
    for row, option in enumerate(options):
        expected = logits[row].astype(np.float64)
        for token in range(50):
            if in_prompt[row, token] or counts[row, token]:
                positive = expected[token] > 0
                expected[token] *= 1 / option.repetition_penalty if positive else option.repetition_penalty
            expected[token] -= option.frequency_penalty * counts[row, token]
            expected[token] -= option.presence_penalty * (counts[row, token] > 0)
        np.testing.assert_allclose(result[row], expected, rtol=1e-6, atol=1e-6)


def test_penalties_reach_the_choice():
    logits = np.array([[3.0, 2.9, 0.0]], np.float32)
    counts = np.array([[1, 0, 0]], np.int32)
    assert draw(logits, [SamplingOptions()], counts=counts) == [0]
    assert draw(logits, [SamplingOptions(presence_penalty=0.2)], counts=counts) == [1]
    assert draw(logits, [SamplingOptions(repetition_penalty=1.1)], in_prompt=counts > 0) == [1]


def test_draws_have_the_probabilities_of_the_logits():
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    logits = np.tile(np.log(probabilities).astype(np.float32), (4000, 1))
    tokens = draw(logits, [SamplingOptions(temperature=1.0, seed=seed) for seed in range(4000)])
    share = np.bincount(tokens, minlength=4) / 4000
    spread = np.sqrt(probabilities * (1 - probabilities) / 4000)
    assert (np.abs(share - probabilities) < 4 * spread).all(), share


def test_a_draw_depends_on_seed_and_number_alone():
    random = np.random.default_rng(2)
    logits = random.normal(size=(6, 100)).astype(np.float32)
    options = [SamplingOptions(temperature=1.5, seed=2**40 + row % 3, top_k=50 * (row % 2)) for row in range(6)]
    generated = np.arange(6, dtype=np.int32)
    together = draw(logits, options, generated=generated)
    for row in range(6):
        alone = draw(logits[row : row + 1], options[row : row + 1], generated=generated[row : row + 1])
        assert alone == together[row]
    same = np.repeat(logits[:1], 64, axis=0)
    for change in ("seed", "number"):
        tokens = draw(
            same,
            [SamplingOptions(temperature=1.5, seed=row if change == "seed" else 0) for row in range(64)],
            generated=np.arange(64, dtype=np.int32) * (change == "number"),
        )
        assert len(set(tokens.tolist())) > 10, change


def test_greedy_rows_stay_greedy_beside_drawn_ones():
    logits = np.random.default_rng(3).normal(size=(40, 30)).astype(np.float32)
    options = [SamplingOptions(temperature=0.0 if row % 2 else 5.0) for row in range(40)]
    tokens = draw(logits, options)
    np.testing.assert_array_equal(tokens[1::2], logits[1::2].argmax(axis=1))
    assert (tokens[::2] != logits[::2].argmax(axis=1)).any()


def test_nothing_stops_a_reply_that_is_too_short():
    logits = np.array([[5.0, 4.0, 1.0]] * 2, np.float32)
    options = [SamplingOptions(stop_ids=[0], min_new_tokens=2, temperature=temperature) for temperature in (0, 1.0)]
    assert 0 not in draw(logits, options, generated=np.array([1, 1], np.int32))
    assert draw(logits[:1], options[:1], generated=np.array([2], np.int32)) == [0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "warm"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -2.1),
        ("seed", -1),
        ("seed", True),
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("min_new_tokens", 513),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("stop_ids", "12"),
        ("stop_ids", [1.5]),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(UserError, match=f"^{field}"):
        SamplingOptions(**{field: value})


def test_a_stop_token_outside_the_vocabulary_is_named():
    with pytest.raises(UserError, match="stop_ids: token 30 is not in the vocabulary"):
        controls([SamplingOptions(stop_ids=[30])], [], 30)


def test_an_unknown_option_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="unknown option 'temprature'; did you mean 'temperature'"):
        SamplingOptions().replace({"temprature": 1})
    assert SamplingOptions(top_k=3).replace({"stop": "x"}) == SamplingOptions(top_k=3, stop=("x",))


def test_a_tiny_temperature_is_greedy():
    logits = jnp.array([[1.0, 1.0001, 0.9]])
    assert draw(np.asarray(logits), [SamplingOptions(temperature=1e-30)]) == [1]
