"""Many clients at once for a long time: `python benchmarks/soak.py [--streams 64] [--minutes 10]`.

Starts `serve.py` with the tiny model, asks a few dozen questions one by one, and then has many clients ask them again
in any order, as streams and whole, between clients that go away in the middle and requests that are garbage. Says what
was lost, what was answered otherwise than alone, and how the server's memory grew; exit status 1 for any of these. Then
it kills the server in the middle of streams and says how soon another is ready.
"""

import argparse
import asyncio
import base64
import collections
import contextlib
import dataclasses
import io
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

REPOSITORY = Path(__file__).parents[1]
QUESTIONS = (
    "What do you see?",
    "Where is the yellow cross?",
    "What does it say?",
    "How many shapes are there?",
    "你好",
)
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "cross", "square"]}, "many": {"type": "boolean"}},
    "required": ["shape", "many"],
    "additionalProperties": False,
}
FIRST_MINUTE = 60  # seconds after which memory must stay as it is
MOST_GROWTH = 0.05
KILLED_STREAMS = 32


@dataclasses.dataclass
class Tally:
    """What has happened so far."""

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    problems: list[str] = dataclasses.field(default_factory=list)
    tokens: int = 0

    def wrong(self, text: str) -> None:
        self.counts["wrong"] += 1
        if len(self.problems) < 20:
            self.problems.append(text)


