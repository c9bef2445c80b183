"""The load that a server takes: `python benchmarks/serve_load.py [--base-url URL --model NAME] [--concurrency 1,32]`.

Asks any server with OpenAI's API for streams, from so many clients at once (closed loop) or at so many requests a
second, whenever the last ones are done (open loop, `--rate`). Says how long the first token takes (TTFT), each further
one (TPOT), a whole answer, how many tokens a second come out of the server, and the share of answers within the bounds
that were given (goodput). Without a URL it starts `serve.py` with the tiny model. Writes JSON and a PNG.
"""

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import datetime
import io
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import matplotlib
import numpy as np
from common import machine
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).parents[1]
WORDS = ("what", "is", "there", "to", "see", "in", "this", "picture", "where", "from", "left", "right")


@dataclasses.dataclass
class Answer:
    """Of one request, in seconds. started: since the run began. times: of each chunk with text, since it was asked.

    prompt, tokens: of the prompt and of the answer, as the server counts them.
    """

    started: float
    times: list[float]
    whole: float
    prompt: int
    tokens: int

    @property
    def first(self) -> float:
        return self.times[0] if self.times else self.whole

    @property
    def per_token(self) -> float:
        """Between two tokens, on average."""
        return (self.whole - self.first) / max(self.tokens - 1, 1)


@dataclasses.dataclass
class Run:
    """What one load gave."""

    name: str
    seconds: float
    answers: list[Answer]
    failures: int

    def summary(self, most_first: float, most_per_token: float) -> dict[str, float]:
        good = [a for a in self.answers if a.first <= most_first and a.per_token <= most_per_token]
        figures = {
            "requests": len(self.answers),
            "failures": self.failures,
            "requests_per_second": len(self.answers) / self.seconds,
            "tokens_per_second": sum(a.tokens for a in self.answers) / self.seconds,
            "prompt_tokens": statistics.fmean(a.prompt for a in self.answers) if self.answers else 0.0,
            "goodput": len(good) / max(len(self.answers) + self.failures, 1),
        }
        for name, values in (
            ("ttft", [a.first for a in self.answers]),
            ("tpot", [a.per_token for a in self.answers]),
            ("e2e", [a.whole for a in self.answers]),
        ):
            for percent in (50, 90, 99):
                figures[f"{name}_p{percent}_ms"] = 1000 * float(np.percentile(values, percent)) if values else 0.0
        return figures


