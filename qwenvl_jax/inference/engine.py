"""Runs many requests at once on one model: each joins the batch when there is room and leaves it when it is done.

In every turn of its loop one thread takes in a bounded amount of new work (pictures to encode, prompts to read), has
the batch decode a few steps, and while those run reads what the turn before has given. `warm_up` compiles every shape.
"""

import dataclasses
import itertools
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Literal, get_args

import jax
import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.inference import executables, sizes
from qwenvl_jax.inference.batch_programs import BatchPrograms
from qwenvl_jax.inference.decode import Generator
from qwenvl_jax.inference.live_batches import LiveBatches, side_by_side
from qwenvl_jax.inference.prefixes import block_digests
from qwenvl_jax.inference.reading import MOST_TOKENS, PromptReader
from qwenvl_jax.inference.reply import Reply
from qwenvl_jax.inference.requests import Listener, Request
from qwenvl_jax.inference.sampling import controls
from qwenvl_jax.inference.slots import LiveBatch
from qwenvl_jax.inference.steps import CHUNK, Grown
from qwenvl_jax.inference.work import HostsPart, Leader, Work
from qwenvl_jax.models.qwen_vl import frequencies
from qwenvl_jax.processing.images import picture_key

TURN_SECONDS = 1 / 16  # that decode steps may take between two looks at what is new
STEPS_OF_FEW = 4  # the most in a turn; they take little time, and a newcomer need not wait for more
STEPS_OF_MANY = 16  # the same where more than FEW replies share a step, and each turn has more to be told of
FEW = 8
LOOKED_AT = 8  # requests that wait, of which some may be read together: so few may overtake others
MOST_DRAFTS = CHUNK // 2 - 1  # two steps before the recent part of the cache is full
CacheForm = Literal["model", "int8"]
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What an engine keeps in the memory of its device."""

    slots: int = 16  # replies in progress at once
    max_length: int = 1024  # tokens of a prompt and its reply
    pictures: int = 512  # whose features are kept
    prefixes: int = 16384  # tokens of prompts whose keys and values are kept; 0 for none
    speculate: int = 0  # tokens looked up in the prompt and checked beside the next, where replies are greedy and few
    cache: CacheForm = "model"  # form of keys and values: the model's dtype, or 8 bits, which changes replies a little

    def __post_init__(self):
        for name, least in (("slots", 1), ("max_length", 2), ("pictures", 1), ("prefixes", 0), ("speculate", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.speculate > MOST_DRAFTS:
            raise UserError(f"speculate is {self.speculate}; it must be at most {MOST_DRAFTS}")
        if self.cache not in get_args(CacheForm):
            raise UserError(f"cache is {self.cache!r}; it must be one of {', '.join(get_args(CacheForm))}")


class Engine:
    """`warm_up`, then `start`; `submit` and `cancel` from any thread; `stop` at the end.

    generator: the model, which nobody else may use from then on. table: the bytes that each token adds to a text.
    leader: where the model lies on several hosts, what tells the others; their engines `follow` after `warm_up`.
    Raises UserError for more positions than the model has.
    """

    def __init__(
        self,
        generator: Generator,
        table: Mapping[int, bytes],
        options: EngineOptions | None = None,
        leader: Leader | None = None,
    ):
        self.options = options = options or EngineOptions()
        most = generator.config.max_position_embeddings
        if options.max_length > most:
            raise UserError(f"max_length is {options.max_length}; the model has {most} positions")
        self.max_length = options.max_length
        self.last_step = time.monotonic()  # when the loop was last seen at work, or got some
        self._generator, self._table = generator, table
        prompts, batches = sizes.of_prompts(options.max_length), side_by_side(generator, options.slots)
        rows = sizes.of_batches(-(-options.slots // batches), options.max_length)
        int8 = options.cache == "int8"
        self._reader = PromptReader(generator, prompts, options.slots, options.pictures, options.prefixes, int8)
        self._programs = BatchPrograms(generator, rows, options.speculate)
        self._batches = LiveBatches([LiveBatch(self._programs) for _ in range(batches)], options.slots)
        self._work = Work(self._reader, self._batches, leader)
        self._leader = leader
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._waiting: deque[Reply] = deque()
        self._stopping = False
        self._resting = True  # there was nothing to do
        self._unread: deque[_Report] = deque()
        self._steps = 1  # asked for in the last turn
        self._step_seconds = TURN_SECONDS  # that each of them took
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Before the first request.

    def warm_up(self, progress: Callable[[int, int | None], None] | None = None) -> None:
        """Compiles every program there will be, or reads it from disk. progress: is told how many are done, of how
        many once that is known. No other thread should compile meanwhile: JAX's cache is not used."""
        programs, (first, shapes) = self._generator.programs, self._reader.compile()
        with executables.kept() as programs.kept, ThreadPoolExecutor(os.cpu_count()) as pool:
            for done, of in _side_by_side(pool, first, lambda: self._programs.compile(dict(sorted(shapes.items())))):
                if progress is not None:
                    progress(done, of)
        self._batches.start()
        programs.kept, programs.sealed = None, True
        self._compiled = programs.compiled

    def start(self) -> None:
        """Starts the thread that owns the device."""
        self._thread.start()

    def follow(self, orders: Iterable[tuple]) -> None:
        """Does what the engine of another host does, instead of `start`. Returns when there are no more orders."""
        self._work.follow(orders)

    # From any thread.

    def submit(self, request: Request, listener: Listener) -> Reply:
        """Queues a request. Its listener is called in the engine's thread, and must not wait.

        Raises UserError for a prompt that leaves no room for a reply, and for an adapter that there is not.
        """
        generator = self._generator
        length = len(request.prompt.input_ids)
        if not 0 < length < self.max_length:
            raise UserError(f"the prompt has {length} tokens; 1 to {self.max_length - 1} are possible")
        if not 0 <= request.adapter <= generator.adapters:
            raise UserError(f"adapter is {request.adapter}; the model has {generator.adapters}, and 0 is for none")
        most = min(request.options.max_new_tokens, self.max_length - length)
        option = dataclasses.replace(
            request.options, max_new_tokens=most, min_new_tokens=min(request.options.min_new_tokens, most)
        )
        request = dataclasses.replace(request, options=option)
        vocabulary = generator.config.vocab_size
        allowed = None if request.constraint is None else request.constraint.allowed()
        logprobs = request.alternatives is not None
        chosen = controls([option], request.stop_ids, vocabulary, logprobs=logprobs, allowed=allowed)
        if len(request.picture_keys) != len(request.prompt.pixels):
            request = dataclasses.replace(request, picture_keys=tuple(map(picture_key, request.prompt.pixels)))
        if generator.adapts_pictures:  # the same pixels have other features
            keys = tuple(key + request.adapter.to_bytes(4) for key in request.picture_keys)
            request = dataclasses.replace(request, picture_keys=keys)
        rotary, queries = frequencies(generator.config, [length]), generator.config.visual.n_queries
        blocks = block_digests(request.prompt, request.picture_keys, rotary, request.adapter, queries)
        reply = Reply(request, listener, chosen, blocks, self._table)
        with self._wake:
            if self._stopping or (self._thread.ident is not None and not self.alive):
                raise RuntimeError("the engine has stopped")
            if self._resting:
                self._resting = False
                self.last_step = time.monotonic()  # a rest is no standstill
            self._waiting.append(reply)
            self._wake.notify()
        return reply

    def cancel(self, reply: Reply) -> None:
        """Ends a request for which nobody waits any more; its listener hears nothing after that."""
        with self._wake:
            reply.cancelled = True
            self._wake.notify()

    def stop(self) -> None:
        """Ends the thread after its turn; what was not finished ends in an error."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs, and all hosts that follow are there."""
        return self._thread.is_alive() and not (self._leader is not None and self._leader.lost)

    @property
    def running(self) -> int:
        """Replies in the batch."""
        return int(np.sum(self._batches.live))

    @property
    def waiting(self) -> int:
        """Requests that are not in the batch yet."""
        return len(self._waiting)

    @property
    def recompiles(self) -> int:
        """Programs compiled since `warm_up`."""
        return self._generator.programs.compiled - self._compiled

    @property
    def cache_usage(self) -> float:
        """The share of the largest cache that holds tokens."""
        return self._batches.filled / (self._batches.most * self.max_length)

    @property
    def picture_hits(self) -> tuple[int, int]:
        """Pictures whose features were there, and pictures asked for."""
        return self._reader.features.hits, self._reader.features.queries

    @property
    def prefix_hits(self) -> tuple[int, int]:
        """Tokens of prompts that needed no computing, and tokens of all prompts."""
        return self._reader.prefixes.hits, self._reader.prefixes.queries

    # In the engine's thread.

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._unread or self._batches.live.any() or self._stopping):
                    self._resting = True
                    self._wake.wait()
                if self._stopping:
                    break
            self.last_step = time.monotonic()
            try:
                self._turn_or_start_again()
            except HostsPart:
                logger.exception("the engine has ended")
                break
        self._fail([*self._batches.replies, *self._waiting], "the engine was stopped")

    def _turn_or_start_again(self) -> None:
        try:
            self._turn()
        except Exception as error:
            logger.exception("a turn of the engine failed")
            self._fail(self._batches.replies, repr(error))
            self._unread.clear()
            self._work.start()

    def _turn(self) -> None:
        began, before = time.monotonic(), len(self._unread)
        self._forget_cancelled()
        self._admit()
        most = STEPS_OF_FEW if self.running <= FEW else STEPS_OF_MANY
        steps = max(1, min(most, int(TURN_SECONDS / self._step_seconds)))
        if any(reply is not None and reply.request.constraint is not None for reply in self._batches.replies):
            steps = self._constrain()
            before = 0
        if self._batches.live.any():
            speculate = any(reply is not None and reply.draftable for reply in self._batches.replies)
            self._unread += [_Report.of(*told) for told in self._work.decode(steps, speculate)]
        else:
            before = len(self._unread)
        # What this turn has asked for is read in the next one: the device always has something to do.
        for _ in range(before):
            self._read(self._unread.popleft())
        if before:
            self._step_seconds = (time.monotonic() - began) / self._steps
        self._steps = steps

    def _constrain(self) -> int:
        """Tells the batch what may come next where that depends on what has come. Returns for how many steps it holds.

        All that was asked for must be read first, so constrained replies make every step wait for the host.
        """
        while self._unread:
            self._read(self._unread.popleft())
        for reply in self._batches.replies:
            if reply is not None and reply.request.constraint is not None:
                try:
                    self._work.allow(reply, reply.request.constraint.allowed())
                except Exception as error:  # of this reply alone
                    logger.exception("a constraint failed")
                    self._fail([reply], repr(error))
                    self._work.drop(reply)
        return 1

    def _forget_cancelled(self) -> None:
        with self._lock:
            self._waiting = deque(reply for reply in self._waiting if not reply.cancelled)
        for reply in self._batches.replies:
            if reply is not None and reply.cancelled:
                self._work.drop(reply)

    def _admit(self) -> None:
        """Takes in requests while there are rows; where replies are in progress, as much as may hold them up."""
        room, encoded = self._batches.most - self.running, False
        budget = MOST_TOKENS if self.running else math.inf
        while self._waiting and room:
            with self._lock:
                waiting = list(itertools.islice(self._waiting, LOOKED_AT))
            replies = self._reader.together(waiting, room, budget)
            lacking = self._reader.lacks_pictures(replies)
            if not replies or (lacking and encoded and budget < math.inf):
                return
            for reply in replies:
                reply.begun = reply.begun or time.monotonic()  # its pictures may take it several turns
            try:
                if lacking:
                    encoded = self._work.encode(replies)
                    continue
                read = self._work.read(replies)
            except Exception as error:  # of one request alone
                if len(replies) > 1:
                    room = 1  # which one shows when they are read one by one
                    continue
                logger.exception("a request failed before its first token")
                self._leave_queue(replies)
                self._fail(replies, repr(error))
                continue
            budget -= read.tokens
            if read.grown is not None:
                self._leave_queue(replies)
                self._unread.append(_Report.of(read.grown, replies, self._work.put()))
                room -= len(replies)

    def _leave_queue(self, replies: Sequence[Reply]) -> None:
        with self._lock:
            self._waiting = deque(reply for reply in self._waiting if reply not in replies)

    def _read(self, report: "_Report") -> None:
        """Tells the listeners what is new, and takes replies that are done out of the batch."""
        grown = jax.device_get(report.grown)
        for row, (reply, mark) in enumerate(zip(report.replies, report.marks, strict=True)):
            if reply is None or reply.finished or reply.cancelled:
                continue
            try:
                reply.grow(grown, row)
            except Exception as error:  # of this reply alone: its constraint's, or its listener's
                logger.exception("a reply failed")
                self._fail([reply], repr(error))
            if reply.finished:
                self._work.drop(reply)
            else:
                self._work.note(reply, reply.generated, mark)
        if np.any(grown.broken):
            self._work.clear()

    def _fail(self, replies: Sequence[Reply | None], error: str) -> None:
        for reply in replies:
            if reply is not None and not reply.finished:
                try:
                    reply.fail(error)
                except Exception:
                    logger.exception("a listener failed")


@dataclasses.dataclass(frozen=True)
class _Report:
    """What a call gives, still on the device, for the replies that had the rows then. marks: see `LiveBatch.note`."""

    grown: Grown
    replies: Sequence[Reply | None]
    marks: Sequence[int]

    @classmethod
    def of(cls, grown: Grown, replies: Sequence[Reply | None], marks: Sequence[int]) -> "_Report":
        """Begins to copy what the replies ask for."""
        if not any(reply is not None and reply.request.alternatives is not None for reply in replies):
            grown = grown._replace(choices=None)
        for array in jax.tree.leaves(grown):
            array.copy_to_host_async()
        return cls(grown, replies, marks)


def _side_by_side(
    pool: ThreadPoolExecutor, first: Sequence[Callable[[], None]], then: Callable[[], Sequence[Callable[[], None]]]
) -> Iterator[tuple[int, int | None]]:
    """Runs the first tasks, then those that come of them; yields how many are done, of how many once that is known."""
    done = 0
    for tasks, known in ((lambda: first, False), (then, True)):
        futures = [pool.submit(task) for task in tasks()]
        total = done + len(futures) if known else None
        for future in as_completed(futures):
            future.result()
            done += 1
            yield done, total
