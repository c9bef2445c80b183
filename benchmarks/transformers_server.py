"""The load of `serve_load.py` on this project's server and on transformers' own, in turns: tokens per second, TTFT.

`serve.py` has the tiny model; `transformers serve` a Qwen2.5-VL of random float32 weights whose language model has the
same shape and vocabulary and whose pictures have as many patches and tokens, made here without any download. It answers
one request after the other, since it does not batch models with pictures. Both get the same questions from so many
clients at once, each of which asks its next one when the last is answered, and both give every answer all of its
tokens. Torch is tried with each number of threads, and the faster counts. TTFT is the time to the first token, TPOT
that of each further one, "prompt" the average number of its tokens.

Needs the environment that `make parity` makes: `.venv-parity/bin/python benchmarks/transformers_server.py`.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from common import described, machine, their_settings
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serve_load import Run, draw, load, started

from qwenvl_jax.checkpoints.folder import VOCABULARY, locate, read_config
from qwenvl_jax.processing.tokenizer import SPLIT_PATTERN

try:
    import torch
    import transformers
    from picture_processor import PictureProcessor
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
except ImportError as error:
    sys.exit(f"benchmarks/transformers_server.py: {error}; run it in the environment that `make parity` makes")

OURS = "qwenvl_jax"
SECONDS_TO_START = 300
PICTURE = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|video_pad|>", *PICTURE)
TEMPLATE = (  # of ChatML, with the system message that ours has
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}" + "".join(PICTURE) + "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_theirs(folder: Path) -> int:
    """Writes a Qwen2.5-VL like the tiny model, with the tiny model's vocabulary. Returns its number of parameters.

    No answer of its ends early, and its tokens are all visible: rows of the head are zero for every other token.
    """
    tiny = locate("tiny")
    config = read_config(tiny)
    made = TikTokenConverter(str(tiny / VOCABULARY), pattern=SPLIT_PATTERN, extra_special_tokens=SPECIAL_TOKENS)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made.converted(), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    visual = config.visual
    settings = their_settings(config)
    for name, token in zip(("vision_start", "image", "vision_end", "video"), (*PICTURE, "<|video_pad|>"), strict=True):
        setattr(settings, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(settings)
    texts = [tokenizer.decode([number]) for number in range(len(tokenizer) - len(SPECIAL_TOKENS))]
    visible = [number for number, text in enumerate(texts) if text.isascii() and text.isprintable()]
    with torch.no_grad():
        head = model.lm_head.weight
        head[[number for number in range(len(head)) if number not in set(visible)]] = 0
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    model.save_pretrained(folder)
    pictures = Qwen2VLImageProcessorPil(
        patch_size=visual.patch_size,
        merge_size=settings.vision_config.spatial_merge_size,
        min_pixels=visual.image_size**2,
        max_pixels=visual.image_size**2,
    )
    PictureProcessor.register_for_auto_class("AutoProcessor")
    PictureProcessor(pictures, tokenizer, chat_template=TEMPLATE).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def their_server(folder: Path, threads: int) -> Iterator[str]:
    """The address of `transformers serve` with the model in a folder, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server,
    ):
        try:
            end = time.monotonic() + SECONDS_TO_START
            while not answers(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    sys.exit(f"benchmarks/transformers_server.py: `transformers serve` did not start:\n{log.read()}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False


def measure(options: argparse.Namespace, console: Console) -> tuple[dict, list[Run]]:
    """Figures by number of clients, side and round, and the runs of the last round."""
    figures: dict[int, dict[str, list[dict[str, float]]]] = {}
    last: list[Run] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        parameters = save_theirs(folder)
        sides = {OURS: argparse.Namespace(**vars(options), base_url=None, model="tiny", plain=False)}
        stack.enter_context(started(sides[OURS], console))
        for threads in options.threads:
            address = stack.enter_context(their_server(folder, threads))
            name = f"transformers, {threads} thread{'s' * (threads > 1)}"
            sides[name] = argparse.Namespace(**vars(options), base_url=address, model=str(folder), plain=True)
        progress = stack.enter_context(Progress(console=console))
        for clients in options.concurrency:
            figures[clients] = {name: [] for name in sides}
            for number in range(options.rounds):
                before = sum(len(rounds[OURS]) for rounds in figures.values())
                for name, side in sides.items():
                    run = asyncio.run(load(side, f"{name}, {clients} at once", clients, before, progress))
                    if short := [answer.tokens for answer in run.answers if answer.tokens != options.tokens]:
                        sys.exit(f"benchmarks/transformers_server.py: {name} gave answers of {short} tokens")
                    figures[clients][name].append(run.summary(options.max_ttft, options.max_tpot))
                    last += [run] if number == options.rounds - 1 else []
    return {"their_parameters": parameters, "runs": figures}, last


def fastest(rounds: dict[str, list[dict[str, float]]]) -> str:
    """The side of transformers that gives most tokens a second."""
    others = [name for name in rounds if name != OURS]
    return max(others, key=lambda name: statistics.median(run["tokens_per_second"] for run in rounds[name]))


def shown(runs: dict[int, dict[str, list[dict[str, float]]]], options: argparse.Namespace) -> Table:
    table = Table(
        title=f"Answers of {options.tokens} tokens, {options.picture_share:.0%} of the questions with a picture"
    )
    for heading in ("streams", "", "tokens per second", "spread", "TTFT p50, ms", "p90", "TPOT p50, ms", "prompt"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for clients, rounds in runs.items():
        for name, found in rounds.items():
            rates = [run["tokens_per_second"] for run in found]
            others = [
                f"{statistics.median(run[key] for run in found):,.1f}"
                for key in ("ttft_p50_ms", "ttft_p90_ms", "tpot_p50_ms", "prompt_tokens")
            ]
            spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
            table.add_row(str(clients), name, f"{statistics.median(rates):,.0f}", spread, *others)
        table.add_section()
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--concurrency", type=int, nargs="+", default=[1, 32], help="clients at once (1 32)")
    add("--rounds", type=int, default=3, help="of every side and number of clients, in turns (3)")
    add("--requests", type=int, default=128, help="of a round (128)")
    add("--tokens", type=int, default=64, help="of each answer (64)")
    add("--words", type=int, default=12, help="of each question (12)")
    add("--picture-share", type=float, default=0.5, help="of requests with a picture (0.5)")
    add("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}), help="of torch, each is tried")
    add("--slots", type=int, default=32, help="of this project's server (32)")
    add("--output", type=Path, help="a file name without its ending, for .json and .png")
    options = parser.parse_args()
    console = Console(width=120)
    fixed = {"same": False, "seed": 0, "rate": None, "api_key": "none", "max_ttft": 1.0, "max_tpot": 0.1}
    result, last = measure(argparse.Namespace(**vars(options), **fixed), console)
    console.print(shown(result["runs"], options))
    result["times_as_many_tokens"] = {}
    for clients, rounds in result["runs"].items():
        best = fastest(rounds)
        pairs = [
            a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(rounds[OURS], rounds[best], strict=True)
        ]
        result["times_as_many_tokens"][clients] = pairs
        console.print(
            f"{clients} at once: [bold]{statistics.median(pairs):.1f} times the tokens a second[/bold] of {best} "
            f"({min(pairs):.1f} to {max(pairs):.1f} over {len(pairs)} rounds)"
        )
    about = machine(("jax", "jaxlib", "flax", "torch", "transformers", "uvicorn"))
    console.print(
        f"{options.requests} requests a round; {result['their_parameters']:,} parameters there\n" + described(about)
    )
    if options.output is not None:
        chosen = {name: value for name, value in vars(options).items() if name != "output"}
        found = {"date": datetime.date.today().isoformat(), "machine": about, "options": chosen} | result
        options.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        draw(last, options.output.with_suffix(".png"))
    return int(any(run["failures"] for rounds in result["runs"].values() for found in rounds.values() for run in found))


if __name__ == "__main__":
    sys.exit(main())