def questions(pictures: int) -> list[dict]:
    """Bodies that are asked again and again: long and short, with pictures or none, drawn or greedy, formed or free."""
    generator = np.random.default_rng(0)
    parts = []
    for _ in range(pictures):
        pixels = generator.integers(0, 256, (2, 2, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    bodies = []
    for number in range(6 * pictures):
        shown = [parts[(number + other) % pictures] for other in range(number % 3)]
        length = int(generator.integers(0, 500)) * (number % 2)
        content = [*shown, {"type": "text", "text": "word " * (length // 5) + QUESTIONS[number % len(QUESTIONS)]}]
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8 + 3 * (number % 9)}
        body |= {"temperature": 0.8, "seed": number} if number % 4 == 1 else {"temperature": 0}
        if number % 6 == 5:
            form = {"name": "answer", "schema": SCHEMA}
            body |= {"response_format": {"type": "json_schema", "json_schema": form}, "max_tokens": 60}
        bodies.append(body)
    return bodies


def garbage() -> list[bytes]:
    """Bodies that must be refused."""

    def asked(content: object) -> bytes:
        return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": content}]}).encode()

    def shown(url: str) -> bytes:
        return asked([{"type": "image_url", "image_url": {"url": url}}])

    return [
        *(b"", b"{", b'{"model": "tiny"}', b"[" * 5000, b"\x00" * 1000),
        asked("hello")[:-1] + b', "temperature": NaN}',
        asked("\ud800"),
        asked("long " * 50_000),
        shown("file:///etc/passwd"),
        shown("data:image/png;base64,iVBORw0KGgo="),
    ]


async def ask(client: httpx.AsyncClient, body: dict, stream: bool) -> tuple[str, int]:
    """The text of an answer and its number of tokens."""
    if not stream:
        response = await client.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        answer = response.json()
        return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
    text, tokens, ended = "", 0, False
    wanted = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/chat/completions", json=wanted) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise RuntimeError(f"an error in the stream: {chunk['error']}")
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    if not ended:
        raise RuntimeError("a stream without its end")
    return text, tokens


async def one(client: httpx.AsyncClient, bodies: list[dict], alone: list[str], tally: Tally) -> None:
    """What a client does in one go."""
    kind = random.random()
    number = random.randrange(len(bodies))
    if kind < 0.1:
        response = await client.post(
            "/v1/chat/completions", content=random.choice(garbage()), headers={"content-type": "application/json"}
        )
        tally.counts["garbage"] += 1
        if not 400 <= response.status_code < 500:
            tally.wrong(f"garbage was answered with {response.status_code}: {response.text[:200]}")
    elif kind < 0.2:
        body = bodies[number] | {"max_tokens": 200, "min_tokens": 200, "stream": True, "response_format": None}
        seconds = random.expovariate(10)
        with contextlib.suppress(TimeoutError):  # which is when this client goes away
            async with asyncio.timeout(seconds), client.stream("POST", "/v1/chat/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    pass
        tally.counts["gone away"] += 1
    else:
        stream = kind < 0.6
        text, tokens = await ask(client, bodies[number], stream)
        tally.counts["stream" if stream else "whole"] += 1
        tally.tokens += tokens
        if text != alone[number]:
            tally.wrong(f"question {number}: {text!r} instead of {alone[number]!r}")


async def worker(client: httpx.AsyncClient, bodies: list[dict], alone: list[str], tally: Tally, end: float) -> None:
    while time.monotonic() < end:
        try:
            await one(client, bodies, alone, tally)
        except (httpx.HTTPError, RuntimeError, KeyError, ValueError) as error:
            tally.wrong(f"{type(error).__name__}: {error}")


def resident(process: int) -> float:
    """MiB of memory that a process holds."""
    (kib,) = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(kib) / 1024


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^qwenvl:(\w+) (\S+)$", text, re.MULTILINE)}


async def soak(url: str, process: int, options: argparse.Namespace, console: Console) -> int:
    limits = httpx.Limits(max_connections=options.streams + 8)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:
        bodies = questions(options.pictures)
        alone = [(await ask(client, body, stream=False))[0] for body in bodies]
        tally, began = Tally(), time.monotonic()
        end = began + 60 * options.minutes
        workers = [asyncio.create_task(worker(client, bodies, alone, tally, end)) for _ in range(options.streams)]
        memory: list[tuple[float, float]] = []
        with Progress(console=console) as progress:
            bar = progress.add_task("asking", total=60 * options.minutes)
            while time.monotonic() < end:
                await asyncio.sleep(min(5, max(end - time.monotonic(), 0.1)))
                memory.append((time.monotonic() - began, resident(process)))
                text = f"{sum(tally.counts.values())} requests, {tally.counts['wrong']} wrong, {memory[-1][1]:.0f} MiB"
                progress.update(bar, completed=time.monotonic() - began, description=text)
        await asyncio.gather(*workers)
        seconds = time.monotonic() - began
        for _ in range(100):  # what was given up in the last moment leaves within a few turns
            found = await metrics(client)
            if not (found["num_requests_running"] or found["num_requests_waiting"]):
                break
            await asyncio.sleep(0.05)
    table = Table("", "", title=f"{options.streams} clients for {seconds / 60:.1f} minutes")
    for name, count in sorted(tally.counts.items()):
        table.add_row(name, f"{count:,}")
    table.add_row("tokens a second", f"{tally.tokens / seconds:.0f}")
    settled = [mib for at, mib in memory if at >= min(FIRST_MINUTE, 30 * options.minutes)]
    growth = max(settled) / settled[0] - 1
    table.add_row("memory after the first minute", f"{settled[0]:.0f} MiB")
    table.add_row("its growth since", f"{growth:+.1%}")
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "recompiles_total"):
        table.add_row(name, f"{found[name]:g}")
        if found[name]:
            tally.problems.append(f"{name} is {found[name]:g} at the end")
    console.print(table)
    if growth > MOST_GROWTH:
        tally.problems.append(f"memory grew by {growth:.1%}")
    for problem in tally.problems:
        console.print(problem, style="red", markup=False)
    return int(bool(tally.problems))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--slots", type=int, default=16)
    options = parser.parse_args()
    random.seed(0)
    console = Console()
    command = [sys.executable, "serve.py", "--port", "0", "--slots", str(options.slots), "--max-model-len", "1024"]
    with started(command, console) as (server, url, _):
        status = asyncio.run(soak(url, server.pid, options, console))
        ended = asyncio.run(killed(url, server))
    with started(command, console) as (_, _, seconds):
        console.print(f"killed with {KILLED_STREAMS} streams, of which {ended} noticed; ready again in {seconds:.1f} s")
    return status or int(ended != KILLED_STREAMS)


@contextlib.contextmanager
def started(command: list[str], console: Console) -> Iterator[tuple[subprocess.Popen, str, float]]:
    """A server that is ready, where it listens, and the seconds that it took."""
    began = time.monotonic()
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            url = ""
            for line in server.stdout:
                console.print(line.rstrip(), markup=False, highlight=False)
                if found := re.search(r"listening on (http://\S+)", line):
                    url = found[1]
                if line.startswith("ready"):
                    break
            else:
                sys.exit("the server did not start")
            yield server, url, time.monotonic() - began
        finally:
            server.terminate()


async def killed(url: str, server: subprocess.Popen) -> int:
    """Kills the server while streams run, and returns how many of these notice: none may wait for ever."""

    async def stream(client: httpx.AsyncClient) -> bool:
        try:
            await ask(client, questions(1)[0] | {"max_tokens": 900, "min_tokens": 900}, stream=True)
        except (httpx.HTTPError, RuntimeError):
            return True
        return False

    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:
        streams = [asyncio.create_task(stream(client)) for _ in range(KILLED_STREAMS)]
        await asyncio.sleep(1)
        server.kill()
        return sum(await asyncio.gather(*streams))


if __name__ == "__main__":
    sys.exit(main())
