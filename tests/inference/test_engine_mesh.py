"""The engine on several devices: replies are those of one device, arrays are split, nothing is compiled or copied."""

import re
import warnings
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from prompts import ask, longer, picture_prompt, run, text_prompt

from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.engine import Engine, EngineOptions
from qwenvl_jax.inference.generate import Generation
from qwenvl_jax.inference.layout import Layout
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.inference.steps import Past
from qwenvl_jax.nn.int8_tokens import Int8Tokens
from qwenvl_jax.sharding import make_mesh, param_shardings

LENGTH = 120  # one size of caches; no other dimension is as long
OPTIONS = EngineOptions(slots=4, max_length=LENGTH, pictures=8, prefixes=1024, speculate=3)  # 1 row or 4
LARGEST = 2e-4  # difference of a logit, that of tests/test_sharding.py
TABLE = {token: bytes([token % 26 + 97]) for token in range(320)}


def mesh_of(data: int, fsdp: int, tensor: int):
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh("fsdp_tensor", devices, data=data, tensor=tensor)


@pytest.fixture(scope="module", params=[(1, 1, 2), (2, 2, 1)], ids=str)
def engine(small_model, request) -> Iterator[Engine]:
    model = jax.device_put(small_model, param_shardings(small_model, mesh_of(*request.param)))
    engine = Engine(Generator(model), TABLE, OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns of memory that is given up and cannot be used for the result
        engine.warm_up()
    engine.start()
    yield engine
    engine.stop()
    assert engine.recompiles == 0


def texts(replies: list[list[int]]) -> list[str]:
    return ["".join(TABLE[token].decode() for token in reply) for reply in replies]


def test_replies_are_those_of_one_device(engine, generator):
    """One row and then four, flushes, pictures, greedy and drawn, prompts that are continued."""
    starts = [picture_prompt(60, seed=1, pictures=2), text_prompt(70, seed=2), text_prompt(5, seed=3)]
    prompts = starts + [longer(start, 16) for start in starts] + [picture_prompt(40, seed) for seed in (4, 5)]
    options = [
        SamplingOptions(max_new_tokens=34, temperature=0.8 * (number % 2), seed=number, repetition_penalty=1.1)
        for number in range(len(prompts))
    ]
    alone = [texts(run(generator, [prompt], option))[0] for prompt, option in zip(prompts, options, strict=True)]
    assert ask(engine, prompts[0], options[0]).text == alone[0]
    replies = [ask(engine, prompt, option) for prompt, option in zip(prompts, options, strict=True)]
    assert [reply.text for reply in replies] == alone
    assert replies[3].last.cached_tokens == 64


def test_log_probabilities_are_those_of_one_device(engine, generator):
    prompt, option = picture_prompt(60, seed=9), SamplingOptions(max_new_tokens=12)
    expected = Generation(generator, [prompt], [option])
    differences = []
    for choice in ask(engine, prompt, option, alternatives=20).tokens:
        assert expected.advance(1) == [[choice.token]]
        logprobs = np.asarray(jax.nn.log_softmax(expected.logits[0].astype(np.float64)))
        differences += [value - logprobs[token] for token, value in choice.alternatives]
        assert choice.logprob == choice.alternatives[0][1]
    assert np.abs(differences).max() < LARGEST


def test_rows_and_heads_are_split(engine):
    """Four rows are, as far as the mesh has axes for them, and one row is on every device."""
    layout, mesh = engine._generator.layout, engine._generator.layout.mesh
    by_rows = ("data", "fsdp")
    for rows, split in ((1, None), (4, by_rows)):
        past, state, fixed = engine._programs.shapes(rows, LENGTH)
        for leaf in jax.tree.leaves((past, state.recent_k, state.recent_v)):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P(split, "tensor")), leaf.ndim)
        for leaf in jax.tree.leaves((state._replace(recent_k=[], recent_v=[]), fixed)):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P(split)), leaf.ndim)
        compiled = engine._generator.decode_steps._ahead[rows, LENGTH]
        new, grown = compiled.output_shardings
        expected = jax.tree.map(lambda leaf: leaf.sharding, state)
        shapes = jax.tree.leaves(state)
        for sharding, wanted, leaf in zip(*map(jax.tree.leaves, (new, expected, shapes)), strict=True):
            assert sharding.is_equivalent_to(wanted, leaf.ndim)
        assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(grown))
        held = sum(shard_bytes(leaf) for leaf in shapes)
        assert held < sum(leaf.size * leaf.dtype.itemsize for leaf in shapes) or rows == 1
        assert compiled.memory_analysis().alias_size_in_bytes == held
    assert layout.mesh.size == len(engine._batches.batches[0]._past.k[0].sharding.device_set)


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def test_no_program_gathers_the_cache(engine):
    """A step, a row that comes in, and recent tokens that are moved: none has the keys of other rows or heads come."""
    all_of, key = engine._programs, (4, LENGTH)
    programs = [all_of.decode._ahead[key], all_of.place._ahead[*key, LENGTH], all_of.flush._ahead[key]]
    for program in programs:
        text = program.as_text()
        assert f",{LENGTH},64]" in text  # keys and values [R, N, S, H]; the compiler may change the order of the first
        assert not re.search(rf",{LENGTH},64\]\S* (all-|collective-)", text)


def test_what_a_mesh_does_not_divide_is_on_all_of_its_devices():
    """Two heads on four devices are; three rows on two; and a scale has no head dimension, but rows and heads."""
    layout = Layout([jax.device_put(np.zeros(4), NamedSharding(mesh_of(2, 1, 4), P()))])
    for shape, wanted in [((4, 2, 8, 3), P("data")), ((3, 8, 8, 3), P(None, "tensor")), ((1, 1), P())]:
        leaf = layout.tokens(jax.ShapeDtypeStruct(shape, np.float32))
        assert leaf.sharding.is_equivalent_to(NamedSharding(layout.mesh, wanted), len(shape))
    scale = jax.ShapeDtypeStruct((2, 4, 8), np.float32)
    past = layout.batch(Past([Int8Tokens(jax.ShapeDtypeStruct((2, 4, 8, 3), np.int8), scale)], []))
    assert past.k[0].scale.sharding.is_equivalent_to(NamedSharding(layout.mesh, P("data", "tensor")), 3)


def test_one_device_is_left_alone(generator):
    shape = jax.ShapeDtypeStruct((4, 2, 8, 3), np.float32)
    assert generator.layout.mesh is None
    assert generator.layout.given(generator.layout.batch(Past([shape], []))).k[0].sharding is None
