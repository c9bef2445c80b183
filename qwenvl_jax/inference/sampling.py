"""Choosing the next token: options as a user gives them, and the compiled choice for a batch of rows with options each.

The order of the steps is that of Hugging Face's `generate` and of vLLM: bias, penalties, minimum length, temperature,
top-k, top-p, min-p, and then the draw. Nothing here knows a model or a text.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.config import UserError

# Below this a temperature means greedy: dividing by it would overflow.
SMALLEST_TEMPERATURE = 1e-5
MOST_BIASED = 300  # tokens with a logit bias in one request


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How a reply is generated. Raises UserError naming the field that is out of range.

    The defaults are greedy. Draws depend on the seed and the token's number in the reply alone, so a prompt gets the
    same reply whatever else is in the batch, and again the next time; another seed gives another reply.
    """

    temperature: float = 0.0  # 0 is greedy: the most likely token
    top_p: float = 1.0  # draw from the smallest set of tokens this probable (Holtzman et al. 2020); 1 is off
    top_k: int = 0  # draw from this many tokens; 0 is off
    min_p: float = 0.0  # drop tokens less likely than this share of the most likely one; 0 is off
    repetition_penalty: float = 1.0  # scales logits of tokens of prompt and reply (Keskar et al. 2019); 1 is off
    presence_penalty: float = 0.0  # taken from the logits of tokens that the reply already has (OpenAI's definition)
    frequency_penalty: float = 0.0  # taken as often as the token occurs in the reply (OpenAI's definition)
    seed: int = 0
    max_new_tokens: int = 512
    min_new_tokens: int = 0  # before so many tokens nothing stops the reply
    stop: Sequence[str] = ()  # strings that end the reply and are not part of it
    stop_ids: Sequence[int] = ()  # tokens that do, besides those of the model
    # Added to the logits of these tokens (OpenAI's definition: -100 bans and 100 forces), at most MOST_BIASED of them.
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        one_string = isinstance(self.stop, str)
        object.__setattr__(self, "stop", (self.stop,) if one_string else _strings("stop", self.stop))
        object.__setattr__(self, "stop_ids", _integers("stop_ids", self.stop_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if "" in self.stop:
            raise UserError("stop: an empty string would end every reply at once; leave it out")
        for name, least, most in (
            ("temperature", 0.0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, math.inf),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            _check_number(name, getattr(self, name), least, most)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise UserError(f"{name} must be greater than 0; 1 switches it off")
        for name, least, most in (
            ("top_k", 0, 2**31 - 1),
            ("seed", 0, 2**64 - 1),
            ("max_new_tokens", 1, 2**31 - 1),
            ("min_new_tokens", 0, 2**31 - 1),
        ):
            _check_integer(name, getattr(self, name), least, most)
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")

    def replace(self, changes: dict[str, Any]) -> "SamplingOptions":
        """These options with `changes`. Raises UserError for a name that there is not, with the nearest one."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
                raise UserError(f"unknown option {name!r}; {hint}")
        return dataclasses.replace(self, **changes)


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise UserError(f"{name} {value!r} is not a number")
    if value < least:
        raise UserError(f"{name} {value} must be at least {least:g}")
    if value > most:
        raise UserError(f"{name} {value} must be at most {most:g}")


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{name} {value!r} is not a whole number")
    if value < least:
        raise UserError(f"{name} {value} must be at least {least}")
    if value > most:
        raise UserError(f"{name} {value} must be at most {most}")


def _strings(name: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{name} must be a string or a list of strings, not {values!r}")
    return tuple(values)


def _biases(values: Any) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise UserError(f"logit_bias must map token ids to numbers, not {values!r}")
    if len(values) > MOST_BIASED:
        raise UserError(f"logit_bias has {len(values)} tokens; at most {MOST_BIASED} are possible")
    for token, bias in values.items():
        _check_integer("logit_bias: the token id", token, 0, 2**31 - 1)
        _check_number(f"logit_bias of token {token}", bias, -100, 100)
    return {int(token): float(bias) for token, bias in values.items()}


def _integers(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
        raise UserError(f"{name} must be a list of token ids, not {values!r}")
    for value in values:
        _check_integer(name, value, 0, 2**31 - 1)
    return tuple(int(value) for value in values)


Array = jax.Array | np.ndarray  # inputs of compiled programs, made on the host


class Controls(NamedTuple):
    """The options of a batch as arrays, so that no option is a reason to compile. Shapes [B] unless noted."""

    temperature: Array
    top_p: Array
    top_k: Array
    min_p: Array
    repetition_penalty: Array
    presence_penalty: Array
    frequency_penalty: Array
    key: Array  # uint32 [B, 2], data of a Threefry key
    min_new_tokens: Array
    max_new_tokens: Array
    stops: Array  # bool [B, V], tokens that end a reply
    biased: Array  # int32 [B, MOST_BIASED], tokens with a bias; V stands for none
    bias: Array  # float32 [B, MOST_BIASED]
    logprobs: Array  # bool [B], whether log-probabilities are asked for
    constrained: Array  # bool [B], whether only some tokens may come next
    allowed: Array  # bool [B, V], which those are


def controls(
    options: Sequence[SamplingOptions],
    stop_ids: Sequence[int],
    vocab_size: int,
    *,
    logprobs: bool = False,
    allowed: np.ndarray | None = None,
) -> Controls:
    """numpy arrays of a batch's options. Raises UserError.

    stop_ids end every row's reply besides its own. allowed: bool [V], tokens that may come first, where not all may.
    """

    def column(name, dtype):
        return np.array([getattr(option, name) for option in options], dtype)

    stops = np.zeros((len(options), vocab_size), bool)
    biased, bias = np.full((len(options), MOST_BIASED), vocab_size, np.int32), np.zeros((len(options), MOST_BIASED))
    for row, option in enumerate(options):
        ids, count = [*stop_ids, *option.stop_ids], len(option.logit_bias)
        for name, known in (("stop_ids", ids), ("logit_bias", option.logit_bias)):
            if known and max(known) >= vocab_size:
                raise UserError(f"{name}: token {max(known)} is not in the vocabulary (0 to {vocab_size - 1})")
        stops[row, ids] = True
        biased[row, :count], bias[row, :count] = list(option.logit_bias), list(option.logit_bias.values())
    floats = {
        name: column(name, np.float32)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    }
    floats["temperature"][floats["temperature"] < SMALLEST_TEMPERATURE] = 0.0
    key = np.array([[option.seed >> 32, option.seed & 0xFFFFFFFF] for option in options], np.uint32)
    integers = {name: column(name, np.int32) for name in ("top_k", "min_new_tokens", "max_new_tokens")}
    return Controls(
        **floats,
        **integers,
        key=key,
        stops=stops,
        biased=biased,
        bias=bias.astype(np.float32),
        logprobs=np.full(len(options), logprobs),
        constrained=np.full(len(options), allowed is not None),
        allowed=np.broadcast_to(True if allowed is None else allowed, stops.shape),
    )


def sample(
    logits: jax.Array, options: Controls, in_prompt: jax.Array, counts: jax.Array, generated: jax.Array
) -> jax.Array:
    """The next token of each row, int32 [B].

    logits float32 [B, V]; in_prompt bool [B, V], tokens of the prompt; counts int32 [B, V], how often the reply has
    each token; generated int32 [B], how many it has. What no row asks for is skipped when the program runs.
    """
    logits = jax.lax.cond(jnp.any(options.bias != 0), with_bias, lambda logits, _: logits, logits, options)
    has_penalty = jnp.any(
        (options.repetition_penalty != 1) | (options.presence_penalty != 0) | (options.frequency_penalty != 0)
    )
    logits = jax.lax.cond(has_penalty, penalised, lambda logits, *_: logits, logits, options, in_prompt, counts)
    # What is constrained ends when it is whole, however short.
    too_short = ((generated < options.min_new_tokens) & ~options.constrained)[:, None]
    logits = jnp.where(options.stops & too_short, -jnp.inf, logits)
    logits = jax.lax.cond(jnp.any(options.constrained), only_allowed, lambda logits, _: logits, logits, options)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn(logits):
        def one(key, number, row):
            return jax.random.categorical(jax.random.fold_in(jax.random.wrap_key_data(key), number), row)

        return jax.vmap(one)(options.key, generated, candidates(logits, options)).astype(jnp.int32)

    ids = jax.lax.cond(jnp.any(options.temperature > 0), drawn, lambda _: greedy, logits)
    return jnp.where(options.temperature > 0, ids, greedy)


def with_bias(logits: jax.Array, options: Controls) -> jax.Array:
    """Logits [B, V] with the biases of their rows."""
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, options.biased].add(options.bias, mode="drop")


def only_allowed(logits: jax.Array, options: Controls) -> jax.Array:
    """Logits [B, V], -inf for tokens that may not come next."""
    return jnp.where(options.allowed, logits, -jnp.inf)


def penalised(logits: jax.Array, options: Controls, in_prompt: jax.Array, counts: jax.Array) -> jax.Array:
    """Logits [B, V] after the repetition, frequency and presence penalties."""
    in_reply = counts > 0
    factor = options.repetition_penalty[:, None]
    scaled = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(in_prompt | in_reply, scaled, logits)
    return logits - options.frequency_penalty[:, None] * counts - options.presence_penalty[:, None] * in_reply


def candidates(logits: jax.Array, options: Controls) -> jax.Array:
    """Logits [B, V] over the temperature, -inf for tokens that top-k, top-p and min-p leave out.

    Tokens as likely as the last one kept are kept, too. Rows with temperature 0 hold no meaning.
    """
    logits = logits / jnp.where(options.temperature > 0, options.temperature, 1.0)[:, None]
    vocabulary = logits.shape[-1]

    def within_k(logits):
        wanted = jnp.where(options.top_k > 0, jnp.minimum(options.top_k, vocabulary), vocabulary)
        return _keep_heaviest(logits, jnp.ones(logits.shape, jnp.int32), wanted)

    def within_p(logits):
        kept = _keep_heaviest(logits, jax.nn.softmax(logits, axis=-1), options.top_p)
        return jnp.where(options.top_p[:, None] < 1, kept, logits)

    logits = jax.lax.cond(jnp.any(options.top_k > 0), within_k, lambda logits: logits, logits)
    logits = jax.lax.cond(jnp.any(options.top_p < 1), within_p, lambda logits: logits, logits)
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(options.min_p)[:, None]
    return jnp.where(logits < least, -jnp.inf, logits)


def _keep_heaviest(logits: jax.Array, weights: jax.Array, wanted: Array) -> jax.Array:
    """-inf for all but the largest logits [B, V] of each row whose weights [B, V] just reach `wanted` [B].

    The threshold is found bit by bit from the top: 32 sums, where sorting a large vocabulary takes far longer.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    # An unsigned number in the order of the float: negative floats are turned round, positive ones put above them.
    order = bits ^ jnp.where(bits >> 31 == 1, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))

    def with_bit(step, threshold):
        higher = threshold | (jnp.uint32(1) << (jnp.uint32(31) - step.astype(jnp.uint32)))
        reached = jnp.sum(jnp.where(order >= higher[:, None], weights, 0), axis=-1) >= wanted
        return jnp.where(reached, higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, with_bit, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(order >= threshold[:, None], logits, -jnp.inf)
