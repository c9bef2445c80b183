"""What inference computes, as plain functions to be compiled: prefill, decode steps, flushing, logits, scores.

A batch is B rows with a reply each. Its rows may have come in at different times, and grow by different numbers of
tokens at a step: `State` says of each row where its tokens are, which is all that a batch that requests join and leave
differs in from a static one. Which shapes there are, and what is compiled when, is the business of `decode.py` and
`slots.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwenvl_jax.inference.sampling import Array, Controls, sample
from qwenvl_jax.inference.speculation import NOTHING, draftable, drafted
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.nn import cache as kv_cache
from qwenvl_jax.nn.adapter_bank import with_chosen
from qwenvl_jax.nn.continued_attention import Continued
from qwenvl_jax.nn.int8_tokens import TokenArray, quantised, stored_like
from qwenvl_jax.nn.row_attention import PackedRows

CHUNK = 32  # tokens that a reply may grow by before its cache is flushed, and the most steps of one call
MOST_ALTERNATIVES = 20  # tokens whose log-probabilities are kept beside that of the chosen one


class Past(NamedTuple):
    """Keys and values that decode steps only read, [B, N, S, H] per layer."""

    k: list[TokenArray]
    v: list[TokenArray]

    @property
    def shape(self) -> tuple[int, int]:
        """B, S."""
        return self.k[0].shape[0], self.k[0].shape[2]


class Choice(NamedTuple):
    """How a token was chosen; shapes [B], [B, K], [B, K] for one token and [B, CHUNK, ...] for several.

    Natural logarithms of probabilities before penalties and temperature, zero in batches that ask for none.
    """

    logprob: jax.Array
    top_ids: jax.Array  # most likely first
    top_logprobs: jax.Array


class State(NamedTuple):
    """What decode steps change, for a batch of B replies. Passed on from call to call; the old one is used up."""

    recent_k: list[jax.Array]  # [B, N, CHUNK, H] per layer
    recent_v: list[jax.Array]
    taken: jax.Array  # bool [B, CHUNK], recent slots with a token of the row's reply
    lengths: jax.Array  # int32 [B], filled slots of the past
    last: jax.Array  # int32 [B], the newest token, not yet in the cache
    logits: jax.Array  # float32 [B, V], which it was chosen from
    counts: jax.Array  # int32 [B, V], how often the reply has each token
    generated: jax.Array  # int32 [B], tokens of the reply
    done: jax.Array  # bool [B]
    broken: jax.Array  # bool [B], some logit was no number; the reply is done
    # int32 [B, L], the tokens of the past and of the taken slots, which drafts are looked up in; None without drafts
    history: Any = None


class Fixed(NamedTuple):
    """What stays the same for a whole reply."""

    controls: Controls
    in_prompt: jax.Array  # bool [B, V], tokens of the prompt
    frequencies: Array  # float32 [B, R / 2] with R rotated dimensions
    shift: Array  # int32 [B], position of the first prompt token; 0 but for comparisons with left-padded batches
    adapter: Array | None = None  # int32 [B], the adapter of each row, 0 for none; None where the model has no bank


class Grown(NamedTuple):
    """What a call has added, in arrays of its own: the state itself goes on into the next call."""

    tokens: jax.Array  # int32 [B, CHUNK], those of each row first that the call has added. Of a prefill: [B, 1]
    choices: Choice | None  # None on the host, where nobody asks for them
    generated: jax.Array  # int32 [B]
    done: jax.Array  # bool [B]
    broken: jax.Array  # bool [B]


def encode(model: QwenVL, pixels: jax.Array) -> jax.Array:
    """pixels float32 [I, 3, S, S], normalised -> features [I, Q, D]."""
    return model.encode_images(pixels)


def forward(model: QwenVL, ids, slots, features, mask, positions, rotary):
    """Hidden states [B, T, D], and keys and values per layer, of tokens with nothing before them."""
    context = model.context(mask, positions, rotary)
    return model(model.embed(ids, features, slots), context)


def _causal(length: int) -> PackedRows:
    """The mask of right-padded prompts. Padding comes after the tokens of a row, so it is hidden from them anyway."""
    return PackedRows(jnp.ones((1, length), jnp.int32), longest=length)


def prefill(model: QwenVL, ids, slots, lengths, features, controls: Controls, rotary, shift, finished, adapter=None):
    """Reads prompts [B, T] and chooses the first token of each reply. Returns past, state, fixed and those tokens.

    adapter: int32 [B], or None for the base model, see `Fixed`.
    """
    model = with_chosen(model, adapter)
    rows, length = ids.shape
    positions = shift[:, None] + jnp.arange(length)
    hidden, kv = forward(model, ids, slots, features, _causal(length), positions, rotary)
    logits = model.logits(hidden[jnp.arange(rows), lengths - 1])

    real = jnp.where(jnp.arange(length) < lengths[:, None], ids, logits.shape[-1])
    in_prompt = jnp.zeros(logits.shape, bool).at[jnp.arange(rows)[:, None], real].set(True, mode="drop")
    caches = [kv_cache.start(k, v, CHUNK) for k, v in kv]
    return _begun(caches, logits, Fixed(controls, in_prompt, rotary, shift, adapter), finished, lengths)


def prefill_each(model: QwenVL, *prompts, **options) -> tuple[list[tuple[Past, State, Fixed]], Grown]:
    """`prefill` with each row as a batch of its own, for those that stay together no longer."""
    *together, first = prefill(model, *prompts, **options)
    rows = range(len(first.generated))
    return [jax.tree.map(lambda part, row=row: part[row : row + 1], tuple(together)) for row in rows], first


def extend(
    model: QwenVL,
    ids,
    slots,
    length,
    features,
    controls: Controls,
    rotary,
    in_prompt,
    start,
    finished,
    adapter,
    *,
    past: Past,
) -> tuple[Past, State, Fixed, Grown]:
    """Reads the tokens [B, T] of prompts from `start` on, where those before are in the past; else like `prefill`.

    length int32 [B]: how many of the T are tokens; start int32 [1], the same for all; in_prompt bool [B, V]. The past
    [B, N, P, H] must have room for all T after `start`; what it has there is not kept.
    """
    model = with_chosen(model, adapter)
    rows, tokens = ids.shape
    known = (jnp.arange(past.shape[1]) < start)[None, None, :]

    def cleared(part):  # no mask hides what is no number
        return jnp.where(jnp.expand_dims(known, range(3, part.ndim)), part, jnp.zeros_like(part))

    past = jax.tree.map(cleared, past)
    context = model.context(Continued(start), start[:, None] + jnp.arange(tokens), rotary)
    embedded = model.embed(ids, features, slots)
    caches = [kv_cache.with_recent(k, v, CHUNK, embedded.dtype) for k, v in zip(*past, strict=True)]
    hidden, kv = model(embedded, context, caches)
    logits = model.logits(hidden[jnp.arange(rows), length - 1])

    def filled(old, new):
        def written(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new, start[0], axis=2)

        return jax.tree.map(written, old, stored_like(old, new.transpose(0, 2, 1, 3)))

    caches = [
        cache._replace(past_k=filled(cache.past_k, k), past_v=filled(cache.past_v, v))
        for cache, (k, v) in zip(caches, kv, strict=True)
    ]
    fixed = Fixed(controls, in_prompt, rotary, jnp.zeros(rows, jnp.int32), adapter)
    return _begun(caches, logits, fixed, finished, start + length)


def branch(
    model: QwenVL,
    begun: Past,
    in_prompt,
    index,
    start,
    ids,
    slots,
    lengths,
    features,
    controls: Controls,
    rotary,
    finished,
    room: int,
) -> tuple[Past, State, Fixed, Grown]:
    """`extend` for prompts that begin alike: what they begin with, `start` tokens each, has been read once.

    begun: [U, N, P, H] per layer, with bool in_prompt [U, V] of its tokens; index int32 [B], which of them each row
    begins with. room: slots of the past that comes of it.
    """
    past = jax.tree.map(lambda tokens: tokens[index], begun)
    past = Past(*([kv_cache.resized(tokens, room) for tokens in side] for side in past))
    rows = jnp.arange(len(ids))[:, None]
    real = jnp.where(jnp.arange(ids.shape[1]) < lengths[:, None], ids, in_prompt.shape[1])
    in_prompt = in_prompt[index].at[rows, real].set(True, mode="drop")
    return extend(model, ids, slots, lengths, features, controls, rotary, in_prompt, start, finished, None, past=past)


def together(first: tuple, second: tuple, index) -> tuple[Past, State, Fixed, Grown]:
    """Two batches as one, the rows in the order of index int32 [B]."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[index], first, second)


