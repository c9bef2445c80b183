"""A server in a thread of a process with other work, as the demo has it."""

import json
import urllib.request

import pytest
from serving.simple_engine import SimpleEngine

import qwenvl_jax
from qwenvl_jax.config import UserError
from qwenvl_jax.inference.text import token_bytes
from qwenvl_jax.serving import cli
from qwenvl_jax.serving.run import Background


def started(listening, build) -> Background:
    return Background("demo", cli.settings(cli.parser().parse_args([])), listening, build)


def test_it_serves_until_the_block_ends():
    def build(say):
        vlm = qwenvl_jax.load("tiny")
        engine = SimpleEngine(vlm.generator, token_bytes(vlm.processor.tokenizer), 128)
        engine.start()
        return vlm, engine

    with cli.listen("127.0.0.1", 0) as listening, started(listening, build) as server:
        while not answers(f"{server.address}/ready"):
            assert not server.ended(0.05)
        with urllib.request.urlopen(f"{server.address}/v1/models/tiny", timeout=10) as reply:
            defaults = json.load(reply)["generation_config"]
        assert defaults["top_p"] == qwenvl_jax.load("tiny").defaults.top_p
    assert server.ended(0)
    assert server.status == 0


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10):
            return True
    except urllib.error.HTTPError:
        return False


@pytest.mark.parametrize(
    ("error", "status", "said"), [(UserError("no folder"), 2, "demo: no folder\n"), (OSError(), 1, "OSError")]
)
def test_a_model_that_cannot_be_loaded_ends_it_with_a_line(error, status, said, capsys):
    def build(say):
        raise error

    with cli.listen("127.0.0.1", 0) as listening, started(listening, build) as server:
        while not server.ended(0.05):
            pass
    assert server.status == status
    assert said in capsys.readouterr().err
