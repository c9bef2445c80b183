"""The serve command: options in, then a server until a signal ends it.

A mistake in the options, a port in use, or a checkpoint that there is not ends in one line on standard error and exit
status 2.
"""

import argparse
import math
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qwenvl_jax.config import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qwenvl_jax.inference.engine import Engine as InferenceEngine
    from qwenvl_jax.inference.engine import EngineOptions
    from qwenvl_jax.inference.followers import Followers
    from qwenvl_jax.serving.replies import Engine
    from qwenvl_jax.serving.settings import Settings
    from qwenvl_jax.vlm import VLM

KEY_VARIABLE = "QWENVL_API_KEY"
PROGRAMS_A_LINE = 10  # compiled between two lines of progress
BACKLOG = 2048  # connections that wait to be accepted
HOSTS = ("detect", "coordinator", "count", "index")  # fields of hosts.HostsRecipe
MESH_AXES = ("data", "fsdp", "tensor")  # of sharding.py, which needs JAX


def main(arguments: list[str] | None = None) -> int:
    """Serve with the given arguments (default: the command line's). Returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        if any(getattr(options, f"hosts.{name}") not in (None, False) for name in HOSTS):
            from qwenvl_jax.serving import hosts

            hosts.serve(options)
        with listen(options.host, options.port) as listening:
            told = settings(options)
            try:
                from qwenvl_jax.serving import run  # here, so that `--help` and a wrong option do not wait for JAX
            except ModuleNotFoundError as error:
                needed = "the server needs packages that are not there"
                raise UserError(f"{needed} ({error.name}): pip install 'qwenvl-jax[serve]'") from None

            return run.serve(told, listening, lambda say: build(options, say), options.log_level)
    except UserError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage before it."""
        self.exit(2, f"serve: {message} (see --help)\n")


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = _Parser(prog="qwenvl-serve", description="Serve a model over HTTP in the form of OpenAI's API.")
    _add_model(made.add_argument_group("the model").add_argument)
    add = made.add_argument_group("several hosts, all with the same command, as of train.py").add_argument
    add("--hosts.detect", action="store_true", help="take address, count and index from the cluster's environment")
    add("--hosts.coordinator", metavar="HOST:PORT", help="or: of the first host, which serves")
    add("--hosts.count", metavar="N", type=_positive, help="how many hosts there are")
    add("--hosts.index", metavar="I", type=_whole, help="which of them this is, from 0")
    add = made.add_argument_group("the address").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=_port, default=8000, help="port to listen on; 0 takes a free one (8000)")
    add("--cors-origin", metavar="ORIGIN", action="append", default=[], help="web page that may call; may be repeated")
    add = made.add_argument_group("who may call").add_argument
    add("--api-key", metavar="KEY", action="append", default=[], help=f"may be repeated; also ${KEY_VARIABLE}")
    add("--api-key-file", metavar="FILE", help="a file with a key a line, which `ps` does not show")
    add = made.add_argument_group("limits").add_argument
    add("--max-queue", metavar="N", type=_positive, default=128, help="replies under way or waiting at one time (128)")
    add("--max-body-mb", metavar="MIB", type=_positive, default=32, help="size of a request (32)")
    add("--max-images", metavar="N", type=_whole, default=8, help="pictures in a request (8)")
    add(
        "--max-pixels", metavar="N", type=_positive, default=50_000_000, help="width x height of a picture (50,000,000)"
    )
    add("--allow-urls", action="store_true", help="fetch pictures from http(s) URLs that requests name")
    add("--allowed-host", metavar="HOST", action="append", default=[], help="fetch from there only; may be repeated")
    add("--request-timeout", metavar="SECONDS", type=_seconds, default=600, help="for a whole answer (600)")
    add("--drain-seconds", metavar="SECONDS", type=_seconds, default=30, help="for answers under way at SIGTERM (30)")
    add(
        "--stall-seconds",
        metavar="SECONDS",
        type=_seconds,
        default=60,
        help="without a step until /health says that a busy engine is stuck (60)",
    )
    add(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="least that is logged (info)"
    )
    return made


