"""The engine with several adapters: in one batch, each request gets what its adapter alone gives, and nothing is mixed.

What is kept of pictures and prompts must not cross adapters; that without adapters all is as ever is test_engine.py's.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from conftest import TESTS
from prompts import ask, longer, picture_prompt, run, text_prompt
from weights import trained

import qwenvl_jax
from qwenvl_jax.checkpoints.adapter_bank import load_adapters
from qwenvl_jax.checkpoints.peft import load_adapter, save_adapter
from qwenvl_jax.config import UserError
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.engine import Engine, EngineOptions
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.nn.lora import LoraRecipe, merge_adapters

FIXTURES = TESTS / "fixtures"
# Prompts are of one bucket of lengths, with one picture at most, so that there is little to compile.
TABLE = {token: bytes([token % 26 + 97]) for token in range(320)}
RECIPES = (
    LoraRecipe(rank=2, alpha=6.0),
    LoraRecipe(rank=3, alpha=9.0, use_rslora=True, targets=("in_proj", "out_proj", "c_fc", "kv_proj", "w1")),
    LoraRecipe(rank=4, targets=("h.*.mlp.c_proj", "lm_head")),
)


@pytest.fixture(scope="module")
def folders(small_model, tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("adapters")
    for number, recipe in enumerate(RECIPES, 1):
        save_adapter(trained(small_model, recipe, number), root / str(number), recipe)
    return [str(root / str(number)) for number in range(1, len(RECIPES) + 1)]


@pytest.fixture(scope="module")
def alone(small_model, folders) -> Callable[..., str]:
    """(number, prompt, option) -> the reply of the base model with one adapter merged into it, or of the base."""
    models = [small_model, *(merge_adapters(load_adapter(small_model, folder)) for folder in folders)]
    generator = Generator(small_model)

    def reply(number: int, prompt, option) -> str:
        generator.load(models[number])
        return "".join(TABLE[token].decode() for token in run(generator, [prompt], option)[0])

    return reply


@pytest.fixture(scope="module")
def engine(small_model, folders) -> Iterator[Engine]:
    model = load_adapters(small_model, dict(zip("abc", folders, strict=True)))
    engine = Engine(Generator(model), TABLE, EngineOptions(slots=4, max_length=128))
    engine.warm_up()
    engine.start()
    yield engine
    engine.stop()
    assert engine.recompiles == 0


def test_one_batch_of_three_adapters_and_the_base(engine, alone):
    """As many rows as there are, then more requests than rows; with a picture and without, greedy and drawn."""
    prompts = [picture_prompt(70, seed=1), text_prompt(90, seed=2)]
    options = [SamplingOptions(max_new_tokens=25), SamplingOptions(max_new_tokens=25, temperature=0.8, seed=3)]
    for option in options:
        expected = [[alone(number, prompt, option) for number in range(4)] for prompt in prompts]
        assert all(len(set(replies)) == 4 for replies in expected), "adapters that make no difference"
        together = [ask(engine, prompts[0], option, adapter=number) for number in range(4)]
        assert [reply.text for reply in together] == expected[0]
        many = [[ask(engine, prompt, option, adapter=number) for number in (2, 0, 3, 1)] for prompt in prompts]
        assert [[r.text for r in row] for row in many] == [[row[n] for n in (2, 0, 3, 1)] for row in expected]


def test_what_is_kept_of_prompts_is_of_one_adapter(engine, alone):
    """The same beginning, read by one adapter and continued by all: by itself only where it was read."""
    start, option = text_prompt(80, seed=50), SamplingOptions(max_new_tokens=20)
    assert ask(engine, start, adapter=1).last.cached_tokens == 0
    prompt = longer(start, 20)
    for number in (2, 1, 0, 3):
        reply = ask(engine, prompt, option, adapter=number)
        assert reply.text == alone(number, prompt, option)
        assert reply.last.cached_tokens == (64 if number == 1 else 0)
        assert ask(engine, longer(prompt, 5), adapter=number).last.cached_tokens == 64


def test_what_is_kept_of_pictures_is_of_one_adapter(engine, alone):
    """Where any adapter changes how pictures are encoded; and whether or not the caller knows them by digests."""
    option = SamplingOptions(max_new_tokens=12)
    for prompt, keys in ((picture_prompt(70, seed=60), ()), (picture_prompt(80, seed=61), (b"a picture",))):
        hits = engine.picture_hits[0]
        for _ in range(2):
            for number in range(4):
                reply = ask(engine, prompt, option, adapter=number, picture_keys=keys)
                assert reply.text == alone(number, prompt, option)
        assert engine.picture_hits[0] - hits == 4


def test_an_adapter_that_there_is_not(engine):
    for number in (4, -1):
        with pytest.raises(UserError, match=f"adapter is {number}; the model has 3, and 0 is for none"):
            ask(engine, text_prompt(5), adapter=number)


def test_an_original_adapter_through_the_engine():
    """PEFT's own folder gives the original's greedy tokens; it leaves pictures alone, so the base's features serve."""
    vlm = qwenvl_jax.load(
        FIXTURES / "qwen-vl-chat-tiny", adapters={"golden": FIXTURES / "lora-adapter"}, image_mode="reference"
    )
    engine = Engine(vlm.generator, vlm._table, EngineOptions(slots=1, max_length=320, prefixes=0))
    engine.warm_up()
    engine.start()
    golden, option = np.load(TESTS / "golden" / "fixtures" / "lora-adapter.npz"), SamplingOptions(max_new_tokens=32)
    for case in ("text_only", "one_image"):
        ids = golden[f"{case}/input_ids"]
        spans = [ids[start + 1 : start + 257] for start in np.flatnonzero(ids == 1470)]
        pictures = [FIXTURES / bytes(span[span < 256].tolist()).decode() for span in spans]
        prompt = vlm._sequences(ids[None], pictures)[0]
        replies = [ask(engine, prompt, option, adapter=number, alternatives=0) for number in (0, 1)]
        base, adapted = ([choice.token for choice in reply.tokens] for reply in replies)
        assert adapted == golden[f"adapter/{case}/greedy"].tolist() != base
    assert engine.picture_hits == (1, 2)
    engine.stop()
    assert engine.recompiles == 0
