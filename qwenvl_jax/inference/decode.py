"""The compiled programs of inference: encoding pictures, prefill, decode steps, and plain logits.

Every length is rounded up to a bucket, and what differs between two calls of a bucket (options, lengths, positions,
rotary frequencies) is data, so a program is compiled once per bucket. Rows are right-padded and independent: a prompt
gets the same tokens alone and in a batch. Not here: text, stop strings and the loop over a reply (`generate.py`).
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.inference.sampling import Array, Controls, sample
from qwenvl_jax.models.qwen_vl import QwenVL, frequencies, unstack
from qwenvl_jax.nn import cache as kv_cache
from qwenvl_jax.nn.attention import causal_mask
from qwenvl_jax.processing.template import Prompt

CHUNK = 32  # tokens that a reply may grow by before its cache is flushed, and the most steps of one call
SHORTEST_BUCKET = 64
MOST_PICTURES = 8  # encoded at once


def bucket(number: int, least: int = 1) -> int:
    """The smallest power of two times `least` that is not less than `number`."""
    size = least
    while size < number:
        size *= 2
    return size


def length_bucket(length: int) -> int:
    """The padded length of prompts and caches."""
    return bucket(length, SHORTEST_BUCKET)


class Past(NamedTuple):
    """Keys and values that decode steps only read, [B, N, S, H] per layer."""

    k: list[jax.Array]
    v: list[jax.Array]


class State(NamedTuple):
    """What decode steps change, for a batch of B replies. Passed on from call to call; the old one is used up."""

    recent_k: list[jax.Array]  # [B, N, CHUNK, H] per layer
    recent_v: list[jax.Array]
    tokens: jax.Array  # int32 [B, CHUNK]: slot i holds the token that followed the one in recent slot i
    last: jax.Array  # int32 [B], the newest token, not yet in the cache
    logits: jax.Array  # float32 [B, V], which it was chosen from
    counts: jax.Array  # int32 [B, V], how often the reply has each token
    generated: jax.Array  # int32 [B], tokens of the reply
    done: jax.Array  # bool [B]


class Fixed(NamedTuple):
    """What stays the same for a whole reply."""

    controls: Controls
    in_prompt: jax.Array  # bool [B, V], tokens of the prompt
    frequencies: Array  # float32 [B, R / 2] with R rotated dimensions
    shift: Array  # int32 [B], position of the first prompt token; 0 but for comparisons with left-padded batches


class Batch(NamedTuple):
    """Prompts of one bucket as arrays. Rows beyond `rows` are empty and finished from the start."""

    ids: np.ndarray  # int32 [B, T]
    slots: np.ndarray  # int32 [B, T], rows of the features, -1 at text
    lengths: np.ndarray  # int32 [B]
    features: jax.Array  # [I, Q, D]


class Generator:
    """A model ready for inference. `compilations` counts the programs compiled so far. Threads may share it."""

    def __init__(self, model: QwenVL):
        self.config = model.config
        self.compilations = 0
        self._lock = threading.RLock()
        self.load(model)
        self._encode = self._program(_encode)
        self._prefill = self._program(_prefill)
        self._decode = self._program(_decode, donate="state")
        self._logits = self._program(_logits)
        self._score = self._program(_score)
        # A past that stays as long as it was is filled in place.
        self._flush = self._plain_program(_flush, donate_argnames=("past",), static_argnames=("slots",))
        self._grow = self._plain_program(_flush, static_argnames=("slots",))

    def load(self, model: QwenVL) -> None:
        """Goes on with the weights of another model of the same shapes and types, by the programs compiled so far."""
        self._leaves, self._structure = jax.tree.flatten(unstack(model))

    def unload(self) -> None:
        """Lets go of the weights, for a loop that trains them; `load` brings the next ones."""
        self._leaves = []

    def _program(self, function: Callable, donate: str | None = None) -> Callable:
        """`function(model, ...)` compiled, to be called with the model's arrays in place of the model.

        The model is taken apart once: walking through its modules would cost more than a decode step of a small model.
        """

        def on_leaves(leaves, *args, **kwargs):
            return function(jax.tree.unflatten(self._structure, leaves), *args, **kwargs)

        return self._plain_program(functools.wraps(function)(on_leaves), donate_argnames=donate)

    def _plain_program(self, function: Callable, **options: Any) -> Callable:
        @functools.wraps(function)
        def counted(*args, **kwargs):
            self.compilations += 1  # runs once per compilation, when the program is traced
            return function(*args, **kwargs)

        return jax.jit(counted, **options)

    def encode_images(self, pixels: np.ndarray) -> jax.Array:
        """pixels float32 [I, 3, S, S], normalised -> features [bucket(I), Q, D], zeros after the first I."""
        size = bucket(len(pixels))
        parts = []
        with self._lock:
            for start in range(0, size, MOST_PICTURES):
                part = pixels[start : start + MOST_PICTURES]
                padded = np.zeros((min(size, MOST_PICTURES), *pixels.shape[1:]), np.float32)
                padded[: len(part)] = part
                parts.append(self._encode(self._leaves, padded))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def batch(self, prompts: Sequence[Prompt], room: int = 0, features: jax.Array | None = None) -> Batch:
        """Prompts as one batch of their bucket, with their pictures encoded.

        Where the prompts share their pictures, give the `features` [I, Q, D] of these. Raises UserError for an empty
        prompt and for one that leaves no `room` tokens within the model's positions.
        """
        lengths = [len(prompt.input_ids) for prompt in prompts]
        most = self.config.max_position_embeddings
        if min(lengths) == 0:
            raise UserError("the prompt is empty; give it at least one token")
        if max(lengths) + room > most:
            raise UserError(
                f"the prompt has {max(lengths)} tokens; the model has {most} positions (max_position_embeddings)"
                + (", and a reply needs some. " if room else ". ")
                + "Shorten the conversation or leave out pictures"
            )
        rows, length = bucket(len(prompts)), length_bucket(max(lengths))
        ids, slots = np.zeros((rows, length), np.int32), np.full((rows, length), -1, np.int32)
        queries, pictures = self.config.visual.n_queries, 0
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]] = prompt.input_ids
            at_picture = prompt.image_slots >= 0
            slots[row, : lengths[row]] = np.where(at_picture, prompt.image_slots + pictures * queries, -1)
            pictures += len(prompt.pixels) if features is None else 0
        if pictures:
            features = self.encode_images(np.concatenate([prompt.pixels for prompt in prompts]))
        elif features is None:
            # A text is a batch whose one picture is nowhere, so that it needs no program of its own.
            features = jnp.zeros((1, queries, self.config.hidden_size), self._leaves[0].dtype)
        lengths += [1] * (rows - len(lengths))
        return Batch(ids, slots, np.array(lengths, np.int32), features)

    def prefill(
        self, batch: Batch, controls: Controls, shift: np.ndarray | None = None, rotary: np.ndarray | None = None
    ) -> tuple[Past, State, Fixed]:
        """Reads the prompts and chooses the first token of each reply.

        Rows past the number of rows in `controls` count as finished. shift int [B] and rotary float32 [B, R / 2] set
        the first position and the frequencies of each row, which otherwise come from its own length.
        """
        rows = len(batch.lengths)
        shift = np.zeros(rows, np.int32) if shift is None else _rows(shift, rows).astype(np.int32)
        rotary = frequencies(self.config, batch.lengths) if rotary is None else _rows(rotary, rows)
        finished = np.arange(rows) >= len(controls.temperature)
        padded = jax.tree.map(lambda values: _rows(values, rows), controls)
        with self._lock:
            past, state, in_prompt = self._prefill(self._leaves, *batch, padded, rotary, shift, finished)
        return past, state, Fixed(padded, in_prompt, rotary, shift)

    def decode(
        self, past: Past, state: State, fixed: Fixed, lengths: np.ndarray, used: int, steps: int, stopped: np.ndarray
    ) -> State:
        """At most `steps` more tokens of every reply, fewer when all are done.

        lengths int32 [B]: filled slots of `past`; used: filled slots of the recent part, used + steps <= CHUNK; stopped
        bool [B]: replies that have ended for a reason the model does not know.
        """
        with self._lock:
            return self._decode(
                self._leaves, past, fixed, lengths, np.int32(used), np.int32(used + steps), stopped, state=state
            )

    def flush(self, past: Past, state: State, lengths: np.ndarray, slots: int) -> Past:
        """Moves the full recent part behind the first `lengths` slots of the past, which then has `slots` slots."""
        same = past.k[0].shape[2] == slots
        with self._lock:
            program = self._flush if same else self._grow
            return program(past=past, recent_k=state.recent_k, recent_v=state.recent_v, lengths=lengths, slots=slots)

    def logits(self, batch: Batch, valid: np.ndarray, rotary: np.ndarray) -> jax.Array:
        """float32 [B, T, V] of whole sequences; valid bool [B, T] (False: padding); rotary as in `prefill`."""
        with self._lock:
            return self._logits(self._leaves, *batch, valid, rotary)

    def score(self, batch: Batch, positions: np.ndarray, targets: np.ndarray) -> jax.Array:
        """float32 [B, K]: log-likelihood of targets int [B, K] as the tokens after positions int [B, K]."""
        with self._lock:
            return self._score(self._leaves, *batch, frequencies(self.config, batch.lengths), positions, targets)


def _rows(values: np.ndarray, rows: int) -> np.ndarray:
    """`values` with as many rows as the batch; the last one is repeated."""
    values = np.asarray(values)
    return np.concatenate([values, np.repeat(values[-1:], rows - len(values), axis=0)])


def _encode(model: QwenVL, pixels: jax.Array) -> jax.Array:
    return model.encode_images(pixels)


def _forward(model: QwenVL, ids, slots, features, mask, positions, rotary):
    context = model.context(mask, positions, rotary)
    return model(model.embed(ids, features, slots), context)


def _prefill(model: QwenVL, ids, slots, lengths, features, controls, rotary, shift, finished):
    rows, length = ids.shape
    # Padding comes after the tokens of a row, so the causal mask hides it.
    mask = causal_mask(jnp.ones((1, length), bool))
    positions = shift[:, None] + jnp.arange(length)
    hidden, kv = _forward(model, ids, slots, features, mask, positions, rotary)
    logits = model.logits(hidden[jnp.arange(rows), lengths - 1])

    vocabulary = logits.shape[-1]
    real = jnp.where(jnp.arange(length) < lengths[:, None], ids, vocabulary)
    in_prompt = jnp.zeros(logits.shape, bool).at[jnp.arange(rows)[:, None], real].set(True, mode="drop")
    caches = [kv_cache.start(k, v, CHUNK) for k, v in kv]
    state = State(
        recent_k=[cache.recent_k for cache in caches],
        recent_v=[cache.recent_v for cache in caches],
        tokens=jnp.zeros((rows, CHUNK), jnp.int32),
        last=jnp.zeros(rows, jnp.int32),
        logits=logits,
        counts=jnp.zeros(logits.shape, jnp.int32),
        generated=jnp.zeros(rows, jnp.int32),
        done=finished,
    )
    state = _chosen(state, logits, controls, in_prompt)
    return Past([cache.past_k for cache in caches], [cache.past_v for cache in caches]), state, in_prompt


def _chosen(state: State, logits: jax.Array, controls: Controls, in_prompt: jax.Array) -> State:
    """The state with the next token of every reply that is not done."""
    token = sample(logits, controls, in_prompt, state.counts, state.generated)
    going = ~state.done
    generated = state.generated + going
    ended = controls.stops[jnp.arange(len(token)), token] | (generated >= controls.max_new_tokens)
    return state._replace(
        last=token,
        logits=logits,
        counts=state.counts.at[jnp.arange(len(token)), token].add(going.astype(jnp.int32)),
        generated=generated,
        done=state.done | ended,
    )


def _decode(model: QwenVL, past: Past, fixed: Fixed, lengths, used, end, stopped, *, state: State) -> State:
    slots = past.k[0].shape[2]

    def step(carry):
        at, state = carry
        mask = kv_cache.cached_mask(lengths, slots, at, CHUNK)
        positions = (fixed.shift + lengths + at)[:, None]
        context = model.context(mask, positions, jnp.asarray(fixed.frequencies), cache_slot=at)
        layers = zip(past.k, past.v, state.recent_k, state.recent_v, strict=True)
        caches = [kv_cache.LayerCache(*layer) for layer in layers]
        hidden, caches = model(model.embed(state.last[:, None]), context, caches)
        state = state._replace(recent_k=[c.recent_k for c in caches], recent_v=[c.recent_v for c in caches])
        state = _chosen(state, model.logits(hidden[:, 0]), fixed.controls, fixed.in_prompt)
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, state.last[:, None], at, axis=1)
        return at + 1, state._replace(tokens=tokens)

    def unfinished(carry):
        at, state = carry
        return (at < end) & ~jnp.all(state.done)

    return jax.lax.while_loop(unfinished, step, (used, state._replace(done=state.done | stopped)))[1]


def _flush(past: Past, recent_k, recent_v, lengths, slots: int) -> Past:
    layers = zip(past.k, past.v, recent_k, recent_v, strict=True)
    caches = [kv_cache.flush(kv_cache.LayerCache(*layer), lengths, slots) for layer in layers]
    return Past([cache.past_k for cache in caches], [cache.past_v for cache in caches])


def _logits(model: QwenVL, ids, slots, lengths, features, valid, rotary):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return model.logits(_forward(model, ids, slots, features, causal_mask(valid), positions, rotary)[0])


def _score(model: QwenVL, ids, slots, lengths, features, rotary, positions, targets):
    every = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden, _ = _forward(model, ids, slots, features, causal_mask(jnp.ones((1, ids.shape[1]), bool)), every, rotary)
    logits = model.logits(jnp.take_along_axis(hidden, positions[..., None], axis=1))
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
