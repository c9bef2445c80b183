"""What an engine has its devices do, call by call: where a model lies on several hosts, each of them makes every call.

A program over the devices of all hosts runs when all have started it, so all must start the same ones in the same
order. The host that leads decides what is done and tells the others before it does it; they do what they are told, with
a reader and a live batch of their own, which remember what those of the leader do. What a reply's text is, when it is
done and who listens is the leader's business alone.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from qwenvl_jax.inference.batch_programs import Prefilled
from qwenvl_jax.inference.live_batches import LiveBatches
from qwenvl_jax.inference.reading import PromptReader, Read
from qwenvl_jax.inference.reply import Reply
from qwenvl_jax.inference.requests import Request
from qwenvl_jax.inference.sampling import Controls
from qwenvl_jax.inference.steps import Grown


class Leader(Protocol):
    """Of hosts that follow; see `inference/followers.py`."""

    @property
    def lost(self) -> bool: ...  # one of them is gone
    def tell(self, *order: Any) -> None: ...
    def give_up(self, reason: str) -> None: ...


class HostsPart(BaseException):
    """A call has failed that other hosts may have done. No Exception, since no turn that comes next would be right."""


class Work:
    """The calls, on a reader and live batches that nobody else changes. Not for several threads.

    leader: tells the other hosts, if there are any. Any exception is HostsPart then.
    """

    def __init__(self, reader: PromptReader, batches: LiveBatches, leader: Leader | None):
        self._reader, self._batches, self._leader = reader, batches, leader
        self._group: list[Reply] = []  # requests that are being read, until they have a row
        self._prompts: list[Prefilled] = []  # theirs, when they have been read

    def encode(self, replies: list[Reply]) -> bool:
        """`PromptReader.encode`."""
        self._begin(replies)
        with self._told("encode"):
            return self._reader.encode(replies)

    def read(self, replies: list[Reply]) -> Read:
        """`PromptReader.read`."""
        self._begin(replies)
        with self._told("read"):
            read = self._reader.read(replies)
        self._prompts = read.prompts
        return read

    def put(self) -> list[int]:
        """`LiveBatch.put` of each that was read last."""
        with self._told("put"):
            marks = [
                self._batches.put(reply, prompt, reply.request.prompt.input_ids)
                for reply, prompt in zip(self._group, self._prompts, strict=True)
            ]
        self._group, self._prompts = [], []
        return marks

    def allow(self, reply: Reply, tokens: np.ndarray) -> None:
        """`LiveBatch.allow`."""
        with self._told("allow", self._batches.replies.index(reply), tokens):
            self._batches.allow(reply, tokens)

    def drop(self, reply: Reply) -> None:
        """`LiveBatch.drop`."""
        with self._told("drop", self._batches.replies.index(reply)):
            self._batches.drop(reply)

    def clear(self) -> None:
        """`LiveBatch.clear`."""
        with self._told("clear"):
            self._batches.clear()

    def start(self) -> None:
        """`LiveBatch.start`."""
        with self._told("start"):
            self._batches.start()

    def decode(self, steps: int, speculate: bool) -> list[tuple[Grown, list[Any], list[int]]]:
        """`LiveBatches.decode`."""
        with self._told("decode", steps, speculate):
            return self._batches.decode(steps, speculate)

    def note(self, reply: Reply, generated: int, mark: int) -> None:
        """`LiveBatch.note`."""
        with self._told("note", self._batches.replies.index(reply), generated, mark):
            self._batches.note(reply, generated, mark)

    def follow(self, orders: Iterable[tuple]) -> None:
        """Does what a leader tells."""
        calls: dict[str, Callable[..., Any]] = {
            "begin": self._expect,
            "encode": lambda: self.encode(self._group),
            "read": lambda: self.read(self._group),
            "put": self.put,
            "allow": lambda row, tokens: self.allow(self._batches.replies[row], tokens),
            "drop": lambda row: self.drop(self._batches.replies[row]),
            "clear": self.clear,
            "start": self.start,
            "decode": self.decode,
            "note": lambda row, *told: self.note(self._batches.replies[row], *told),
        }
        for name, *arguments in orders:
            calls[name](*arguments)

    def _begin(self, replies: list[Reply]) -> None:
        """Tells what the requests are, each once; some may have waited for others to be encoded."""
        if replies == self._group:
            return
        if self._leader is not None:
            told = [self._group.index(reply) if reply in self._group else _told(reply) for reply in replies]
            with self._told("begin", told):
                pass
        self._group = replies

    def _expect(self, told: list[int | tuple[Request, Controls, list[bytes]]]) -> None:
        self._group = [
            self._group[one] if isinstance(one, int) else Reply(one[0], lambda update: None, *one[1:], {})
            for one in told
        ]

    @contextlib.contextmanager
    def _told(self, *order: Any) -> Iterator[None]:
        if self._leader is None:
            yield
            return
        try:
            self._leader.tell(*order)
            yield
        except Exception as error:
            self._leader.give_up(f"{order[0]} failed here, and may not have elsewhere: {error!r}")
            raise HostsPart from error


def _told(reply: Reply) -> tuple[Request, Controls, list[bytes]]:
    """What other hosts need to know of a request."""
    prompt = dataclasses.replace(reply.request.prompt, sources=[])
    return dataclasses.replace(reply.request, prompt=prompt, constraint=None), reply.controls, reply.blocks
