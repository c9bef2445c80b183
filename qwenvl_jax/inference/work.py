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

from qwenvl_jax.inference.reading import PromptReader
from qwenvl_jax.inference.reply import Reply
from qwenvl_jax.inference.requests import Request
from qwenvl_jax.inference.sampling import Controls
from qwenvl_jax.inference.slots import LiveBatch, Prefilled
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
    """The calls, on a reader and a live batch that nobody else changes. Not for several threads.

    leader: tells the other hosts, if there are any. Any exception is HostsPart then.
    """

    def __init__(self, reader: PromptReader, batch: LiveBatch, leader: Leader | None):
        self._reader, self._batch, self._leader = reader, batch, leader
        self._head: Reply | None = None  # the request that is being read: the first of the queue, until it leaves it
        self._read: Prefilled | None = None  # it, when it has been read

    def encode(self, reply: Reply) -> bool:
        """`PromptReader.encode`."""
        self._begin(reply)
        with self._told("encode"):
            return self._reader.encode(reply)

    def read(self, reply: Reply) -> tuple[Grown, int]:
        """`PromptReader.read`, without what `put` is to take in."""
        self._begin(reply)
        with self._told("read"):
            self._read, grown, computed = self._reader.read(reply)
        return grown, computed

    def put(self) -> int:
        """`LiveBatch.put` of what was read last."""
        with self._told("put"):
            assert self._head is not None
            assert self._read is not None
            mark = self._batch.put(self._head, self._read, self._head.request.prompt.input_ids)
        self._head = self._read = None
        return mark

    def allow(self, reply: Reply, tokens: np.ndarray) -> None:
        """`LiveBatch.allow`."""
        with self._told("allow", self._batch.replies.index(reply), tokens):
            self._batch.allow(reply, tokens)

    def drop(self, reply: Reply) -> None:
        """`LiveBatch.drop`."""
        with self._told("drop", self._batch.replies.index(reply)):
            self._batch.drop(reply)

    def clear(self) -> None:
        """`LiveBatch.clear`."""
        with self._told("clear"):
            self._batch.clear()

    def start(self) -> None:
        """`LiveBatch.start`."""
        with self._told("start"):
            self._batch.start()

    def decode(self, steps: int, speculate: bool) -> tuple[Grown, list[Any], int]:
        """`LiveBatch.decode`."""
        with self._told("decode", steps, speculate):
            return self._batch.decode(steps, speculate)

    def note(self, reply: Reply, generated: int, mark: int) -> None:
        """`LiveBatch.note`."""
        with self._told("note", self._batch.replies.index(reply), generated, mark):
            self._batch.note(reply, generated, mark)

    def follow(self, orders: Iterable[tuple]) -> None:
        """Does what a leader tells."""
        calls: dict[str, Callable[..., Any]] = {
            "begin": self._expect,
            "encode": lambda: self.encode(self._expected()),
            "read": lambda: self.read(self._expected()),
            "put": self.put,
            "allow": lambda row, tokens: self.allow(self._batch.replies[row], tokens),
            "drop": lambda row: self.drop(self._batch.replies[row]),
            "clear": self.clear,
            "start": self.start,
            "decode": self.decode,
            "note": lambda row, *told: self.note(self._batch.replies[row], *told),
        }
        for name, *arguments in orders:
            calls[name](*arguments)

    def _begin(self, reply: Reply) -> None:
        """Tells what a request is, once; it may have waited for others to be encoded, or have been cancelled."""
        if reply is self._head:
            return
        if self._leader is not None:
            prompt = dataclasses.replace(reply.request.prompt, sources=[])
            request = dataclasses.replace(reply.request, prompt=prompt, constraint=None)
            with self._told("begin", request, reply.controls, reply.blocks):
                pass
        self._head = reply

    def _expect(self, request: Request, controls: Controls, blocks: list[bytes]) -> None:
        self._head = Reply(request, lambda update: None, controls, blocks, {})

    def _expected(self) -> Reply:
        assert self._head is not None
        return self._head

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