def body(options: argparse.Namespace, number: int) -> dict:
    """A request that no other is like, so that caches do not answer it, unless `--same` asks for one picture."""
    number += options.seed
    source = random.Random(number)
    content: list[dict] = [{"type": "text", "text": " ".join(source.choices(WORDS, k=options.words))}]
    if source.random() < options.picture_share:
        content.insert(0, {"type": "image_url", "image_url": {"url": picture(0 if options.same else number)}})
    wanted = {
        "model": options.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": options.tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return wanted if options.plain else wanted | {"min_tokens": options.tokens, "ignore_eos": True}


def picture(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((448, 448), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


async def ask(client: aiohttp.ClientSession, wanted: dict, began: float) -> Answer:
    """One stream. Raises aiohttp.ClientError, or RuntimeError for a stream that fails or has no end.

    Its end is a reason to finish or `[DONE]`; some servers do not send the latter.
    """
    start, times, usage, ended = time.perf_counter(), [], {}, False
    async with client.post("chat/completions", json=wanted) as response:
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            content = line.removeprefix(b"data: ")
            if content.rstrip() == b"[DONE]":
                ended = True
                break
            chunk = json.loads(content)
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                times.append(time.perf_counter() - start)
            ended = ended or any(choice.get("finish_reason") for choice in chunk["choices"])
            usage = chunk.get("usage") or usage
    if not ended:
        raise RuntimeError("a stream without its end")
    whole = time.perf_counter() - start
    return Answer(start - began, times, whole, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))


async def load(options: argparse.Namespace, name: str, concurrency: int | None, before: int, progress: Progress) -> Run:
    """Asks `options.requests` times, from so many clients; None: at `options.rate`. before: runs before this one."""
    first, *bodies = (body(options, before * (options.requests + 1) + number) for number in range(options.requests + 1))
    answers: list[Answer] = []
    failures = 0
    bar = progress.add_task(name, total=len(bodies))
    async with aiohttp.ClientSession(
        options.base_url.rstrip("/") + "/",
        headers={"authorization": f"Bearer {options.api_key}"},
        timeout=aiohttp.ClientTimeout(sock_read=600),
        connector=aiohttp.TCPConnector(limit=0),
        raise_for_status=True,
    ) as client:
        await ask(client, first, 0)  # connections and what a server does at its first request
        gate = asyncio.Semaphore(concurrency or len(bodies))
        began = time.perf_counter()

        async def one(wanted: dict) -> None:
            nonlocal failures
            async with gate:
                try:
                    answers.append(await ask(client, wanted, began))
                except (aiohttp.ClientError, RuntimeError, ValueError, TimeoutError) as error:
                    failures += 1
                    progress.console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
            progress.advance(bar)

        tasks = []
        for wanted in bodies:
            tasks.append(asyncio.create_task(one(wanted)))
            if concurrency is None:
                await asyncio.sleep(random.expovariate(options.rate))
        await asyncio.gather(*tasks)
        return Run(name, time.perf_counter() - began, answers, failures)


@contextlib.contextmanager
def started(options: argparse.Namespace, console: Console) -> Iterator[None]:
    """The tiny model's server, unless a URL was given."""
    if options.base_url is not None:
        yield
        return
    command = [sys.executable, "serve.py", "--port", "0", "--slots", str(options.slots), "--max-model-len", "1024"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if found := re.search(r"listening on (http://\S+)", line):
                    options.base_url = found[1] + "/v1"
                if line.startswith("ready"):
                    break
            else:
                sys.exit("benchmarks/serve_load.py: serve.py did not start; start it by hand to see why")
            console.print(f"serve.py with the tiny model and {options.slots} slots")
            yield
        finally:
            server.terminate()


def shown(runs: list[Run], figures: list[dict[str, float]]) -> Table:
    table = Table("", *(run.name for run in runs))
    for key in figures[0]:
        table.add_row(key.replace("_", " "), *(f"{figure[key]:,.2f}".removesuffix(".00") for figure in figures))
    return table


def draw(runs: list[Run], file: Path) -> None:
    """The share of answers whose first token, and whose further tokens, came within a time."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for run in runs:
        for axis, values in (
            (axes[0], [a.first for a in run.answers]),
            (axes[1], [a.per_token for a in run.answers]),
        ):
            axis.ecdf([1000 * value for value in values], label=run.name)
    for axis, title in zip(axes, ("time to the first token, ms", "time per further token, ms"), strict=True):
        axis.set(xlabel=title, ylabel="share of answers")
        axis.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base-url", help="of a server, as http://host:8000/v1")
    add("--model", default="tiny")
    add("--api-key", default="none")
    add("--concurrency", default="1,32", help="clients at once, several numbers with commas (1,32)")
    add("--rate", type=float, help="instead: requests a second, at random times")
    add("--requests", type=int, default=128)
    add("--tokens", type=int, default=64, help="of each answer (64)")
    add("--words", type=int, default=12, help="of each question (12)")
    add("--picture-share", type=float, default=0.5, help="of requests with a picture (0.5)")
    add("--same", action="store_true", help="one picture for all")
    add("--plain", action="store_true", help="OpenAI's fields alone, so that a model may end its answers early")
    add("--max-ttft", type=float, default=1.0, help="seconds, for goodput (1)")
    add("--max-tpot", type=float, default=0.1, help="seconds, for goodput (0.1)")
    add("--slots", type=int, default=32, help="of the server that is started")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="a file name without its ending, for .json and .png")
    options = parser.parse_args()
    loads = [None] if options.rate else [int(number) for number in options.concurrency.split(",")]
    console = Console()
    runs = []
    with started(options, console), Progress(console=console) as progress:
        for concurrency in loads:
            name = f"{options.rate:g} a second" if concurrency is None else f"{concurrency} at once"
            runs.append(asyncio.run(load(options, name, concurrency, len(runs), progress)))
    figures = [run.summary(options.max_ttft, options.max_tpot) for run in runs]
    console.print(shown(runs, figures))
    if len(runs) > 1:
        ratio = figures[-1]["tokens_per_second"] / figures[0]["tokens_per_second"]
        console.print(f"{runs[-1].name}: {ratio:.1f} times the tokens a second of {runs[0].name}")
    if options.output is not None:
        found = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(["jax", "jaxlib", "qwenvl-jax"]),
            "options": {k: v for k, v in vars(options).items() if k not in ("api_key", "output", "base_url")},
            "runs": {run.name: figure for run, figure in zip(runs, figures, strict=True)},
            "median_chunks": {run.name: statistics.median(len(a.times) for a in run.answers) for run in runs},
        }
        options.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        draw(runs, options.output.with_suffix(".png"))
    return int(any(run.failures for run in runs))


if __name__ == "__main__":
    sys.exit(main())
