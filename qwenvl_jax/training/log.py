"""What a run shows and keeps: a progress line, log.jsonl, TensorBoard events, the curve as a picture and a report.

`log.jsonl` is the run's memory: a row for each start and end of the program, of training steps and of evaluations.
Curve and report are made of it, and so can be made again when the program is gone.
"""

import datetime
import json
import math
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from qwenvl_jax.training.curve import draw_curve
from qwenvl_jax.training.history import read_rows
from qwenvl_jax.training.report import write_report
from qwenvl_jax.training.step import Parameters

SHOWN = 200  # records that are left out or cut, in the report


class RunLog:
    """Logs of one run in its folder; a context manager, because the progress line and the files want closing.

    params: all parameters by path, of which those in `trained` move; left_out: records that are not learnt whole. The
    first host shows and writes what counts; the others keep their own logs, for their waits, in the subfolder `hosts`.
    """

    def __init__(
        self, output: Path, steps: int, first: int, params: Parameters, trained: set[str], left_out: list[str]
    ):
        self.host = jax.process_index()
        self.output = output = output / "hosts" / str(self.host) if self.host else output
        output.mkdir(parents=True, exist_ok=True)
        self.console = Console(highlight=False, quiet=self.host != 0)
        done = f" ({first} done)" if first else ""
        total, moving = (sum(p.size for path, p in params.items() if path in which) for which in (params, trained))
        share = "" if moving == total else f", {moving:,} of them trained"
        self.console.print(f"{total:,} parameters{share}, {steps} steps{done}, into {output}")
        self.steps_in_all, self.last = steps, first
        _forget_after(output / "log.jsonl", first)
        self.file = (output / "log.jsonl").open("a", encoding="utf-8")
        (output / "tensorboard").mkdir(exist_ok=True)
        # Not a SummaryWriter: its thread would die of a full disk with a traceback, and the run wait for it for ever.
        self.events = EventsWriter(str(output / "tensorboard" / "events"))
        self.progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
        )
        self.task = self.progress.add_task("compiling", total=steps, completed=first)
        size = {"parameters": int(total), "trained": int(moving)}
        left = {"left_out": left_out[:SHOWN], "left_out_in_all": len(left_out)}
        self._row("start", first, surroundings() | size | left | {"steps": steps})

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        self.progress.stop()
        how, message = _ending(error, self.last == self.steps_in_all)
        try:
            self._row("end", self.last, {"how": how, "message": message})
            self.events.close()
            self.file.close()
        except OSError:
            if error is None:  # else the user should hear of that one
                raise
        self._draw()

    def steps(self, number: int, values: dict[str, float]) -> None:
        """Logs a row of `Meter` with the learning rate, at step `number`."""
        self.last = number
        left = (self.steps_in_all - number) * values["seconds_per_step"]
        self._write("train", number, values | {"seconds_left": left})
        text = f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  {values['seconds_per_step']:.2f} s/step"
        text += f"  {values['tokens_per_second']:,.0f} tokens/s  {values['pictures_per_second']:,.1f} pictures/s"
        if "mfu" in values:
            text += f"  MFU {values['mfu']:.1%}"
        self.progress.update(self.task, completed=number, description=text)
        if not self.console.is_terminal:
            self.console.print(f"step {number}: {text}  {datetime.timedelta(seconds=round(left))} left", soft_wrap=True)

    def evaluation(self, number: int, values: dict[str, float], scores: dict[str, float] | None = None) -> None:
        """Logs an evaluation, prints it, and draws curve and report anew. scores: of tasks, "TASK/SCORE"."""
        scores = scores or {}
        values = values | scores
        if values:
            self._write("evaluation", number, values)
            told = [f"validation loss {values['loss']:.4f}"] if "loss" in values else []
            told += [f"{name[6:]} {value:.2f}" for name, value in values.items() if name.startswith("right/")]
            told += [f"{name} {values[name]:.2f}" for name in scores]
            self.console.print(f"step {number}: {'  '.join(told)}", soft_wrap=True)
        self._draw()

    def _draw(self) -> None:
        """Curve and report; the run goes on, or ends as it does, where they cannot be written."""
        if self.host:
            return
        try:
            draw_curve(self.output)
            write_report(self.output)
        except Exception as error:  # a full disk must not take the run with it
            self.console.print(f"curve and report could not be written: {error!r}")

    def _write(self, kind: str, number: int, values: dict[str, float]) -> None:
        self._row(kind, number, {name: _short(value) for name, value in values.items()})
        for name, value in values.items():
            event = Event(wall_time=time.time(), step=number, summary=scalar(f"{kind}/{name}", value))
            self.events.write_event(event)
        self.events.flush()

    def _row(self, kind: str, number: int, values: dict[str, Any]) -> None:
        row = {"kind": kind, "step": number, "time": round(time.time(), 3)} | values
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()


def surroundings() -> dict[str, Any]:
    """What a run is made with: versions by name, and the devices."""
    packages = ("qwenvl-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = {"python": platform.python_version()} | {name: _version(name) for name in packages}
    devices = jax.devices()
    return {
        "versions": versions,
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "hosts": jax.process_count(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _ending(error: BaseException | None, complete: bool) -> tuple[str, str]:
    """How the program ends, in a word for the report, and what there is to say about it."""
    if error is None:
        return ("finished", "") if complete else ("stopped", "told to stop by SIGTERM, and saved")
    if isinstance(error, FloatingPointError):
        return "not a number", str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "by the keyboard"
    return "crashed", f"{type(error).__name__}: {error}"


def _short(value: float) -> float | int | None:
    """Six digits are enough, and JSON has no word for what is no number."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _forget_after(path: Path, step: int) -> None:
    """Drops the rows of steps that a run logged but will do again, having been killed before it saved them."""
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= step or row["kind"] in ("start", "end")]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        partial.replace(path)
