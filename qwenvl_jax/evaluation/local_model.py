"""A checkpoint that answers samples: texts of many at once, which is where the speed is, likelihoods by one pass each.

Nothing here knows a dataset; `runner.py` decides what is asked, and keeps the answers.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.runner import Answer
from qwenvl_jax.evaluation.task import PICTURE, Decoding, Sample
from qwenvl_jax.processing.images import resized
from qwenvl_jax.processing.legacy import user_parts
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.template import Prompt
from qwenvl_jax.vlm import VLM

THREADS = 2  # one makes prompts and texts while the other computes; small models leave it a core, too
PICTURES = 256  # that are kept, resized


class LocalModel:
    """chats: samples are messages and no raw prompts. rows: samples answered together.

    Raises UserError for a base model that is to chat.
    """

    def __init__(self, vlm: VLM, chats: bool, decoding: Decoding, rows: int = 32):
        self.vlm, self.chats, self.decoding = vlm, chats, decoding
        self.together, self.at_once = rows, THREADS
        self._lock = threading.Lock()
        size = vlm.config.visual.image_size

        @functools.lru_cache(maxsize=PICTURES)
        def load(source: Any) -> Any:  # in place of a picture that nobody draws on
            return resized(vlm.processor.load(source), size)

        self._processor = Processor(vlm.processor.tokenizer, vlm.config, load=load)
        if chats and not vlm.is_chat:
            raise UserError("this is a base model, which does not chat: --style qwenvl has the prompts for it")

    def check(self, samples: Sequence[Sample]) -> None:
        """Whatever they are, some may be asked."""

    def length(self, sample: Sample) -> int:
        """How many tokens its prompt has, but for those around the question."""
        text = sum(len(self.vlm.processor.tokenizer.encode_ordinary(part)) for part in sample.prompt.split(PICTURE))
        return text + len(sample.pictures) * self.vlm.config.visual.n_queries

    def answers(self, samples: Sequence[Sample]) -> list[Answer | UserError]:
        """What the model says to each, or why that cannot be asked."""
        found: dict[int, Answer | UserError] = {}
        prompts: dict[int, Prompt] = {}
        for place, sample in enumerate(samples):
            try:
                if sample.choices:
                    found[place] = self._ranked(sample)
                else:
                    prompts[place] = self._prompt(sample)
            except UserError as error:
                found[place] = error
        return [answer for _, answer in sorted((found | self._written(prompts)).items(), key=lambda pair: pair[0])]

    def _ranked(self, sample: Sample) -> Answer:
        with self._lock:
            scores = self.vlm.score(sample.prompt, sample.choices, sample.pictures, per_token=True)
        if not np.all(np.isfinite(scores)):
            raise UserError("the likelihoods are no numbers")
        return Answer(likelihoods=tuple(round(float(score), 6) for score in scores))

    def _written(self, prompts: dict[int, Prompt]) -> dict[int, Answer]:
        options = self.vlm.defaults.replace({"temperature": 0.0, "repetition_penalty": 1.0} | options_of(self.decoding))
        stop_ids = self.vlm.chat_stop_ids if self.chats else self.vlm.raw_stop_ids
        replies = self.vlm.replies(list(prompts.values()), options, stop_ids, strip=True)
        return {
            place: Answer(reply.text, finish_reason=reply.finish_reason, tokens=reply.usage.completion_tokens)
            for place, reply in zip(prompts, replies, strict=True)
        }

    def _prompt(self, sample: Sample) -> Prompt:
        """Raises UserError, also for one that leaves no room for a reply."""
        if self.chats:
            prompt = self._processor.chat(messages(sample))
        else:
            prompt = self._processor.raw(sample.prompt, sample.pictures)
        length, most = len(prompt.input_ids), self.vlm.config.max_position_embeddings
        if not 0 < length < most:
            raise UserError(f"the prompt has {length} tokens; 1 to {most - 1} are possible")
        return prompt

    def __enter__(self) -> "LocalModel":
        return self

    def __exit__(self, *_: object) -> None:
        pass


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
