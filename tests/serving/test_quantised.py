"""A folder of GPTQ weights as serve.py serves it: the replies that the original implementation computed with it."""

from collections.abc import Iterator

import numpy as np
import pytest
from processes import REPOSITORY
from serving.process import REAL, ServerProcess, chat, encoded, user

from qwenvl_jax.processing.tokenizer import Tokenizer

FIXTURES = REPOSITORY / "tests" / "fixtures"
NAME = "qwen-vl-chat-tiny-int4"
QUESTIONS = {
    "text_only": user("hello, who are you?"),
    "one_image": user(
        [encoded((FIXTURES / "images" / "shapes.png").read_bytes()), {"type": "text", "text": "这是什么"}]
    ),
}


@pytest.fixture(scope="module")
def quantised() -> Iterator[ServerProcess]:
    sizes = ("--slots", "1", "--max-model-len", "384")
    with ServerProcess("--checkpoint", str(FIXTURES / NAME), *sizes, script=REAL) as process:
        yield process


@pytest.mark.parametrize("name", QUESTIONS)
def test_it_answers_as_the_original_does(quantised, golden, name):
    """Greedily, beyond any stop token, so the reply is all of the recorded tokens."""
    tokens = np.load(golden / "fixtures" / f"{NAME}.npz")[f"{name}/greedy"].tolist()
    body = chat(model=NAME, messages=QUESTIONS[name], max_tokens=len(tokens), ignore_eos=True, logprobs=True)
    reply = quantised.client.post("/v1/chat/completions", json=body).json()
    said = [bytes(entry["bytes"]) for entry in reply["choices"][0]["logprobs"]["content"]]
    tokenizer = Tokenizer.from_file(FIXTURES / NAME / "qwen.tiktoken", 256)
    assert b"".join(said).decode(errors="replace").strip() == tokenizer.decode(tokens).strip()
    assert reply["usage"]["completion_tokens"] == len(tokens)
    assert reply["usage"]["prompt_tokens_details"]["image_tokens"] == 256 * (name == "one_image")
