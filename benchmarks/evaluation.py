"""Speed of an evaluation beside asking one by one: the same questions about scenes, in turns, in one process.

One side is `vlm.chat` for each question. The other is the runner of `eval/scenes.py`, which asks batches and keeps
every prediction in a file. Both begin with pictures as files in memory and end with texts; what a side compiles is
compiled before. Beside seconds stand core seconds, the time that processors worked: they depend less on what else runs.
"""

import dataclasses
import datetime
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro
from common import described, machine
from rich.console import Console
from rich.table import Table

import qwenvl_jax as qv
from qwenvl_jax.evaluation import runner
from qwenvl_jax.evaluation.local_model import LocalModel, messages
from qwenvl_jax.evaluation.predictions import Part, Pictures
from qwenvl_jax.evaluation.task import Reading, Sample
from qwenvl_jax.evaluation.tasks.registry import TASKS

ONE_BY_ONE, RUNNER = "one by one", "runner"
TASK = TASKS["scenes"]
GOAL = 4.0  # times as many samples a second


@dataclasses.dataclass(frozen=True)
class Options:
    """Who is asked how much."""

    checkpoint: str = "tiny"
    samples: int = 480
    batch_size: int = 32
    rounds: int = 5
    output: Path | None = None  # a JSON file for the numbers


@dataclasses.dataclass(frozen=True)
class Timed:
    """Of one side in one round, per sample."""

    side: str
    seconds: float
    core_seconds: float


def one_by_one(vlm: qv.VLM, samples: Sequence[Sample]) -> dict[str, str]:
    most = TASK.decoding.max_new_tokens
    return {s.id: vlm.chat(messages(s), temperature=0.0, max_new_tokens=most).text for s in samples}


def by_runner(vlm: qv.VLM, samples: Sequence[Sample], rows: int) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scenes.jsonl"
        with Part(path, {}) as part, LocalModel(vlm, True, TASK.decoding, rows) as model:
            runner.predict(samples, model, part, Pictures(path))
        lines = (path.parent / "scenes.jsonl.part").read_text(encoding="utf-8").splitlines()[1:]
    return {found["id"]: found["reply"] for found in map(json.loads, lines)}


def measure(sides: dict[str, Callable[[], object]], count: int, rounds: int, console: Console) -> list[Timed]:
    """The sides in turns."""
    found = []
    for _ in range(rounds):
        for side, ask in sides.items():
            start, worked = time.perf_counter(), time.process_time()
            ask()
            taken, core = time.perf_counter() - start, time.process_time() - worked
            found.append(Timed(side, taken / count, core / count))
            console.print(f"{side}: {1000 * taken / count:.1f} ms a sample, {1000 * core / count:.1f} ms of a core")
    return found


def ratios(found: Sequence[Timed], field: str) -> list[float]:
    """How many times as long the one-by-one side took, in each round."""
    alone, together = ([getattr(one, field) for one in found if one.side == side] for side in (ONE_BY_ONE, RUNNER))
    return [a / b for a, b in zip(alone, together, strict=True)]


def spread(values: Sequence[float], form: str) -> list[str]:
    return [f"{statistics.median(values):{form}}", f"{min(values):{form}} to {max(values):{form}}"]


def show(found: Sequence[Timed], console: Console) -> None:
    table = Table()
    for column in ("", "samples a second", "spread", "core ms a sample", "spread"):
        table.add_column(column, justify="right" if column else "left")
    for side in (ONE_BY_ONE, RUNNER):
        timed = [one for one in found if one.side == side]
        speeds, cores = [1 / one.seconds for one in timed], [1000 * one.core_seconds for one in timed]
        table.add_row(side, *spread(speeds, ".1f"), *spread(cores, ".1f"))
    table.add_row("ratio", *spread(ratios(found, "seconds"), ".2f"), *spread(ratios(found, "core_seconds"), ".2f"))
    console.print(table)
    reached = statistics.median(ratios(found, "seconds"))
    console.print(f"{reached:.1f} times as many samples a second; the goal is {GOAL:g}")


def main(options: Options) -> None:
    console = Console(highlight=False)
    vlm = qv.load(options.checkpoint)
    samples = list(itertools.islice(TASK.read(Path(), Reading("chat")), options.samples))
    sides: dict[str, Callable[[], dict[str, str]]] = {
        ONE_BY_ONE: lambda: one_by_one(vlm, samples),
        RUNNER: lambda: by_runner(vlm, samples, options.batch_size),
    }
    replies = [ask() for ask in sides.values()]  # compiles everything
    different = sum(replies[0][name] != replies[1][name] for name in replies[0])
    where = machine(("jax", "flax", "numpy"))
    console.print(f"{described(where)}\n{len(samples)} samples, {different} with another reply in a batch")
    found = measure(sides, len(samples), options.rounds, console)
    show(found, console)
    if options.output is not None:
        numbers = {
            "date": datetime.date.today().isoformat(),
            "machine": where,
            "options": {"samples": len(samples), "batch_size": options.batch_size, "rounds": options.rounds},
            "different": different,
            "rounds": [dataclasses.asdict(one) for one in found],
            "ratio": ratios(found, "seconds"),
        }
        options.output.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except qv.UserError as error:
        print(f"evaluation: {error}", file=sys.stderr)
        sys.exit(2)