def some_rows(past: Past, state: State, fixed: Fixed, index) -> tuple[Past, State, Fixed]:
    """The rows int32 [B'] of a batch."""
    return jax.tree.map(lambda part: part[index], (past, state, fixed))


def _begun(
    caches: list[kv_cache.LayerCache], logits: jax.Array, fixed: Fixed, finished: jax.Array, lengths: jax.Array
) -> tuple[Past, State, Fixed, Grown]:
    """Replies with their first tokens, chosen from logits float32 [B, V]; lengths int32 [B], of the prompts."""
    rows = len(logits)
    state = State(
        recent_k=[cache.recent_k for cache in caches],
        recent_v=[cache.recent_v for cache in caches],
        taken=jnp.zeros((rows, CHUNK), bool),
        lengths=lengths,
        last=jnp.zeros(rows, jnp.int32),
        logits=logits,
        counts=jnp.zeros(logits.shape, jnp.int32),
        generated=jnp.zeros(rows, jnp.int32),
        done=finished,
        broken=jnp.zeros(rows, bool),
    )
    state, chosen = choose(state, logits[:, None], state.last[:, None], fixed)
    choice = jax.tree.map(lambda part: part[:, None], chosen.choice)
    first = Grown(chosen.tokens, choice, state.generated, state.done, state.broken)
    return Past([cache.past_k for cache in caches], [cache.past_v for cache in caches]), state, fixed, first


