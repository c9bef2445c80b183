"""A model's compiled programs of inference: encoding pictures, prefill, decode steps, and plain logits.

Every length is rounded up to a bucket, and what differs between two calls of a bucket (options, lengths, positions,
rotary frequencies) is data, so a program is compiled once per bucket. Rows are right-padded and independent: a prompt
gets the same tokens alone and in a batch. Not here: what the programs compute (`steps.py`), text, stop strings and the
loop over a reply (`generate.py`), rows that come and go (`slots.py`).
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.inference import steps
from qwenvl_jax.inference.layout import Layout
from qwenvl_jax.inference.programs import Counter, Program
from qwenvl_jax.inference.sampling import Controls
from qwenvl_jax.inference.sharing import SHORTEST_REST, Shared, bucket, shared_beginnings
from qwenvl_jax.inference.steps import Fixed, Grown, Past, State
from qwenvl_jax.models.qwen_vl import QwenVL, frequencies, unstack
from qwenvl_jax.nn.adapter_bank import banked_linears
from qwenvl_jax.processing.template import Prompt

SHORTEST_BUCKET = 64
MOST_PICTURES = 8  # encoded at once
LARGE = 16  # rows of a batch that may be read in parts


def length_bucket(length: int) -> int:
    """The padded length of prompts and caches."""
    return bucket(length, SHORTEST_BUCKET)


class Batch(NamedTuple):
    """Prompts of one bucket as arrays. Rows beyond `rows` are empty and finished from the start."""

    ids: np.ndarray  # int32 [B, T]
    slots: np.ndarray  # int32 [B, T], rows of the features, -1 at text
    lengths: np.ndarray  # int32 [B]
    features: jax.Array  # [I, Q, D]

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, T, I."""
        return *self.ids.shape, self.features.shape[0]