def _add_model(add: Callable[..., Any]) -> None:
    add("-c", "--checkpoint", default="tiny", help="checkpoint folder (default: the model that ships)")
    add("--served-model-name", metavar="NAME", action="append", help="what requests call it; may be given again")
    add(
        "--adapter",
        metavar="NAME=DIR",
        type=_named,
        action="append",
        default=[],
        help="a LoRA adapter in PEFT's form, asked for as model NAME; may be given again",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of parameters (default: as stored)")
    add("--quantize", choices=("int8", "int4", "nf4"), help="keep the language model's weights in 8 or 4 bits")
    add(
        "--mesh",
        metavar="AXIS=N,...",
        type=_mesh,
        help="split the model over devices: tensor, fsdp and data, for example tensor=4 (default: one device)",
    )
    add("--slots", type=_positive, default=8, help="replies that are generated at one time (8)")
    add("--max-model-len", metavar="TOKENS", type=_positive, help="prompt and reply together (default: seq_length)")
    add(
        "--kv-cache",
        choices=("model", "int8"),
        default="model",
        help="keys and values as the model computes them, or in half the memory (model)",
    )
    add(
        "--prefixes",
        metavar="TOKENS",
        type=_whole,
        default=16384,
        help="of beginnings of prompts that are kept (16384)",
    )
    add(
        "--speculate",
        metavar="TOKENS",
        type=_whole,
        default=0,
        help="looked up in the prompt and checked beside the next one, for greedy replies while few are made (0)",
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on. Raises UserError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot listen on {host}:{port} ({reason}); choose another --port or --host") from None


def settings(options: argparse.Namespace) -> "Settings":
    """The options as what a server is told. Raises UserError."""
    from qwenvl_jax.serving.media import ImageLimits
    from qwenvl_jax.serving.settings import MEGABYTE, Settings

    if options.allowed_host and not options.allow_urls:
        raise UserError("--allowed-host: only with --allow-urls; without it no URL is fetched")
    names = options.served_model_name or [_model_name(options.checkpoint)]
    several = [name for name, _ in options.adapter]
    for name in several:
        if several.count(name) > 1 or name in names:
            raise UserError(f"--adapter {name}=...: the name is taken; give each adapter one of its own")
    return Settings(
        model_names=tuple(names),
        adapters=tuple(name for name, _ in options.adapter),
        api_keys=tuple(_keys(options)),
        max_queue=options.max_queue,
        max_body_bytes=options.max_body_mb * MEGABYTE,
        max_images=options.max_images,
        image_limits=ImageLimits(max_pixels=options.max_pixels),
        allow_urls=options.allow_urls,
        allowed_hosts=tuple(options.allowed_host),
        cors_origins=tuple(options.cors_origin),
        request_timeout=options.request_timeout,
        drain_seconds=options.drain_seconds,
        stall_seconds=options.stall_seconds,
    )


def build(
    options: argparse.Namespace, say: Callable[[str], None], followers: "Followers | None" = None
) -> "tuple[VLM, Engine]":
    """The model and a running engine, which leads those of other hosts if there are any. Raises UserError."""
    vlm, engine = prepare(options, say, followers)
    if followers is not None:
        followers.wait()
    engine.start()
    return vlm, engine


def prepare(
    options: argparse.Namespace, say: Callable[[str], None], followers: "Followers | None" = None
) -> "tuple[VLM, InferenceEngine]":
    """The model and an engine that has compiled all and does nothing yet. Raises UserError."""
    import jax

    import qwenvl_jax
    from qwenvl_jax.inference.engine import Engine
    from qwenvl_jax.inference.memory import check_memory, described
    from qwenvl_jax.inference.text import token_bytes

    mesh = mesh_of(options.mesh)
    say(f"loading {options.checkpoint}")
    vlm = qwenvl_jax.load(
        options.checkpoint, dtype=options.dtype, quantize=options.quantize, mesh=mesh, adapters=dict(options.adapter)
    )
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # There are many small programs, too, and all of them are wanted again at the next start.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    sizes = engine_options(options, vlm)
    say(described(check_memory(vlm.generator, sizes), sizes))
    engine = Engine(vlm.generator, token_bytes(vlm.processor.tokenizer), sizes, followers)

    def progress(done: int, of: int | None) -> None:
        if done == of or done % PROGRAMS_A_LINE == 1:
            say(f"compiling: {done} done" if of is None else f"compiling: {done} of {of} programs")

    engine.warm_up(progress)
    return vlm, engine


def mesh_of(sizes: dict[str, int] | None) -> "Mesh | None":
    """The first devices as a mesh with axes of these sizes. Raises UserError where it is none that can be served."""
    import jax

    from qwenvl_jax.sharding import make_mesh

    devices = jax.devices()
    needed = 1 if sizes is None else math.prod(sizes.values())
    if jax.process_count() > 1 and needed != len(devices):
        raise UserError(f"--mesh: on several hosts it takes all devices, of which there are {len(devices)}")
    if sizes is None:
        return None
    if needed > len(devices):
        raise UserError(f"--mesh: {needed} devices are asked for; there are {len(devices)}")
    return make_mesh("fsdp_tensor", devices[:needed], data=sizes.get("data", 1), tensor=sizes.get("tensor", 1))


def engine_options(options: argparse.Namespace, vlm: "VLM") -> "EngineOptions":
    """What the engine keeps in memory. Raises UserError."""
    from qwenvl_jax.inference.engine import EngineOptions

    return EngineOptions(
        options.slots,
        max_length(options, vlm),
        prefixes=options.prefixes,
        speculate=options.speculate,
        cache=options.kv_cache,
    )


def max_length(options: argparse.Namespace, vlm: "VLM") -> int:
    """Tokens of a prompt and its reply together: what the model was trained for, or what is asked for."""
    most = vlm.config.max_position_embeddings
    if options.max_model_len is None:
        return min(vlm.config.seq_length, most)
    if options.max_model_len > most:
        raise UserError(f"--max-model-len {options.max_model_len}: this model has {most} positions")
    return options.max_model_len


def _keys(options: argparse.Namespace) -> list[str]:
    keys = list(options.api_key)
    if KEY_VARIABLE in os.environ:
        keys.append(os.environ[KEY_VARIABLE])
    if options.api_key_file is not None:
        try:
            lines = Path(options.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UserError(f"--api-key-file {options.api_key_file}: cannot be read ({reason})") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"--api-key-file {options.api_key_file}: holds no key; write one a line")
        keys += found
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"an API key is empty or has characters that headers cannot hold (--api-key, ${KEY_VARIABLE})"
            )
    return keys


def _model_name(checkpoint: str) -> str:
    """A hub name as it is, the last part of a path."""
    path = Path(checkpoint).expanduser()
    return path.resolve().name if path.is_dir() else checkpoint


def _whole(text: str) -> int:
    return _integer(text, 0, 2**31 - 1)


def _positive(text: str) -> int:
    return _integer(text, 1, 2**31 - 1)


def _port(text: str) -> int:
    return _integer(text, 0, 2**16 - 1)


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, folder


def _mesh(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        axis, equals, number = part.partition("=")
        if not equals or axis not in MESH_AXES or axis in sizes:
            raise argparse.ArgumentTypeError(f"{text!r} is not like tensor=4 or data=2,tensor=4")
        sizes[axis] = _positive(number)
    return sizes


def _integer(text: str, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text[:20]) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value
