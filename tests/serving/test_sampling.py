"""Fields that choose tokens, as seen from outside; their arithmetic is tested in tests/inference."""

import concurrent.futures

import numpy as np
import pytest
from serving.process import chat, check_error, user

from qwenvl_jax.checkpoints.folder import locate
from qwenvl_jax.processing.tokenizer import Tokenizer

FREE = {"temperature": 1, "max_tokens": 64, "ignore_eos": True}


@pytest.fixture(scope="module")
def text(post):
    """The text of the reply to a body."""

    def reply(**changes) -> str:
        response = post(chat(**changes))
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    return reply


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(locate("tiny") / "qwen.tiktoken", 64)


def test_temperature_zero_gives_one_answer(text):
    assert len({text(max_tokens=16) for _ in range(5)}) == 1


def test_a_seed_gives_one_answer(text):
    assert len({text(**FREE, seed=1) for _ in range(3)}) == 1
    assert len({text(**FREE, seed=seed) for seed in range(4)}) == 4


def test_without_a_seed_answers_differ(text):
    assert len({text(**FREE) for _ in range(3)}) == 3


def test_a_seed_gives_the_same_answer_among_others(text):
    alone = text(**FREE, seed=5)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        others = [pool.submit(text, **FREE, seed=seed, messages=user("word " * seed)) for seed in range(10, 15)]
        among = pool.submit(text, **FREE, seed=5)
        assert among.result() == alone
        assert all(other.result() for other in others)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_64_bit_seed_is_taken(text, seed):
    assert text(**FREE, seed=seed)


@pytest.mark.parametrize("nearly_greedy", [{"top_k": 1}, {"top_p": 0}, {"top_p": 1e-9}, {"min_p": 1}])
def test_what_leaves_one_token_is_greedy(text, nearly_greedy):
    greedy = text(max_tokens=16, temperature=0)
    assert text(max_tokens=16, temperature=1, seed=3, **nearly_greedy) == greedy


def test_penalties_change_repetition(post, text):
    """Twelve times the same token in a row is what the tiny model does with this prompt; penalties stop it."""

    def different(**changes) -> int:
        body = {"model": "tiny", "prompt": "ha ha ha ha ha ha", "max_tokens": 32, "temperature": 0, "ignore_eos": True}
        choice = post(body | {"logprobs": 0} | changes, "/v1/completions").json()["choices"][0]
        return len(set(choice["logprobs"]["tokens"]))

    plain = different()
    assert different(repetition_penalty=1.5) > plain
    assert different(presence_penalty=2) > plain
    assert different(frequency_penalty=2) > plain
    assert different(frequency_penalty=-2) <= plain


def test_logit_bias_forces_and_bans(text, tokenizer):
    (token,) = tokenizer.encode_ordinary("7")
    assert text(max_tokens=4, logit_bias={str(token): 100}) == "7777"
    first = text(max_tokens=1)
    (token,) = tokenizer.encode(first)
    assert not text(max_tokens=1, logit_bias={str(token): -100}).startswith(first)


@pytest.mark.parametrize("bias", [{"7": 101}, {"x": 1}, {"-1": 1}, {"1024": 1}, {"7": True}, [7], {"9" * 30: 1}])
def test_a_bias_that_is_wrong(post, bias):
    check_error(post(chat(logit_bias=bias)), 400)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_stop_strings(text, post, number):
    """Of a long answer, what comes before the first of the stop strings, and nothing of them."""
    whole = text(**FREE, seed=2)
    stops = [whole[20:23], whole[30:34], whole[40:41], whole[50:52]][:number]
    first = min(whole.index(stop) for stop in stops)
    reply = post(chat(**FREE, seed=2, stop=stops if number > 1 else stops[0])).json()
    assert reply["choices"][0]["message"]["content"] == whole[:first].rstrip()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] <= 64


@pytest.mark.parametrize("stop", [["a"] * 5, [""], "", 7, [7], ["a" * 1000], {}])
def test_stop_strings_that_are_wrong(post, stop):
    check_error(post(chat(stop=stop)), 400)


