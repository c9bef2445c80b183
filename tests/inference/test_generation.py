"""What must hold besides the goldens: bucket edges, batches, compilations, memory, limits, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from prompts import picture_prompt, run, text_prompt

from qwenvl_jax.config import UserError
from qwenvl_jax.inference.decode import Generator, bucket, length_bucket
from qwenvl_jax.inference.generate import Generation
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.models.qwen_vl import frequencies
from qwenvl_jax.nn.attention import attend
from qwenvl_jax.processing.template import Prompt
from qwenvl_jax.sharding import make_mesh, param_shardings


def uncached(generator: Generator, prompt: Prompt, count: int) -> list[int]:
    """Greedy tokens by one pass over everything per token, with the rotary frequencies of the prompt."""
    ids = prompt.input_ids
    for _ in range(count):
        slots = np.concatenate([prompt.image_slots, np.full(len(ids) - len(prompt.input_ids), -1, np.int32)])
        batch = generator.batch([Prompt(ids, slots, prompt.pixels, [])])
        valid = np.arange(batch.ids.shape[1])[None] < len(ids)
        logits = generator.logits(batch, valid, frequencies(generator.config, [len(prompt.input_ids)]))
        ids = np.append(ids, np.argmax(logits[0, len(ids) - 1]).astype(np.int32))
    return ids[len(prompt.input_ids) :].tolist()


def test_buckets():
    assert [length_bucket(n) for n in (1, 64, 65, 128, 8192)] == [64, 64, 128, 128, 8192]
    assert [bucket(n) for n in (1, 2, 3, 8)] == [1, 2, 4, 8]


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_a_reply_grows_across_buckets(generator, length):
    """A prompt around the edge of a bucket, and a reply that needs the cache to be flushed and to grow."""
    prompt = text_prompt(length, seed=length)
    reply = run(generator, [prompt], SamplingOptions(max_new_tokens=80))[0]
    assert reply == uncached(generator, prompt, 80)


def test_steps_per_call_change_nothing(generator):
    prompt = text_prompt(20)
    option = SamplingOptions(temperature=1.0, max_new_tokens=70)
    whole = run(generator, [prompt], option)
    assert run(generator, [prompt], option, steps=1) == whole
    assert run(generator, [prompt], option, steps=7) == whole


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_each_prompt_what_it_gets_alone(generator, temperature):
    """Of different lengths, with and without pictures, with options of their own; three rows in a bucket of four."""
    prompts = [picture_prompt(30, seed=1), text_prompt(100, seed=2), picture_prompt(5, seed=3, pictures=2)]
    options = [
        SamplingOptions(temperature=temperature, max_new_tokens=40, seed=7),
        SamplingOptions(temperature=temperature, max_new_tokens=3, top_p=0.9),
        SamplingOptions(temperature=temperature, max_new_tokens=70, repetition_penalty=1.2, top_k=20),
    ]
    together = run(generator, prompts, options)
    assert [len(reply) for reply in together] == [40, 3, 70]
    for row in range(3):
        assert run(generator, [prompts[row]], options[row]) == [together[row]]


def test_many_pictures_in_one_prompt(generator):
    """More than are encoded at once: the last picture's features must be in the last picture's place."""
    pixels = np.random.default_rng(0).normal(size=(9, 3, 28, 28)).astype(np.float32)
    features = np.asarray(generator.encode_images(pixels))
    assert features.shape[0] == 16
    for number in (0, 8):
        alone = np.asarray(generator.encode_images(pixels[number : number + 1]))[0]
        np.testing.assert_allclose(features[number], alone, atol=1e-5, rtol=0)


def test_nothing_compiles_once_a_bucket_was_used(small_model):
    generator = Generator(small_model)  # one that no other test has used
    first = SamplingOptions(max_new_tokens=110)
    for _ in range(2):
        run(generator, [picture_prompt(20, seed=0)], first)
        run(generator, [text_prompt(50, seed=0)], first)
    compiled = []
    monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    before = generator.programs.compiled
    option = SamplingOptions(temperature=0.7, top_p=0.5, top_k=9, min_p=0.1, seed=3, min_new_tokens=4)
    run(generator, [picture_prompt(44, seed=5)], option.replace({"max_new_tokens": 90}))
    run(generator, [text_prompt(3, seed=5)], option.replace({"frequency_penalty": 1.0, "max_new_tokens": 60}))
    run(generator, [text_prompt(64, seed=6)], SamplingOptions(max_new_tokens=1), steps=1)
    assert (generator.programs.compiled - before, compiled) == (0, [])
    run(generator, [text_prompt(130, seed=7)], SamplingOptions(max_new_tokens=1))
    assert generator.programs.compiled == before + 1
    assert compiled  # the listener does listen


def test_decoding_copies_no_cache(generator):
    """The state is given away to each step, and a step's own memory does not grow with the past."""
    scratch, size = {}, {}
    for length in (64, 200):
        generation = Generation(generator, [text_prompt(length)], [SamplingOptions()])
        generation.advance()
        old = generation._state
        arguments = (generation._past, generation._fixed, np.int32(0), np.int32(1))
        program = generator.decode_steps.jitted.lower(
            generator.leaves, *arguments, generation._stopped, state=generation._state
        ).compile()
        scratch[length] = program.memory_analysis().temp_size_in_bytes
        size[length] = sum(array.nbytes for array in jax.tree.leaves(generation._past))
        generation.advance(1)
        assert all(array.is_deleted() for array in old.recent_k + old.recent_v)
    # What does grow are the scores of one query: [heads, slots], a few times over.
    assert scratch[200] - scratch[64] < (size[200] - size[64]) / 8


