"""Runs a batch of prompts to the end of their replies: calls the compiled programs and makes text of the new tokens.

Which prompts share a batch, and what a reply looks like to a user, is the caller's business.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import numpy as np

from qwenvl_jax.inference.decode import Batch, Generator, length_bucket
from qwenvl_jax.inference.sampling import SamplingOptions, controls
from qwenvl_jax.inference.steps import CHUNK, State
from qwenvl_jax.inference.text import TextStream
from qwenvl_jax.processing.template import Prompt

STEPS_BETWEEN_CHECKS = 8  # tokens between two looks for stop strings; what comes after one is lost work
FEW = 8  # rows that stay together to the end; of more, the last quarter goes on without the others
STEPS_OF_MANY = 4  # tokens between two looks for whether that is so


FinishReason = Literal["stop", "length"]


class Generation:
    """A batch of prompts whose replies are being generated.

    generator: the model. prompts, options: one each per row. stop_ids: tokens that end every reply. shift, rotary: see
    `Generator.prefill`. Raises UserError for a prompt that does not fit the model.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Prompt],
        options: Sequence[SamplingOptions],
        stop_ids: Sequence[int] = (),
        *,
        shift: np.ndarray | None = None,
        rotary: np.ndarray | None = None,
    ):
        self._generator = generator
        self._controls = controls(options, stop_ids, generator.config.vocab_size)
        batch = generator.batch(prompts, room=1)
        room = generator.config.max_position_embeddings - batch.lengths[: len(prompts)]
        self._controls = self._controls._replace(max_new_tokens=np.minimum(self._controls.max_new_tokens, room))
        self._batch: Batch | None = batch  # until it is read
        self._start = shift, rotary
        self._state: State | None = None
        self._rows = np.arange(len(prompts))  # which prompts have rows in the state; those that fill a bucket follow
        self._lengths = batch.lengths[: len(prompts)].copy()  # filled slots of the past
        self._used = 0  # filled slots of the recent part
        self._stopped = np.zeros(len(batch.lengths), bool)  # rows whose replies the caller has ended
        self._done = np.zeros(len(prompts), bool)
        self.generated = np.zeros(len(prompts), np.int32)  # tokens of each reply so far, a stop token included
        self.finish_reasons: list[FinishReason] = ["length"] * len(prompts)  # final when the reply is done

    @property
    def finished(self) -> bool:
        """Whether all replies are done."""
        return bool(np.all(self._done))

    @property
    def logits(self) -> np.ndarray:
        """float32 [B, V]: what the newest token of each reply in progress was chosen from, after an `advance`."""
        assert self._state is not None
        logits = np.zeros((len(self._done), self._state.logits.shape[1]), np.float32)
        logits[self._rows] = np.asarray(self._state.logits)[: len(self._rows)]
        return logits

    @property
    def rows(self) -> int:
        """How many are computed together."""
        return len(self._stopped)

    def stop(self, row: int) -> None:
        """Ends a reply."""
        self._stopped[: len(self._rows)] |= self._rows == row
        self._done[row] = True
        self.finish_reasons[row] = "stop"

    def advance(self, steps: int = CHUNK) -> list[list[int]]:
        """The next tokens of each reply, at most `steps` (the first call: one), without the stop token at its end."""
        if self._batch is not None:
            self._past, self._state, self._fixed, first = self._generator.prefill(
                self._batch, self._controls, *self._start
            )
            self._batch = None
            tokens, generated, done = self._fetch(first.tokens, first.generated, first.done)
        else:
            assert self._state is not None
            self._leave_behind()
            if self._used == CHUNK:
                self._flush(self._state)
            steps = min(steps, CHUNK - self._used)
            self._state, grown = self._generator.decode(
                self._past, self._state, self._fixed, self._used, self._used + steps, self._stopped
            )
            tokens, generated, done = self._fetch(grown.tokens, grown.generated, grown.done)
            # Some reply has grown at every step, or the steps would have ended.
            self._used += int(np.max(generated - self.generated[self._rows]))
        new: list[list[int]] = [[] for _ in self._done]
        counts = generated - self.generated[self._rows]
        for row, ids, count, ended in zip(self._rows, tokens, counts, done, strict=True):
            new[row] = ids[:count].tolist()
            if count and self._controls.stops[row, new[row][-1]] and ended:
                new[row].pop()
                self.finish_reasons[row] = "stop"
        self.generated[self._rows] = generated
        self._done[self._rows] |= done
        return new

    def _fetch(self, *arrays: jax.Array) -> list[np.ndarray]:
        """Arrays [rows, ...] on the host, without the rows that fill the bucket."""
        return [value[: len(self._rows)] for value in jax.device_get(arrays)]

    def _leave_behind(self) -> None:
        """Goes on with a quarter of the rows, once that holds all replies that are not done."""
        live, size = np.flatnonzero(~self._done[self._rows]), self.rows // 4
        if self.rows <= FEW or not 0 < len(live) <= size:
            return
        assert self._state is not None
        index = np.pad(live, (0, size - len(live)), mode="edge").astype(np.int32)
        self._past, self._state, self._fixed = self._generator.some_rows(self._past, self._state, self._fixed, index)
        self._rows, self._stopped = self._rows[live], np.arange(size) >= len(live)

    def _flush(self, state: State) -> None:
        longest = np.max(self._lengths[~self._done])
        slots = max(self._past.shape[1], length_bucket(longest + CHUNK))
        self._past, self._state = self._generator.flush(self._past, state, slots)
        self._lengths = self._lengths + np.int32(CHUNK)
        self._used = 0


def pieces(generation: Generation, streams: Sequence[TextStream], interval: float | None = None) -> Iterator[list[str]]:
    """New text of each reply as it comes, until all are done.

    `streams` take the rows' tokens, and end a reply where they find a stop string. interval: seconds between two
    pieces, as far as the model is fast enough; by default as few calls as can be.
    """
    steps = CHUNK if interval is None else 1
    if interval is None and any(stream.has_stop for stream in streams):
        steps = STEPS_BETWEEN_CHECKS
    while not generation.finished:
        start = time.perf_counter()
        new = generation.advance(steps if generation.rows <= FEW else min(steps, STEPS_OF_MANY))
        texts = []
        for row, (stream, ids) in enumerate(zip(streams, new, strict=True)):
            texts.append(stream.feed(ids))
            if stream.stopped:
                generation.stop(row)
        yield texts
        if interval is not None:
            per_step = (time.perf_counter() - start) / max(max(map(len, new)), 1)
            steps = min(max(int(interval / per_step), 1), CHUNK)
    yield [stream.finish() for stream in streams]
