"""Prompt lookup: guesses the next tokens of a reply from what followed the same tokens earlier in its prompt or itself.

A model that reads out a text, fills in a form or repeats its question says again what is there. A step then reads the
newest token together with such drafts and keeps those that it would have said itself (speculative decoding, Leviathan
et al. 2023, with the drafts of Saxena 2023 and no second model). Which ones these are is decided in `steps.py`.
"""

import jax
import jax.numpy as jnp

from qwenvl_jax.inference.sampling import Array, Controls

NOTHING = -1  # in place of a draft
LONGEST = 3  # tokens that must be the same; where so many are not, one fewer
SHORTEST = 2


def drafted(history: jax.Array, last: jax.Array, known: jax.Array, drafts: int) -> tuple[jax.Array, jax.Array]:
    """The history with the newest tokens, and these with drafts after them, int32 [B, 1 + drafts].

    history int32 [B, L], of which the first `known` (int32 [B]) tokens are those before `last` (int32 [B]). Drafts are
    what followed the latest earlier place with the same last tokens: NOTHING where there is no such place.
    """
    rows, length = jnp.arange(len(last)), history.shape[1]
    history = history.at[rows, known].set(last, mode="drop")
    places = jnp.arange(length)
    same, found = jnp.ones(history.shape, bool), jnp.zeros(len(last), jnp.int32)
    for count in range(1, LONGEST + 1):
        # Whether the token so far before each place is the one so far before the newest.
        back = count - 1
        token = jnp.take_along_axis(history, jnp.maximum(known - back, 0)[:, None], axis=1)
        same &= (jnp.roll(history, back, axis=1) == token) & (places >= back)
        if count >= SHORTEST:
            latest = jnp.max(jnp.where(same & (places < known[:, None]), places + 1, 0), axis=1)
            found = jnp.where(latest > 0, latest, found)
    next = found[:, None] + jnp.arange(drafts)
    guesses = jnp.take_along_axis(history, jnp.minimum(next, length - 1), axis=1)
    guesses = jnp.where((found[:, None] > 0) & (next <= known[:, None]), guesses, NOTHING)
    return history, jnp.concatenate([last[:, None], guesses], axis=1)


def draftable(controls: Controls, generated: Array) -> Array:
    """bool [B]: replies whose next tokens are those that the model finds most likely, and nothing else.

    generated int32 [B]: tokens of the replies so far. On the host where both are.
    """
    changed = (controls.repetition_penalty != 1) | (controls.presence_penalty != 0) | (controls.frequency_penalty != 0)
    changed = changed | (controls.bias != 0).any(axis=1) | controls.constrained | controls.logprobs
    return (controls.temperature == 0) & ~changed & (generated >= controls.min_new_tokens)