class Chosen(NamedTuple):
    """What one step has chosen. The added tokens of a row come first."""

    tokens: jax.Array  # int32 [B, T]
    added: jax.Array  # bool [B, T]
    choice: Choice  # how the first one was


def choose(state: State, logits: jax.Array, read: jax.Array, fixed: Fixed) -> tuple[State, Chosen]:
    """The state with the next tokens of every reply that is not done.

    read int32 [B, T]: the newest token and drafts of those after it, NOTHING where there is none; logits float32
    [B, T, V]: what the model says after each. A reply grows by one token, and by another one for every draft that is
    what the model says: what it gets is what it would get one by one.
    """
    controls, rows = fixed.controls, jnp.arange(len(read))
    tokens, added = [], []
    ended, may_go_on = state.done, draftable(controls, state.generated)
    wanted = jnp.any(controls.logprobs & ~state.done)
    for place in range(read.shape[1]):
        here = logits[:, place]
        if place == 0:
            token, going = sample(here, controls, fixed.in_prompt, state.counts, state.generated), ~ended
            choice = described(here, token, wanted)
        else:
            going &= ~ended & may_go_on & (read[:, place] == token)
            token = jnp.argmax(here, axis=-1).astype(jnp.int32)
        generated = state.generated + going
        broken = ~jnp.all(jnp.isfinite(here), axis=-1) & going
        ended = controls.stops[rows, token] | (generated >= controls.max_new_tokens) | broken
        state = state._replace(
            last=jnp.where(going, token, state.last) if place else token,
            logits=jnp.where(going[:, None], here, state.logits) if place else here,
            counts=state.counts.at[rows, token].add(going.astype(jnp.int32)),
            generated=generated,
            done=state.done | (ended & going),
            broken=state.broken | broken,
        )
        tokens.append(token)
        added.append(going)
    return state, Chosen(jnp.stack(tokens, axis=1), jnp.stack(added, axis=1), choice)


def described(logits: jax.Array, token: jax.Array, wanted: jax.Array) -> Choice:
    """The log-probabilities of the chosen tokens int [B] and of the most likely ones, where `wanted` (bool [])."""
    most = min(MOST_ALTERNATIVES, logits.shape[-1])

    def measured(logits):
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        top, ids = jax.lax.top_k(logprobs, most)
        return Choice(jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0], ids.astype(jnp.int32), top)

    def nothing(logits):
        rows = logits.shape[0]
        return Choice(jnp.zeros(rows), jnp.zeros((rows, most), jnp.int32), jnp.zeros((rows, most)))

    return jax.lax.cond(wanted, measured, nothing, logits)


