"""A checkpoint that answers samples: texts by an engine, which works on many at once, likelihoods by one pass each.

Nothing here knows a dataset; `runner.py` decides what is asked, and keeps the answers.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.runner import Answer, Lost
from qwenvl_jax.evaluation.task import PICTURE, Decoding, Sample
from qwenvl_jax.inference.decode import SHORTEST_BUCKET, bucket
from qwenvl_jax.inference.engine import Engine, EngineOptions
from qwenvl_jax.inference.requests import Request, Update
from qwenvl_jax.inference.text import token_bytes
from qwenvl_jax.processing.legacy import user_parts
from qwenvl_jax.vlm import VLM

SPARE = 64  # tokens of a template around a question
FEEDERS = 4  # threads that read pictures, besides one for each row of the batch
STALLED = 600.0  # seconds without an answer after which an engine is given up


class LocalModel:
    """Use it as a context. vlm: nobody else may use it meanwhile. chats: samples are messages and no raw prompts.

    rows: samples answered at once. Raises UserError for a base model that is to chat.
    """

    def __init__(self, vlm: VLM, chats: bool, decoding: Decoding, rows: int = 32):
        self.vlm, self.chats, self.decoding, self.rows = vlm, chats, decoding, rows
        self.at_once = rows + FEEDERS
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        if chats and not vlm.is_chat:
            raise UserError("this is a base model, which does not chat: --style qwenvl has the prompts for it")

    def prepare(self, samples: Sequence[Sample], say: Callable[[int, int], None]) -> None:
        """Compiles what the samples need. say: is told how many programs are done, of how many."""
        if all(sample.choices for sample in samples):
            return
        config = self.vlm.config
        needed = max(map(self.length, samples)) + self.decoding.max_new_tokens
        longest = min(bucket(needed, SHORTEST_BUCKET), config.max_position_embeddings)
        options = EngineOptions(self.rows, longest, prefixes=self.rows * longest)
        self._engine = Engine(self.vlm.generator, token_bytes(self.vlm.processor.tokenizer), options)
        self._engine.warm_up(say)
        self.vlm.generator.programs.sealed = False  # what ranks choices is compiled when it is needed
        self._engine.start()

    def length(self, sample: Sample) -> int:
        """About how many tokens its prompt has, and not fewer."""
        text = sum(len(self.vlm.processor.tokenizer.encode_ordinary(part)) for part in sample.prompt.split(PICTURE))
        return text + len(sample.pictures) * (self.vlm.config.visual.n_queries + 8) + SPARE

    def answer(self, sample: Sample) -> Answer:
        """Raises UserError for a sample that cannot be asked, Lost where no sample can be any more."""
        if sample.choices:
            with self._lock:
                scores = self.vlm.score(sample.prompt, sample.choices, sample.pictures, per_token=True)
            if not np.all(np.isfinite(scores)):
                raise UserError("the likelihoods are no numbers")
            return Answer(likelihoods=tuple(round(float(score), 6) for score in scores))
        if self._engine is None:
            raise RuntimeError("there is no engine: prepare comes first")
        done, texts = threading.Event(), list[str]()
        last: list[Update] = []

        def listen(update: Update) -> None:
            texts.append(update.text)
            if update.finish_reason is not None:
                last.append(update)
                done.set()

        self._engine.submit(self._request(sample), listen)
        if not done.wait(STALLED) or not self._engine.alive:
            raise Lost("the engine has stopped answering")
        if last[0].error is not None:
            raise UserError(f"the engine failed: {last[0].error}")
        return Answer("".join(texts), finish_reason=last[0].finish_reason, tokens=last[0].tokens)

    def _request(self, sample: Sample) -> Request:
        options = self.vlm.defaults.replace({"temperature": 0.0, "repetition_penalty": 1.0} | options_of(self.decoding))
        if self.chats:
            prompt, stop_ids = self.vlm.processor.chat(messages(sample)), self.vlm.chat_stop_ids
        else:
            prompt, stop_ids = self.vlm.processor.raw(sample.prompt, sample.pictures), self.vlm.raw_stop_ids
        return Request(prompt, options, tuple(stop_ids), strip=True)

    def __enter__(self) -> "LocalModel":
        return self

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            self._engine.stop()


def options_of(decoding: Decoding) -> dict[str, Any]:
    """As fields of `SamplingOptions`."""
    return {
        "max_new_tokens": decoding.max_new_tokens,
        "min_new_tokens": decoding.min_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
    }


def messages(sample: Sample) -> list[dict[str, Any]]:
    """A sample as a conversation, its pictures where the prompt has them. Raises UserError where it has not as many."""
    left = list(sample.pictures)
    if sample.prompt.count(PICTURE) != len(left):
        raise UserError(f"the prompt has {sample.prompt.count(PICTURE)} places for {len(left)} pictures")
    return [{"role": "user", "content": user_parts(sample.prompt, lambda _: left.pop(0), [])}]
