"""How the host that leads an engine tells the others what to do, and how all of them end when one is gone.

Orders travel over a TCP connection to each follower: they hold pixels, which are too large for the store of keys and
values that the hosts' runtime has. That store tells followers the leader's port and a password. What the orders mean is
in `work.py`. A follower loads objects that its leader has pickled; a leader reads no more than one word of a follower.
"""

import contextlib
import hmac
import pickle
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from jax._src import distributed

from qwenvl_jax.config import UserError

# The runtime's store, and the address of the host that leads, have no public name.
RUNTIME: Any = distributed.global_state
KEY = "qwenvl_jax/leader"
STOP = "stop"
READY = b"ready"
SECONDS_TO_MEET = 120  # once the runtime has found all hosts
SECONDS_TO_END = 10  # for followers, once they were told
SECONDS_TO_GREET = 5  # for whoever connects
# A connection that is silent for ten seconds is asked, and given up after three questions without an answer (seconds);
# and where what was sent is not taken in (milliseconds).
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}

End = Callable[[int, str], None]  # ends this process with a status, and says why


class Followers:
    """The connections of the host that leads to all others; a `Leader` of work.py.

    end: is called in a thread of its own when a follower is gone. Raises UserError when not all come.
    """

    def __init__(self, end: End):
        self.lost = False
        self._end = end
        self._closing = False
        self._sending = threading.Lock()
        self._ready, self._ended = threading.Semaphore(0), threading.Semaphore(0)
        self._connections = _meet(RUNTIME.num_processes - 1)
        for host, connection in self._connections.items():
            threading.Thread(target=self._watch, args=(host, connection), daemon=True).start()

    def wait(self) -> None:
        """Until all are ready to follow."""
        for _ in self._connections:
            self._ready.acquire()

    def tell(self, *order: Any) -> None:
        """Sends an order to all. Raises OSError when one is gone."""
        content = pickle.dumps(order)
        with self._sending:
            for connection in self._connections.values():
                connection.send_bytes(content)

    def give_up(self, reason: str) -> None:
        """Ends this process, in a thread of its own, and with it the others."""
        if not self.lost:
            self.lost = True
            threading.Thread(target=self._end, args=(1, reason), daemon=True).start()

    def close(self, status: int) -> None:
        """Has the others end with this status, and waits until they have, but not for ever."""
        self._closing = True
        if self._sending.acquire(timeout=1):  # an engine that hangs may be sending
            self._sending.release()
            with contextlib.suppress(OSError):
                self.tell(STOP, status)
        end = time.monotonic() + SECONDS_TO_END
        for _ in self._connections:
            self._ended.acquire(timeout=max(end - time.monotonic(), 0))

    def _watch(self, host: int, connection: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            if connection.recv_bytes(len(READY)) == READY:
                self._ready.release()
            connection.recv_bytes(0)  # there is no more to come
        self._ended.release()
        if not self._closing:
            self.give_up(f"host {host} is gone; a model over several hosts ends with any of them")


class Following:
    """A follower's connection to its leader. end: as of `Followers`. Raises UserError when there is no leader."""

    def __init__(self, end: End):
        self.status = 1  # to end with, as the leader has told
        self._end = end
        self._following = False
        self._orders: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self._connection = _join(RUNTIME.process_id)
        threading.Thread(target=self._receive, daemon=True).start()

    def orders(self) -> Iterator[tuple]:
        """Says that this host is ready, and gives what it is told to do, until it is told to stop."""
        self._following = True
        self._connection.send_bytes(READY)
        while (order := self._orders.get())[0] != STOP:
            yield order
        self.status = order[1]

    def _receive(self) -> None:
        """Takes orders in while older ones are carried out, so that no leader waits to be rid of them."""
        try:
            while True:
                order = pickle.loads(self._connection.recv_bytes())
                if order[0] == STOP and not self._following:
                    self._end(order[1], "stopped before it was ready")
                self._orders.put(order)
        except (EOFError, OSError):
            self._end(1, "the host that leads is gone; a model over several hosts ends with any of them")


def _meet(count: int) -> dict[int, Connection]:
    """The connections of so many followers, by their numbers."""
    password = secrets.token_hex(16)
    found: dict[int, Connection] = {}
    end = time.monotonic() + SECONDS_TO_MEET
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as server:
        RUNTIME.client.key_value_set(KEY, f"{server.getsockname()[1]} {password}")
        while len(found) < count:
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise UserError(
                    f"hosts: {count - len(found)} of {count} did not connect to the first one; is its port "
                    f"{server.getsockname()[1]} open between them?"
                ) from None
            with contextlib.suppress(OSError, ValueError):  # a stranger
                connection.settimeout(SECONDS_TO_GREET)
                with connection.makefile("rb") as file:
                    given, host = file.readline(64).split()
                if hmac.compare_digest(given, password.encode()):
                    found[int(host)] = _connection(connection)
                    continue
            connection.close()
    return found


def _join(host: int) -> Connection:
    """A follower's connection to its leader, who has the runtime's coordinator beside it."""
    address = RUNTIME.coordinator_address.rsplit(":", 1)[0].strip("[]")
    try:
        port, password = RUNTIME.client.blocking_key_value_get(KEY, SECONDS_TO_MEET * 1000).split()
        connection = socket.create_connection((address, int(port)), timeout=SECONDS_TO_MEET)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"hosts: cannot connect to the first one, {address} ({reason})") from None
    connection.sendall(f"{password} {host}\n".encode())
    return _connection(connection)


def _connection(connection: socket.socket) -> Connection:
    """Sends and receives whole messages."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(connection.detach())
