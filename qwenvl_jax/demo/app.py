"""The chat page in the browser: the server that it asks, its own or another's, and the page itself, until a signal."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from qwenvl_jax.config import UserError
from qwenvl_jax.demo.client import Client
from qwenvl_jax.demo.layout import ASSETS
from qwenvl_jax.demo.page import build
from qwenvl_jax.demo.pictures import MOST_BYTES, MOST_PICTURES
from qwenvl_jax.demo.texts import EN
from qwenvl_jax.serving import cli as serving

if TYPE_CHECKING:
    import argparse

    from qwenvl_jax.serving.run import Background

KEY_VARIABLE = "OPENAI_API_KEY"
SLOTS = 3  # replies at one time on the page's own server: a demo has few visitors, and a cold start compiles less
MOST_BODY = MOST_PICTURES * MOST_BYTES * 3 // 2  # of a request, in bytes, with room for Base64
SECONDS_BETWEEN_LOOKS = 0.5
CAPACITY = 200  # visitors whose conversations are kept
THEME = gr.themes.Base(
    primary_hue="blue",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],  # nothing is fetched from elsewhere
    font_mono=["ui-monospace", "monospace"],
)


def show(options: "argparse.Namespace") -> int:
    """Serves the page until SIGTERM or SIGINT. Returns the exit status. Raises UserError.

    options: those of `cli.py`; with `api_base` another server is asked, without it one starts in this process.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    status = 0
    with contextlib.ExitStack() as stack:
        if options.api_base is not None:
            key = options.api_key or os.environ.get(KEY_VARIABLE)
            stack.enter_context(_page(Client(options.api_base, key, options.model), options))
            stopping.wait()
        else:
            listening = stack.enter_context(serving.listen("127.0.0.1", 0))
            host, port = listening.getsockname()[:2]
            client = Client(f"http://{host}:{port}/v1", model=_adapter_name(options))
            said: list[str] = []
            stack.enter_context(_page(client, options, said))
            # After the page, which is there at once and says that the model is being loaded.
            server = stack.enter_context(_own_server(listening, options, said))
            while not (stopping.wait(SECONDS_BETWEEN_LOOKS) or server.ended(0)):
                pass
            status = server.status or 0
    sys.stdout.flush()
    os._exit(status)  # a thread that compiles cannot be stopped, and should not be waited for


def _own_server(listening: socket.socket, options: "argparse.Namespace", said: list[str]) -> "Background":
    """`serve.py` within this process, still to be entered. said: gets what it says while it loads the model."""
    from qwenvl_jax.serving.run import Background  # here, so that neither the page nor another's server wait for JAX

    told = ["--checkpoint", options.checkpoint, "--slots", str(SLOTS), "--drain-seconds", "0"]
    if options.adapter is not None:
        told += ["--adapter", f"{_adapter_name(options)}={options.adapter}"]
    told += ["--max-body-mb", str(MOST_BODY // 2**20), "--max-images", str(MOST_PICTURES)]
    serve = serving.parser().parse_args(told)

    def build(say: Callable[[str], None]) -> tuple:
        def both(line: str) -> None:
            said.append(line)
            say(line)

        return serving.build(serve, both)

    return Background("demo", serving.settings(serve), listening, build)


def _adapter_name(options: "argparse.Namespace") -> str | None:
    """What the server calls the adapter: as its folder."""
    return None if options.adapter is None else Path(options.adapter).resolve().name


@contextlib.contextmanager
def _page(client: Client, options: "argparse.Namespace", said: Sequence[str] = ()) -> Iterator[str]:
    """The page under its address. said: what is heard of the server while it loads the model."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = build(client, said)
    try:
        _, address, _ = page.launch(
            server_name=options.server_name,
            server_port=options.server_port or _free_port(options.server_name),
            share=options.share,
            inbrowser=options.inbrowser,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=MOST_BYTES,
            state_session_capacity=CAPACITY,
            footer_links=["settings"],
            ssr_mode=False,
            theme=THEME,
            css_paths=[ASSETS / "page.css"],
            js=(ASSETS / "page.js").read_text(encoding="utf-8"),
        )
    except OSError:
        place = f"{options.server_name}:{options.server_port}"
        raise UserError(
            f"cannot listen on {place}, is it taken? Choose another --server-port or --server-name"
        ) from None
    print(f"{EN.title}: {address}", flush=True)
    try:
        yield address
    finally:
        page.close()


def _free_port(host: str) -> int:
    """For port 0, which Gradio does not know."""
    with serving.listen(host, 0) as taken:
        return taken.getsockname()[1]