def test_a_long_prompt_needs_no_square_of_scores():
    """8,192 tokens in the released model's attention: dense float32 scores of 32 heads would be 8 GiB."""
    heads = jax.ShapeDtypeStruct((1, 8192, 32, 128), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 8192, 8192), jnp.bool)
    program = jax.jit(attend).lower(heads, heads, heads, mask).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * 2**30


def test_max_new_tokens_and_positions_end_a_reply(generator):
    most = generator.config.max_position_embeddings
    generation = Generation(generator, [text_prompt(most - 2)], [SamplingOptions(max_new_tokens=50)])
    generation.advance()
    generation.advance()
    assert (generation.finished, generation.generated.tolist(), generation.finish_reasons) == (True, [2], ["length"])
    assert len(run(generator, [text_prompt(9)], SamplingOptions(max_new_tokens=1))[0]) == 1


def test_a_prompt_that_does_not_fit_is_an_error_with_numbers(generator):
    with pytest.raises(UserError, match="prompt has 256 tokens; the model has 256 positions"):
        Generation(generator, [text_prompt(3), text_prompt(256)], [SamplingOptions()] * 2)
    with pytest.raises(UserError, match="prompt is empty"):
        Generation(generator, [text_prompt(0)], [SamplingOptions()])


def test_stop_tokens_and_the_caller_end_a_reply(generator):
    prompt = text_prompt(12)
    reply = run(generator, [prompt], SamplingOptions(max_new_tokens=20))[0]
    stop = reply[6]
    first = reply.index(stop)
    generation = Generation(generator, [prompt] * 2, [SamplingOptions(stop_ids=[stop]), SamplingOptions()])
    generation.advance()
    new = generation.advance(20)
    assert reply[: first + 1] == [*reply[:1], *new[0], stop]  # the stop token itself is not handed out
    assert generation.generated.tolist() == [first + 1, 21]
    generation.stop(1)
    assert (generation.finished, generation.finish_reasons) == (True, ["stop", "stop"])


def test_bfloat16_generates(small_model):
    narrow = Generator(jax.tree.map(lambda array: array.astype(jnp.bfloat16), small_model))
    reply = run(narrow, [picture_prompt(20, seed=0)], SamplingOptions(max_new_tokens=40, temperature=1.0))[0]
    assert len(reply) == 40
    assert len(set(reply)) > 10


def test_a_model_split_over_devices_generates_the_same(small_model, generator):
    mesh = make_mesh("tensor", jax.devices()[:2])
    split = Generator(jax.device_put(small_model, param_shardings(small_model, mesh)))
    assert len(split.leaves[0].sharding.device_set) == 2
    prompts = [picture_prompt(20, seed=0), text_prompt(70, seed=1)]
    option = SamplingOptions(max_new_tokens=40)
    assert run(split, prompts, option) == run(generator, prompts, option)
