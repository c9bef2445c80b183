"""Prompts for the small random model of tests/inference, and their replies: as token ids, and from an engine."""

import threading

import numpy as np

from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.engine import Engine
from qwenvl_jax.inference.generate import Generation
from qwenvl_jax.inference.requests import Request, TokenChoice, Update
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


def longer(prompt: Prompt, by: int, seed: int = 5) -> Prompt:
    more = text_prompt(by, seed)
    ids = np.concatenate([prompt.input_ids, more.input_ids])
    return Prompt(ids, np.concatenate([prompt.image_slots, more.image_slots]), prompt.pixels, [])


class Listening:
    """What an engine tells of a request."""

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.ended = threading.Event()

    def __call__(self, update: Update) -> None:
        self.updates.append(update)
        if update.finish_reason is not None:
            self.ended.set()

    @property
    def last(self) -> Update:
        assert self.ended.wait(60), self.updates
        return self.updates[-1]

    @property
    def tokens(self) -> list[TokenChoice]:
        assert self.last.finish_reason != "error", self.last.error
        return [choice for update in self.updates for choice in update.choices]

    @property
    def text(self) -> str:
        assert self.last.finish_reason != "error", self.last.error
        return "".join(update.text for update in self.updates)


def ask(engine: Engine, prompt: Prompt, options: SamplingOptions | None = None, **more) -> Listening:
    listening = Listening()
    engine.submit(Request(prompt, options or SamplingOptions(max_new_tokens=9), **more), listening)
    return listening
