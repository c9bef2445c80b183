"""Adapters by the name of a model: each answers as it does when it is loaded alone, all from one server."""

import concurrent.futures

import pytest
from processes import REPOSITORY
from serving.process import REAL, ServerProcess, chat, check_error, user

import qwenvl_jax

FIXTURES = REPOSITORY / "tests" / "fixtures"
BASE, ADAPTER = FIXTURES / "qwen-vl-chat-tiny", FIXTURES / "lora-adapter"
QUESTION = user("Describe the weather.")


@pytest.fixture(scope="module")
def adapted():
    options = ("--checkpoint", str(BASE), "--served-model-name", "base", "--adapter", f"mine={ADAPTER}")
    sizes = ("--slots", "4", "--max-model-len", "256")
    with ServerProcess(*options, *sizes, script=REAL) as process:
        yield process


def test_the_models_are_listed(adapted):
    listed = adapted.client.get("/v1/models").json()["data"]
    assert [(model["id"], model["root"], model["parent"]) for model in listed] == [
        ("base", "base", None),
        ("mine", "base", "base"),
    ]


def test_each_answers_as_it_does_alone(adapted):
    def answer(name: str) -> str:
        body = chat(model=name, messages=QUESTION, max_tokens=24)
        reply = adapted.client.post("/v1/chat/completions", json=body).json()
        assert reply["model"] == name
        return reply["choices"][0]["message"]["content"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, ["base", "mine"] * 4))
    for name, adapter in (("base", None), ("mine", ADAPTER)):
        alone = qwenvl_jax.load(BASE, adapter=adapter)
        expected = alone.chat(QUESTION, max_new_tokens=24, temperature=0).text
        assert [text for text, asked in zip(answers, ["base", "mine"] * 4, strict=True) if asked == name] == [
            expected
        ] * 4
    assert len(set(answers)) == 2


def test_a_name_that_is_none(adapted):
    message = check_error(
        adapted.client.post("/v1/chat/completions", json=chat(model="theirs")), 404, "model_not_found"
    )
    assert "base, mine" in message
