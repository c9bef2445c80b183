"""The demo command: options in, then one answer in the terminal or the chat page of `app.py`.

Everything goes through the front door (`qwenvl_jax.load`, `chat`). A mistake in the options or in a file ends in one
line on standard error and exit status 2.
"""

import argparse
import os
import sys
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from qwenvl_jax.config import UserError
from qwenvl_jax.demo.display import readable
from qwenvl_jax.processing.images import load_image


def main(arguments: list[str] | None = None) -> int:
    """Run the demo with the given arguments (default: the command line's). Returns the exit status, 0 or 2."""
    options = _parser().parse_args(arguments)
    try:
        if options.cpu_only:
            os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported
        if options.ask is None:
            return _show(options)
        _answer(options)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwenvl-demo",
        description="Ask a vision-language model about pictures: with --ask in the terminal, without in the browser.",
    )
    parser.add_argument(
        "-c",
        "--checkpoint",
        "--checkpoint-path",
        default="tiny",
        help="checkpoint folder (default: the model that ships)",
    )
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter of that checkpoint, in PEFT's format")
    parser.add_argument("--cpu-only", action="store_true", help="leave accelerators alone")
    terminal = parser.add_argument_group("in the terminal")
    terminal.add_argument("--image", metavar="FILE", help="the picture, or its URL")
    terminal.add_argument("--ask", metavar="QUESTION", help="the question; the answer is printed")
    terminal.add_argument("--output", metavar="FILE", help="save the picture with the answer's boxes drawn")
    browser = parser.add_argument_group("in the browser")
    browser.add_argument("--server-name", metavar="HOST", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    browser.add_argument(
        "--server-port", metavar="PORT", type=int, default=8000, help="port to listen on; 0 takes a free one (8000)"
    )
    browser.add_argument("--api-base", metavar="URL", help="ask this server (http://HOST:PORT/v1), not an own one")
    browser.add_argument("--api-key", metavar="KEY", help="for that server ($OPENAI_API_KEY)")
    browser.add_argument("--model", metavar="NAME", help="of that server's models (its first)")
    browser.add_argument("--share", action="store_true", help="also make a public link, through Gradio's servers")
    browser.add_argument("--inbrowser", action="store_true", help="open the page in the default browser")
    return parser


def _answer(options: argparse.Namespace) -> None:
    """Print the answer and its boxes. The picture and the output folder are looked at before the model is loaded."""
    if not options.ask.strip():
        raise UserError("--ask is empty; give it a question")
    content: list[dict] = [{"type": "text", "text": options.ask}]
    if options.image is not None:
        content.insert(0, {"type": "image", "image": load_image(options.image, allow_url=True)})
    if options.output is not None:
        _check_output(options)

    import qwenvl_jax  # here, so that `--help` and a mistyped file name do not wait for JAX

    vlm = qwenvl_jax.load(options.checkpoint, adapter=options.adapter)
    reply = vlm.chat([{"role": "user", "content": content}])
    print(readable(reply.text) or reply.text)
    if reply.boxes:
        table = Table("box", "left", "top", "right", "bottom", title="in pixels of the picture")
        for box in reply.boxes:
            table.add_row(box.label or "", *(f"{corner:.0f}" for corner in (box.x1, box.y1, box.x2, box.y2)))
        Console().print(table)
    if options.output is not None:
        _save(reply, options.output)


def _check_output(options: argparse.Namespace) -> None:
    path = options.output
    if options.image is None:
        raise UserError("--output needs --image: boxes are drawn on a picture")
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--output {path}: the ending names no picture format; use .png or .jpg")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--output {path}: the folder does not exist")


def _save(reply, path: str) -> None:
    """Write the picture with the reply's boxes, or say that there is none to draw."""
    if reply.boxes:
        reply.draw().save(path)
        print(f"saved {path}")
    else:
        print(f"demo: the answer holds no box, so {path} was not written", file=sys.stderr)


def _show(options: argparse.Namespace) -> int:
    """The chat page, until it is interrupted."""
    if options.image is not None or options.output is not None:
        raise UserError("--image and --output need --ask; without a question the demo opens the chat page")
    if options.api_base is None and (options.api_key is not None or options.model is not None):
        raise UserError("--api-key and --model need --api-base: the demo's own server has no key and one model")
    try:
        from qwenvl_jax.demo import app

        return app.show(options)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("qwenvl_jax"):
            raise
        needed = f"the chat page needs packages that are not there ({error.name})"
        raise UserError(f"{needed}: pip install 'qwenvl-jax[demo]'; without them, ask with --ask") from None
