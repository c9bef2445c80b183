"""What a run shows and keeps: a progress line, log.jsonl, TensorBoard events and the curve as a picture."""

import json
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from qwenvl_jax.training.step import Parameters


class RunLog:
    """Logs of one run in its folder; a context manager, because the progress line and the files want closing.

    params: all parameters by path, of which those in `trained` move. The first host shows and writes what counts; the
    others keep their own logs, for their waits, in the subfolder `hosts`.
    """

    def __init__(self, output: Path, steps: int, first: int, params: Parameters, trained: set[str]):
        host = jax.process_index()
        self.output = output = output / "hosts" / str(host) if host else output
        output.mkdir(parents=True, exist_ok=True)
        self.console = Console(highlight=False, quiet=host != 0)
        done = f" ({first} done)" if first else ""
        total, moving = (sum(p.size for path, p in params.items() if path in which) for which in (params, trained))
        share = "" if moving == total else f", {moving:,} of them trained"
        self.console.print(f"{total:,} parameters{share}, {steps} steps{done}, into {output}")
        _forget_after(output / "log.jsonl", first)
        self.file = (output / "log.jsonl").open("a", encoding="utf-8")
        self.writer = SummaryWriter(str(output / "tensorboard"))
        self.progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
        )
        self.task = self.progress.add_task("compiling", total=steps, completed=first)
        self.since = time.perf_counter()

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self.progress.stop()
        self.writer.close()
        self.file.close()
        draw_curve(self.output)

    def steps(self, number: int, values: dict[str, float], count: int) -> None:
        """Logs means over the `count` steps up to `number`."""
        now = time.perf_counter()
        values = values | {"seconds_per_step": (now - self.since) / count}
        self.since = now
        rate = values["target_tokens"] / values["seconds_per_step"]
        self._write("train", number, values | {"target_tokens_per_second": rate})
        text = f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}"
        text += f"  {values['seconds_per_step']:.2f} s/step  {rate:.0f} target tokens/s"
        self.progress.update(self.task, completed=number, description=text)
        if not self.console.is_terminal:
            self.console.print(f"step {number}: {text}")

    def evaluation(self, number: int, values: dict[str, float]) -> None:
        """Logs an evaluation and prints it."""
        self._write("evaluation", number, values)
        shares = "  ".join(f"{name[6:]} {value:.2f}" for name, value in values.items() if name.startswith("right/"))
        self.console.print(f"step {number}: validation loss {values['loss']:.4f}  {shares}", soft_wrap=True)
        draw_curve(self.output)
        self.since = time.perf_counter()

    def _write(self, kind: str, number: int, values: dict[str, float]) -> None:
        row = {"kind": kind, "step": number} | {name: round(float(value), 6) for name, value in values.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.writer.add_scalar(f"{kind}/{name}", value, number)


def _forget_after(path: Path, step: int) -> None:
    """Drops the rows of steps that a run logged but will do again, having been killed before it saved them."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def draw_curve(output: Path) -> None:
    """Draws `curve.png` from `log.jsonl`: losses, and answers right by kind on the validation scenes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    evaluated = [row for row in rows if row["kind"] == "evaluation"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, label in (("loss", "training loss"), ("auxiliary_loss", "auxiliary loss")):
        points = [(row["step"], row[name]) for row in trained if name in row]
        if points:
            left.plot(*zip(*points, strict=True), label=label)
    if evaluated:
        left.plot([row["step"] for row in evaluated], [row["loss"] for row in evaluated], "o-", label="validation loss")
        right.set_prop_cycle(color=[pyplot.get_cmap("tab20")(i) for i in range(20)])
        for name in evaluated[-1]:
            if name.startswith("right/"):
                points = [(row["step"], row[name]) for row in evaluated if name in row]
                right.plot(*zip(*points, strict=True), label=name.removeprefix("right/"))
        if right.lines:  # records have no kinds of answers
            right.legend(ncols=2, fontsize="small")
    left.set(xlabel="step", ylabel="loss per token", yscale="log")
    right.set(xlabel="step", ylabel="answers right", ylim=(0, 1.02))
    if trained:
        left.legend()
    figure.savefig(output / "curve.png", dpi=110)
    pyplot.close(figure)
