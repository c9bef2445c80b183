"""The host's share of a decode step: `python benchmarks/host_share.py [--slots 32]`.

An engine decodes as many replies at once as it has slots, for clients in an event loop that take their text as the
server's do. Counted are turns of its thread in which every slot has a reply and nothing waits. A turn is a few decode
steps, and its time is spent

- waiting for the results that it reads: the device works, the thread does not;
- in calls of compiled programs, which puts them in the device's queue (a CPU may compute a part of them at once, so
  that there this is an upper bound), by whichever thread makes them;
- in the rest: looking for new and cancelled requests, reading tokens, making text of them, telling listeners.

The host's share is what a processor worked in the latter two, per decode step; time in which another program
had that processor does not count. It is not what the device loses, since that works on the next steps meanwhile.
Therefore a bare loop takes turns with the engine on the same batches: it asks for steps, waits for the tokens of those
asked for before, and does nothing else while the clock runs. A step in the engine takes longer by what the engine holds
it up. On a CPU, device and host share cores, and the former figure is the more certain one.
"""

import argparse
import asyncio
import dataclasses
import datetime
import functools
import itertools
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from common import described, machine
from rich.console import Console
from rich.table import Table

import qwenvl_jax as qv
from qwenvl_jax.config import UserError
from qwenvl_jax.inference import engine as engines
from qwenvl_jax.inference.engine import Engine, EngineOptions, _Report
from qwenvl_jax.inference.requests import Request
from qwenvl_jax.inference.sampling import SamplingOptions
from qwenvl_jax.inference.text import token_bytes
from qwenvl_jax.serving.replies import Replies

GOAL_MS = 1.0  # per step, at 32 slots
TURNS_EACH = 2  # of the engine, then of the bare loop; the cache keeps a size for four
WORDS = ("what", "is", "there", "to", "see", "in", "this", "picture", "where", "from", "left", "right")

Size = tuple[tuple[int, int], ...]  # rows and slots of each batch's cache


@dataclasses.dataclass
class Turn:
    """Of the engine's loop, in seconds: by the wall clock, and what a processor did."""

    size: Size
    steps: int = 0
    whole: float = 0.0
    waiting: float = 0.0
    worked: float = 0.0
    calls: float = 0.0  # of that


class TimedEngine(Engine):
    """An engine that notes its turns, and bare ones between them, while all its slots decode and nothing waits."""

    def __init__(self, vlm: qv.VLM, options: EngineOptions):
        super().__init__(vlm.generator, token_bytes(vlm.processor.tokenizer), options)
        self.turns: list[Turn] = []
        self.bare: list[Turn] = []
        self._number = 0  # of the turns with all slots in use
        self._adding = threading.Lock()
        self._called_here = 0.0  # of a turn's calls, those by the engine's own thread
        self._now = Turn(())
        for batch in self._batches.batches:
            batch.decode = functools.partial(self._timed_decode, batch.decode)

    @property
    def _size(self) -> Size:
        return tuple(batch.size for batch in self._batches.batches)

    def _turn(self) -> None:
        full = self._full()
        self._number += full
        now = self._now = Turn(self._size, self._now.steps)
        if full and self._number % (TURNS_EACH + 1) == 0:
            self._bare_turns(now.steps)
            return
        steady = full and len(self._unread) == len(now.size)  # what the turn before has asked for
        self._called_here = 0.0
        start, worked = time.perf_counter(), time.thread_time()
        super()._turn()
        now.whole = time.perf_counter() - start
        now.worked += time.thread_time() - worked + now.calls - self._called_here
        if steady and self._full() and now.size == self._size:
            self.turns.append(now)

    def _full(self) -> bool:
        return self.running == self.options.slots and not self.waiting

    def _bare_turns(self, steps: int) -> None:
        """Asks for steps and waits for those asked for before, as a turn does; tells the listeners after the last."""
        while self._unread:
            self._read(self._unread.popleft())
        asked = [self._asked(steps)]
        turns = []
        for _ in range(TURNS_EACH):
            turn = Turn(self._size, steps)
            start = time.perf_counter()
            asked.append(self._asked(steps))
            jax.device_get([report.grown for report in asked[-2]])
            turn.whole = time.perf_counter() - start
            turns += [turn] if turn.size == self._size else []
        if not any(np.any(jax.device_get(report.grown.done)) for report in asked[-1]):  # else they had less to do
            self.bare += turns
        for report in itertools.chain(*asked):
            self._read(report)

    def _asked(self, steps: int) -> list[_Report]:
        return [_Report.of(*told) for told in self._batches.decode(steps)]

    def _timed_decode(self, decode: Callable, steps: int, *arguments) -> tuple:
        worked = time.thread_time()
        found = decode(steps, *arguments)
        worked = time.thread_time() - worked
        with self._adding:
            self._now.calls += worked
            self._now.steps = steps
            if threading.current_thread() is self._thread:
                self._called_here += worked
        return found

    def _read(self, report) -> None:
        start, worked = time.perf_counter(), time.thread_time()
        jax.block_until_ready(report.grown)
        self._now.waiting += time.perf_counter() - start
        self._now.worked -= time.thread_time() - worked
        super()._read(report)