def decode(
    model: QwenVL, past: Past, fixed: Fixed, used, end, stopped, *, state: State, drafts: int = 0
) -> tuple[State, Grown]:
    """Decode steps into the recent slots from `used` to `end`, fewer when every reply is done.

    A step takes 1 + drafts slots and adds as many tokens to a reply at most, where the state has a history to look for
    drafts in. stopped bool [B]: replies that have ended for a reason the model does not know.
    """
    model = with_chosen(model, fixed.adapter)
    batch, slots = past.shape
    width, most = 1 + drafts, min(MOST_ALTERNATIVES, state.logits.shape[-1])
    choices = Choice(
        jnp.zeros((batch, CHUNK)), jnp.zeros((batch, CHUNK, most), jnp.int32), jnp.zeros((batch, CHUNK, most))
    )
    before, rows = state.generated, jnp.arange(batch)

    def step(carry):
        at, state, tokens, choices = carry
        read, positions = state.last[:, None], state.lengths + jnp.sum(state.taken, axis=1)
        if state.history is not None:
            history, read = drafted(state.history, state.last, positions, drafts)
            state = state._replace(history=history)
        mask = kv_cache.cached_mask(state.lengths, slots, state.taken, at, width)
        positions = (fixed.shift + positions)[:, None] + jnp.arange(width)
        context = model.context(mask, positions, jnp.asarray(fixed.frequencies), cache_slot=at)
        layers = zip(past.k, past.v, state.recent_k, state.recent_v, strict=True)
        caches = [kv_cache.LayerCache(*layer) for layer in layers]
        hidden, caches = model(model.embed(jnp.where(read == NOTHING, 0, read)), context, caches)
        state = state._replace(recent_k=[c.recent_k for c in caches], recent_v=[c.recent_v for c in caches])
        old = state.generated
        state, chosen = choose(state, model.logits(hidden), read, fixed)
        taken = jax.lax.dynamic_update_slice_in_dim(state.taken, chosen.added, at, axis=1)
        targets = jnp.where(chosen.added, (old - before)[:, None] + jnp.arange(width), CHUNK)
        tokens = tokens.at[rows[:, None], targets].set(chosen.tokens, mode="drop")
        choices = jax.tree.map(
            lambda all, new: all.at[rows, targets[:, 0]].set(new, mode="drop"), choices, chosen.choice
        )
        return at + width, state._replace(taken=taken), tokens, choices

    def unfinished(carry):
        at, state, *_ = carry
        return (at + width <= end) & ~jnp.all(state.done)

    start = (used, state._replace(done=state.done | stopped), jnp.zeros((batch, CHUNK), jnp.int32), choices)
    _, state, tokens, choices = jax.lax.while_loop(unfinished, step, start)
    return state, Grown(tokens, choices, state.generated, state.done, state.broken)


def flush(past: Past, recent_k, recent_v, lengths, taken, slots: int) -> tuple[Past, jax.Array, jax.Array]:
    """The past, of `slots` slots, with all recent tokens behind the filled ones of each row; then as `settled`."""
    layers = zip(past.k, past.v, recent_k, recent_v, strict=True)
    caches = [kv_cache.flush(kv_cache.LayerCache(*layer), lengths, taken, slots) for layer in layers]
    return Past([cache.past_k for cache in caches], [cache.past_v for cache in caches]), *settled(lengths, taken)


def settled(lengths: jax.Array, taken: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`State.lengths` and `State.taken` once the recent tokens are in the past."""
    return lengths + jnp.sum(taken, axis=1), jnp.zeros_like(taken)


def in_int8(past: tuple[list[jax.Array], list[jax.Array]]) -> Past:
    """A past in 8 bits."""
    k, v = past
    return Past([quantised(tokens) for tokens in k], [quantised(tokens) for tokens in v])


def all_logits(model: QwenVL, ids, slots, lengths, features, valid, rotary) -> jax.Array:
    """float32 [B, T, V] of whole sequences; valid bool [B, T]."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    rows = PackedRows(valid.astype(jnp.int32), longest=ids.shape[1])
    return model.logits(forward(model, ids, slots, features, rows, positions, rotary)[0])


def score(model: QwenVL, ids, slots, lengths, features, rotary, positions, targets) -> jax.Array:
    """float32 [B, K]: log-likelihood of targets int [B, K] as the tokens after positions int [B, K]."""
    every = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden, _ = forward(model, ids, slots, features, _causal(ids.shape[1]), every, rotary)
    logits = model.logits(jnp.take_along_axis(hidden, positions[..., None], axis=1))
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
