"""The life of a server process: it listens at once, loads in a thread, serves, and drains when it is told to stop."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import uvicorn
import uvloop
from rich.console import Console

from qwenvl_jax.config import UserError
from qwenvl_jax.serving import logs
from qwenvl_jax.serving.app import create_app
from qwenvl_jax.serving.replies import Engine
from qwenvl_jax.serving.settings import Settings
from qwenvl_jax.serving.state import Server
from qwenvl_jax.vlm import VLM

Say = Callable[[str], None]  # shows a line of progress
Build = Callable[[Say], tuple[VLM, Engine]]

SECONDS_IDLE = 75  # that a connection stays open between requests: longer than proxies keep theirs
SECONDS_TO_CLOSE = 2  # for connections, after the last answer


def serve(
    settings: Settings,
    listening: socket.socket,
    build: Build,
    log_level: str = "info",
    closing: Callable[[int], None] = lambda status: None,
) -> int:
    """Serves on `listening` what `build` loads until a signal ends it. Returns the exit status.

    0 after a signal, 2 where `build` raises UserError (in one line), 1 where it raises anything else. closing: is
    called with it when the engine has stopped.
    """
    process = _Process(settings, listening, build, log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(process.run(signals=True))
    closing(status)
    if threading.active_count() > 1:
        leave(status)  # a thread that compiles or hangs cannot be stopped, and should not be waited for
    return status


class Background:
    """The same server in a thread of a process that has other work: `with Background(...) as server`.

    It listens from the start and is gone at the end, where answers under way are given `drain_seconds`.
    """

    def __init__(self, name: str, settings: Settings, listening: socket.socket, build: Build):
        """name: of the command, which begins the line that says why a model cannot be loaded."""
        self._process = _Process(settings, listening, build, "warning", name)
        self._thread = threading.Thread(target=self._run, name="qwenvl-serve", daemon=True)
        self.status: int | None = None

    @property
    def address(self) -> str:
        """`http://HOST:PORT`."""
        return self._process.address

    def __enter__(self) -> "Background":
        self._thread.start()
        self._process.begun.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()
        self._thread.join()

    def ended(self, seconds: float) -> bool:
        """Waits that long; whether it has ended by itself, as it does when the model cannot be loaded.

        `status` is its exit status then.
        """
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            self.status = runner.run(self._process.run(signals=False))


class _Listener(uvicorn.Server):
    """uvicorn without its signal handlers, which would stop to listen before the answers are out."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Process:
    def __init__(self, settings: Settings, listening: socket.socket, build: Build, log_level: str, name: str = "serve"):
        logs.configure(log_level)
        app = create_app(settings)
        self._server: Server = app.state.server
        self._listening = listening
        self._build = build
        self._name = name
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=SECONDS_IDLE,
            timeout_graceful_shutdown=SECONDS_TO_CLOSE,
        )
        self._listener = _Listener(config)
        self._engine: Engine | None = None
        self._status = 0
        self._draining: asyncio.Task | None = None
        self._console = Console(highlight=False)
        self.begun = threading.Event()

    @property
    def address(self) -> str:
        host, port = self._listening.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def run(self, signals: bool) -> int:
        """signals: whether SIGTERM and SIGINT end it, for the main thread; elsewhere `stop` does."""
        self._loop = asyncio.get_running_loop()
        if signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._on_signal)
        self.begun.set()
        self._say(f"listening on {self.address}")
        threading.Thread(target=self._load, name="qwenvl-load", daemon=True).start()
        await self._listener.serve(sockets=[self._listening])
        if self._engine is not None:
            stopper = threading.Thread(target=self._engine.stop, daemon=True)
            stopper.start()
            stopper.join(SECONDS_TO_CLOSE)
        self._server.close()
        return self._status

    def _load(self) -> None:
        """In a thread of its own."""
        try:
            vlm, engine = self._build(self._say)
        except UserError as error:
            print(f"{self._name}: {error}", file=sys.stderr)
            self._loop.call_soon_threadsafe(self._give_up, 2)
        except Exception:
            traceback.print_exc()
            self._loop.call_soon_threadsafe(self._give_up, 1)
        else:
            self._loop.call_soon_threadsafe(self._install, vlm, engine)

    def _install(self, vlm: VLM, engine: Engine) -> None:
        self._engine = engine
        self._server.install(vlm, engine)
        self._say(f"ready: {', '.join(self._server.settings.names)}, {engine.max_length} tokens")

    def _give_up(self, status: int) -> None:
        self._status = status
        self._listener.should_exit = True

    def _on_signal(self) -> None:
        """The first signal: finish what is under way. The second: leave."""
        if self._draining is not None:
            leave(0)
        self._say("stopping: no new requests, those under way are finished; once more to leave at once")
        self._start_draining()

    def stop(self) -> None:
        """As after a first signal, from another thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended already
            self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        await self._server.drain()
        self._listener.should_exit = True

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


def leave(status: int) -> NoReturn:
    """Ends the process without waiting for its threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