def requests(vlm: qv.VLM, options: argparse.Namespace, number: int) -> list[Request]:
    """One for each slot, none like another."""
    source = random.Random(number)
    option = SamplingOptions(min_new_tokens=options.tokens, max_new_tokens=options.tokens)
    prompts = [
        vlm.processor.chat([{"role": "user", "content": " ".join(source.choices(WORDS, k=20))}])
        for _ in range(options.slots)
    ]
    return [Request(prompt, option, strip=True) for prompt in prompts]


async def answered(engine: Engine, asked: list[Request]) -> None:
    """Takes the text of all replies as the server does."""

    async def client(request: Request) -> None:
        replies = Replies(engine, [request], time.monotonic() + 3600)
        try:
            async for _ in replies:
                pass
        finally:
            replies.cancel()

    await asyncio.gather(*(client(request) for request in asked))


def round_of(engine: TimedEngine, asked: list[Request]) -> dict[str, float]:
    """Milliseconds of a decode step, by what they went into."""
    engine.turns.clear()
    engine.bare.clear()
    asyncio.run(answered(engine, asked))
    sides = [by_size(engine.turns), by_size(engine.bare)]
    counts = {size: len(sides[0][size]) for size in sides[0].keys() & sides[1].keys()}
    if not counts:
        raise UserError("too few turns had all slots in use; ask for more --tokens")
    whole, bare = (
        sum(count * statistics.median(side[size]) for size, count in counts.items()) / sum(counts.values())
        for side in sides
    )
    parts = {
        name: statistics.fmean(getattr(turn, name) / turn.steps for turn in engine.turns)
        for name in ("waiting", "calls", "worked")
    }
    seconds = {"whole": whole, "bare": bare, "held_up": whole - bare, **parts, "rest": parts["worked"] - parts["calls"]}
    return {name: 1000 * value for name, value in seconds.items()} | {"turns": len(engine.turns)}


def by_size(turns: list[Turn]) -> dict[Size, list[float]]:
    """Seconds of a step in each turn: a larger cache takes longer to read."""
    found: dict[Size, list[float]] = {}
    for turn in turns:
        found.setdefault(turn.size, []).append(turn.whole / turn.steps)
    return found


def show(rounds: list[dict[str, float]], options: argparse.Namespace, about: dict, console: Console) -> None:
    table = Table(title=f"A decode step of {options.slots} replies, {options.checkpoint}")
    for heading in ("", "ms", "spread", "clock"):
        table.add_column(heading, justify="left" if heading in ("", "clock") else "right")

    def add(name: str, key: str, clock: str) -> None:
        values = [found[key] for found in rounds]
        table.add_row(name, f"{statistics.median(values):.3f}", f"{min(values):.3f} to {max(values):.3f}", clock)

    add("in the engine", "whole", "wall")
    add("in a bare loop", "bare", "wall")
    add("by which the engine holds it up", "held_up", "wall")
    table.add_section()
    add("waiting for the device", "waiting", "wall")
    add("calls of compiled programs", "calls", "processor")
    add("requests, reading, text, listeners", "rest", "processor")
    table.add_section()
    add("the host's share: the two together", "worked", "processor")
    console.print(table)
    turns = sum(found["turns"] for found in rounds)
    console.print(
        f"goal: less than {GOAL_MS:.0f} ms at 32 slots; "
        f"{turns} turns in {len(rounds)} rounds\n"
        f"{about['jax_device']}; " + described(about)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="tiny")
    add("--slots", type=int, default=32)
    add("--tokens", type=int, default=256, help="of each reply (256)")
    add("--batches", type=int, help="live batches side by side (what the engine thinks best)")
    add("--rounds", type=int, default=5, help="of as many replies as there are slots (5)")
    add("--output", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    console = Console(width=120)
    try:
        vlm = qv.load(options.checkpoint)
        if options.batches:
            engines.side_by_side = lambda generator, slots: options.batches
        engine = TimedEngine(vlm, EngineOptions(options.slots, options.tokens + 128))
        engine.warm_up()
        engine.start()
        asyncio.run(answered(engine, requests(vlm, options, 0)))  # connections between threads, caches of the processor
        rounds = [round_of(engine, requests(vlm, options, number + 1)) for number in range(options.rounds)]
        engine.stop()
    except UserError as error:
        sys.exit(f"benchmarks/host_share.py: {error}")
    about = machine(("jax", "jaxlib", "flax", "numpy"))
    show(rounds, options, about, console)
    if options.output is not None:
        found = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": about,
            "options": {name: value for name, value in vars(options).items() if name != "output"},
            "rounds": rounds,
        }
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
