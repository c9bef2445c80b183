"""Prompts for the small random model of tests/inference, and their replies as token ids."""

import numpy as np

from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.generate import Generation
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.inference.steps import CHUNK
from qwenvl_jax.processing.template import Prompt


def text_prompt(length: int, seed: int = 0) -> Prompt:
    ids = np.random.default_rng(seed).integers(0, 300, length).astype(np.int32)
    return Prompt(ids, np.full(length, -1, np.int32), np.zeros((0, 3, 28, 28), np.float32), [])


def picture_prompt(length: int, seed: int, pictures: int = 1) -> Prompt:
    """`length` ids of text after random pictures of 4 slots each."""
    text = text_prompt(length, seed)
    slots = np.arange(4 * pictures, dtype=np.int32)
    pixels = np.random.default_rng(seed).normal(size=(pictures, 3, 28, 28)).astype(np.float32)
    ids = np.full(len(slots), 302, np.int32)
    return Prompt(np.concatenate([ids, text.input_ids]), np.concatenate([slots, text.image_slots]), pixels, [])


def run(generator: Generator, prompts, options, *, steps: int = CHUNK) -> list[list[int]]:
    if isinstance(options, SamplingOptions):
        options = [options] * len(prompts)
    generation = Generation(generator, prompts, options)
    replies = [[] for _ in prompts]
    while not generation.finished:
        for reply, new in zip(replies, generation.advance(steps), strict=True):
            reply += new
    assert generation.generated.tolist() == [len(reply) for reply in replies]
    return replies