def test_a_stop_string_of_several_bytes(post):
    """Characters beyond ASCII come in several tokens of this vocabulary."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 64, "temperature": 2, "seed": 1, "ignore_eos": True}
    whole = post(body, "/v1/completions").json()["choices"][0]["text"]
    beyond = next(character for character in whole if ord(character) > 127)
    cut = post(body | {"stop": beyond}, "/v1/completions").json()["choices"][0]
    assert cut["text"] == whole[: whole.index(beyond)]
    assert cut["finish_reason"] == "stop"


def test_finish_reasons_and_counts(post):
    reply = post(chat(max_tokens=5, ignore_eos=True)).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 5
    reply = post(chat(max_tokens=200)).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] < 200


def test_min_tokens(post):
    natural = post(chat(max_tokens=200)).json()["usage"]["completion_tokens"]
    assert post(chat(max_tokens=200, min_tokens=natural + 5)).json()["usage"]["completion_tokens"] >= natural + 5
    check_error(post(chat(max_tokens=4, min_tokens=5)), 400, param="min_tokens")


def test_several_replies(post):
    one = post(chat(**FREE, seed=7)).json()
    three = post(chat(**FREE, seed=7, n=3)).json()
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    contents = [choice["message"]["content"] for choice in three["choices"]]
    assert len(set(contents)) == 3
    assert contents[0] == one["choices"][0]["message"]["content"]
    assert contents[1] == post(chat(**FREE, seed=8)).json()["choices"][0]["message"]["content"]
    assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert three["usage"]["completion_tokens"] == 3 * 64


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"stop": ["7", "e"]}])
def test_tokens_joined_are_the_reply(post, seed, changes):
    body = chat(max_tokens=40, logprobs=True, **changes)
    if seed is not None:
        body |= {"temperature": 2, "seed": seed, "ignore_eos": True}
    choice = post(body).json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    content = choice["message"]["content"]
    assert "".join(token["token"] for token in tokens) == content
    joined = b"".join(bytes(token["bytes"]) for token in tokens).decode("utf-8", "replace")
    assert content in joined


@pytest.mark.parametrize("number", [None, 0, 1, 20])
def test_other_tokens_and_their_log_probabilities(post, number):
    changes = {} if number is None else {"top_logprobs": number}
    tokens = post(chat(logprobs=True, **changes)).json()["choices"][0]["logprobs"]["content"]
    assert tokens
    for token in tokens:
        others = [other["logprob"] for other in token["top_logprobs"]]
        assert len(others) == (number or 0)
        assert others == sorted(others, reverse=True)
        assert all(-10_000 <= logprob <= 0 for logprob in [*others, token["logprob"]])
        if number:  # greedy: the chosen token is the first
            assert token["top_logprobs"][0]["logprob"] == token["logprob"]
            assert token["top_logprobs"][0]["bytes"] == token["bytes"]
            assert np.exp(others).sum() <= 1 + 1e-4


@pytest.mark.parametrize(
    "changes",
    [{"top_logprobs": 1}, {"top_logprobs": 1, "logprobs": False}, {"logprobs": True, "top_logprobs": 21}],
    ids=str,
)
def test_log_probabilities_that_cannot_be_had(post, changes):
    check_error(post(chat(**changes)), 400, param="top_logprobs")


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("temperature", [0, 2], [-0.01, 2.01]),
        ("top_p", [0, 1], [-0.01, 1.01]),
        ("min_p", [0, 1], [-0.01, 1.01]),
        ("top_k", [-1, 0, 2**31 - 1], [-2, 2**31]),
        ("presence_penalty", [-2, 2], [-2.01, 2.01]),
        ("frequency_penalty", [-2, 2], [-2.01, 2.01]),
        ("repetition_penalty", [0.01, 100], [0, -1, 1e9]),
        ("seed", [-(2**63), 2**63 - 1], [-(2**63) - 1, 2**63]),
        ("n", [1], [0, -1, 129]),
        ("top_logprobs", [0, 20], [-1, 21]),
    ],
)
def test_bounds(post, field, inside, outside):
    for value in inside:
        assert post(chat(**{"logprobs": True, field: value})).status_code == 200, value
    for value in outside:
        check_error(post(chat(**{"logprobs": True, field: value})), 400, param=field)


@pytest.mark.parametrize("value", ["0.5", True, [0.5], {}], ids=str)
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty", "repetition_penalty", "min_p"])
def test_numbers_of_another_type(post, field, value):
    check_error(post(chat(**{field: value})), 400, "invalid_type", field)


@pytest.mark.parametrize("value", [1.0, True, "1", [1]], ids=str)
@pytest.mark.parametrize("field", ["n", "seed", "top_k", "min_tokens"])
def test_whole_numbers_of_another_type(post, field, value):
    check_error(post(chat(**{field: value})), 400, "invalid_type", field)


@pytest.mark.parametrize("value", [1, 0, "true", "yes"], ids=str)
@pytest.mark.parametrize("field", ["stream", "logprobs", "ignore_eos"])
def test_truth_of_another_type(post, field, value):
    check_error(post(chat(**{field: value})), 400, "invalid_type", field)


@pytest.mark.parametrize("token", [1024, 2**31 - 1])
def test_a_stop_token_beyond_the_vocabulary(post, token):
    check_error(post(chat(stop_token_ids=[token])), 400, param="stop_token_ids")


def test_a_stop_token(post, tokenizer):
    whole = post(chat(**FREE, seed=2)).json()["choices"][0]["message"]["content"]
    (token,) = tokenizer.encode_ordinary(",")
    cut = post(chat(**FREE, seed=2, stop_token_ids=[token])).json()["choices"][0]
    assert whole.startswith(cut["message"]["content"])
    assert cut["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("prompt", "replies"),
    [("Hello", 1), (["Hello", "Where"], 2), ([39, 40], 1), ([[39], [40, 41]], 2), (["Hello", [39]], 2)],
    ids=str,
)
def test_prompts_of_completions(post, prompt, replies):
    reply = post({"model": "tiny", "prompt": prompt, "max_tokens": 3}, "/v1/completions").json()
    assert [choice["index"] for choice in reply["choices"]] == list(range(replies))
    assert reply["usage"]["completion_tokens"] <= 3 * replies


def test_more_replies_than_places(post):
    body = {"model": "tiny", "prompt": ["a"] * 100, "n": 100}
    assert "10000 replies" in check_error(post(body, "/v1/completions"), 400, param="n")


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], [1024], [-1], [1.5], 7, None, [True], {"a": 1}], ids=str)
def test_prompts_of_completions_that_are_wrong(post, prompt):
    check_error(post({"model": "tiny", "prompt": prompt}, "/v1/completions"), 400)


def test_a_text_and_its_tokens_go_on_alike(post, tokenizer):
    texts = [
        post({"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0}, "/v1/completions").json()
        for prompt in ("Hello there", tokenizer.encode_ordinary("Hello there"))
    ]
    assert texts[0]["choices"] == texts[1]["choices"]


@pytest.mark.parametrize("field", ["echo", "suffix", "best_of"])
def test_what_completions_do_not_support(post, field):
    value = {"echo": True, "suffix": "end", "best_of": 3}[field]
    check_error(post({"model": "tiny", "prompt": "a", field: value}, "/v1/completions"), 400, "unsupported_parameter")