class Generator:
    """A model ready for inference. `programs` counts those compiled so far. Threads may share it.

    decode_steps: the program of `steps.decode`, by the past's B and S, for a loop that has its own batch (`slots.py`).
    step_options: how that is compiled, and what does the same in another way is to be.
    adapters: how many it has to choose from; adapts_pictures: whether any of them changes how pictures are encoded.
    """

    def __init__(self, model: QwenVL):
        self.config = model.config
        self._lock = threading.RLock()
        self.load(model)
        self.layout = Layout(self.leaves)
        self.programs = Counter(self.layout)
        self._encode = self.program(steps.encode, Layout.everywhere)
        self._prefill = self.program(steps.prefill, Layout.batch)
        self._branch = self.program(steps.branch, Layout.batch, static_argnames="room")
        self._together = Program(steps.together, self.programs, Layout.batch)
        self.step_options = {"donate_argnames": "state", "compiler_options": _compiler_options(self.layout.devices)}
        self.decode_steps = self.program(steps.decode, Layout.batch, **self.step_options)
        self._logits = self.program(steps.all_logits, Layout.everywhere)
        self._score = self.program(steps.score, Layout.everywhere)
        # A past that stays as long as it was is filled in place.
        self._flush = Program(steps.flush, self.programs, Layout.batch, donate_argnames="past", static_argnames="slots")
        self._grow = Program(steps.flush, self.programs, Layout.batch, static_argnames="slots")
        self._some_rows = Program(steps.some_rows, self.programs, Layout.batch)

    def load(self, model: QwenVL) -> None:
        """Goes on with the weights of another model of the same shapes and types, by the programs compiled so far."""
        self.leaves, self._structure = jax.tree.flatten(unstack(model))
        banks = banked_linears(model)
        self.adapters = next((bank.adapters for bank in banks.values()), 0)
        self.adapts_pictures = any(path[0] == "visual" for path in banks)

    def unload(self) -> None:
        """Lets go of the weights, for a loop that trains them; `load` brings the next ones."""
        self.leaves = []

    def program(self, function: Callable, place: Callable[[Layout, Any], Any], **options: Any) -> Program:
        """`function(model, ...)` compiled, to be called with `leaves`, the model's arrays, in place of the model.

        The model is taken apart once: walking through its modules would cost more than a decode step of a small model.
        """

        @functools.wraps(function)
        def on_leaves(leaves, *args, **kwargs):
            return function(jax.tree.unflatten(self._structure, leaves), *args, **kwargs)

        keywords = getattr(function, "keywords", None)  # of a partial
        return Program(on_leaves, self.programs, place, (self._structure, keywords), **options)

    def encode_images(self, pixels: np.ndarray) -> jax.Array:
        """pixels float32 [I, 3, S, S], normalised -> features [bucket(I), Q, D], zeros after the first I."""
        size = bucket(len(pixels))
        parts = []
        with self._lock:
            for start in range(0, size, MOST_PICTURES):
                part = pixels[start : start + MOST_PICTURES]
                padded = np.zeros((min(size, MOST_PICTURES), *pixels.shape[1:]), np.float32)
                padded[: len(part)] = part
                parts.append(self._encode[len(padded)](self.leaves, padded))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def batch(
        self, prompts: Sequence[Prompt], room: int = 0, features: jax.Array | None = None, length: int | None = None
    ) -> Batch:
        """Prompts as one batch of `length` tokens, by default of their bucket, with their pictures encoded.

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
        rows, length = bucket(len(prompts)), length or length_bucket(max(lengths))
        ids, slots = np.zeros((rows, length), np.int32), np.full((rows, length), -1, np.int32)
        queries = self.config.visual.n_queries
        pictures: dict[bytes, np.ndarray] = {}  # each is encoded once
        places: dict[bytes, int] = {}
        for row, prompt in enumerate(prompts):
            own = prompt.image_slots
            if features is None and len(prompt.pixels):
                pictures |= dict(zip(prompt.picture_keys, prompt.pixels, strict=True))
                places |= {key: place for place, key in enumerate(pictures)}
                numbers = np.array([places[key] for key in prompt.picture_keys], np.int32)
                own = np.where(own < 0, -1, numbers[own // queries] * queries + own % queries)
            ids[row, : lengths[row]], slots[row, : lengths[row]] = prompt.input_ids, own
        if pictures:
            features = self.encode_images(np.stack(list(pictures.values())))
        elif features is None:
            # A text is a batch whose one picture is nowhere, so that it needs no program of its own.
            features = jnp.zeros((1, queries, self.config.hidden_size), self.leaves[0].dtype)
        lengths += [1] * (rows - len(lengths))
        return Batch(ids, slots, np.array(lengths, np.int32), features)

    def prefill(
        self,
        batch: Batch,
        controls: Controls,
        shift: np.ndarray | None = None,
        rotary: np.ndarray | None = None,
        adapter: np.ndarray | None = None,
    ) -> tuple[Past, State, Fixed, Grown]:
        """Reads the prompts and chooses the first token of each reply.

        Rows past the number of rows in `controls` count as finished. shift int [B] and rotary float32 [B, R / 2] set
        the first position and the frequencies of each row, which otherwise come from its own length. adapter int32 [B]:
        the adapter of each row and its reply, 0 for none; None where no row has one. Prompts that begin alike are read
        in two calls, one for what they begin with.
        """
        rows = len(batch.lengths)
        if shift is None and rotary is None and adapter is None:
            shared = self._shared(batch, len(controls.temperature))
            if shared is not None:
                return self._prefill_shared(batch, controls, shared)
        shift = np.zeros(rows, np.int32) if shift is None else _rows(shift, rows).astype(np.int32)
        rotary = frequencies(self.config, batch.lengths) if rotary is None else _rows(rotary, rows)
        finished = np.arange(rows) >= len(controls.temperature)
        padded = jax.tree.map(lambda values: _rows(values, rows), controls)
        with self._lock:
            return self._prefill[batch.shape](self.leaves, *batch, padded, rotary, shift, finished, adapter)

    def _shared(self, batch: Batch, rows: int) -> Shared | None:
        """What the first `rows` rows have in common."""
        ids, slots, lengths = batch.ids[:rows], batch.slots[:rows], batch.lengths[:rows]
        rotary = frequencies(self.config, lengths)
        return shared_beginnings(np.where(slots < 0, ids, -1 - slots), lengths, rotary, SHORTEST_BUCKET)

    def _prefill_shared(self, batch: Batch, controls: Controls, shared: Shared) -> tuple[Past, State, Fixed, Grown]:
        """Reads the beginnings, then the rest of each row; of many rows the longest quarter by itself, where that lets
        the others be padded to half of it."""
        rows, room = batch.ids.shape
        first = _rows(shared.first, bucket(len(shared.first)))
        start, size = shared.length, shared.padded
        ids, slots = np.zeros((len(first), size), np.int32), np.full((len(first), size), -1, np.int32)
        ids[:, :start], slots[:, :start] = batch.ids[first, :start], batch.slots[first, :start]
        lengths = np.full(len(first), start, np.int32)
        options = jax.tree.map(lambda values: _rows(values[:1], len(first)), controls)
        every = frequencies(self.config, batch.lengths)
        beginnings = Batch(ids, slots, lengths, batch.features)
        begun, _, fixed, _ = self.prefill(beginnings, options, np.zeros(len(first)), every[first])
        rests = np.maximum(batch.lengths - start, 1)
        controls = jax.tree.map(lambda values: _rows(values, rows), controls)
        finished = np.arange(rows) >= len(shared.which)

        def branched(own: np.ndarray, rest: int) -> tuple[Past, State, Fixed, Grown]:
            part, options = slice(start, start + rest), jax.tree.map(lambda values: values[own], controls)
            return self._branch[beginnings.shape, len(own), room, rest](
                self.leaves, begun, fixed.in_prompt, _rows(shared.which, rows)[own], np.array([start], np.int32),
                batch.ids[own, part], batch.slots[own, part], rests[own], batch.features, options, every[own],
                finished[own], room=room,
            )  # fmt: skip

        order = np.argsort(rests, kind="stable")
        short, long = np.split(order, [rows * 3 // 4])
        with self._lock:
            if rows < LARGE or shared.rest == SHORTEST_REST or rests[short[-1]] > shared.rest // 2:
                return branched(np.arange(rows), shared.rest)
            parts = branched(short, shared.rest // 2), branched(long, shared.rest)
            return self._together[rows, room](*parts, np.argsort(order).astype(np.int32))

    def some_rows(self, past: Past, state: State, fixed: Fixed, index: np.ndarray) -> tuple[Past, State, Fixed]:
        """The rows int32 [B'] of a batch."""
        with self._lock:
            return self._some_rows[past.shape, len(index)](past, state, fixed, index)

    def decode(
        self, past: Past, state: State, fixed: Fixed, used: int, end: int, stopped: np.ndarray
    ) -> tuple[State, Grown]:
        """Decode steps into the recent slots from `used` to `end`, fewer when all replies are done. Uses up the state.

        stopped bool [B]: replies that have ended for a reason the model does not know.
        """
        with self._lock:
            return self.decode_steps[past.shape](
                self.leaves, past, fixed, np.int32(used), np.int32(end), stopped, state=state
            )

    def chosen(self, *adapters: int) -> np.ndarray | None:
        """int32 [B], the numbers of the adapters of a call's rows; None where there are none to choose from."""
        return np.array(adapters, np.int32) if self.adapters else None

    def features(self, pictures: int) -> jax.ShapeDtypeStruct:
        """The shape of the features of so many pictures, [I, Q, D]."""
        shape = pictures, self.config.visual.n_queries, self.config.hidden_size
        return jax.ShapeDtypeStruct(shape, self.leaves[0].dtype)

    def pixels(self, pictures: int) -> jax.ShapeDtypeStruct:
        """The shape of so many pictures."""
        size = self.config.visual.image_size
        return jax.ShapeDtypeStruct((pictures, 3, size, size), np.float32)

    def flush(self, past: Past, state: State, slots: int) -> tuple[Past, State]:
        """Moves the recent part behind the filled slots of the past, which then has `slots` slots."""
        with self._lock:
            program = self._flush if past.shape[1] == slots else self._grow
            recent = {"recent_k": state.recent_k, "recent_v": state.recent_v}
            past, lengths, taken = program[past.shape, slots](
                past=past, **recent, lengths=state.lengths, taken=state.taken, slots=slots
            )
        return past, state._replace(lengths=lengths, taken=taken)

    def logits(self, batch: Batch, valid: np.ndarray, rotary: np.ndarray) -> jax.Array:
        """float32 [B, T, V] of whole sequences; valid bool [B, T] (False: padding); rotary as in `prefill`."""
        with self._lock:
            return self._logits[batch.shape](self.leaves, *batch, valid, rotary)

    def score(self, batch: Batch, positions: np.ndarray, targets: np.ndarray) -> jax.Array:
        """float32 [B, K]: log-likelihood of targets int [B, K] as the tokens after positions int [B, K]."""
        with self._lock:
            rotary = frequencies(self.config, batch.lengths)
            return self._score[batch.shape, positions.shape](self.leaves, *batch, rotary, positions, targets)


def _compiler_options(devices: Sequence[jax.Device]) -> dict[str, str] | None:
    """For decode steps on a CPU: without YNNPACK.

    Keys and values push the weights out of the caches, and Eigen's products, which copy them in the order in which they
    are needed, take less time to bring them back: a step takes 0.8 to 0.95 of the time. Later versions of JAX may not
    know the option.
    """
    if jax.__version_info__ < (0, 11) and devices and devices[0].platform == "cpu":
        return {"xla_cpu_experimental_ynn_fusion_type": ""}
    return None


def _rows(values: np.ndarray, rows: int) -> np.ndarray:
    """`values` with as many rows as the batch; the last one is repeated."""
    values = np.asarray(values)
    return np.concatenate([values, np.repeat(values[-1:], rows - len(values), axis=0)])
