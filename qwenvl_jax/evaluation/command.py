"""The command of every script in `eval/`: ask a model a dataset, keep its predictions, score them, show the scores.

    python eval/FAMILY.py --dataset NAME [--checkpoint DIR | --api-base URL] [--data DIR] [--limit N]
    python eval/FAMILY.py --predictions FILE [--judge-base URL]

Predictions come first, in OUTPUT/NAME.jsonl; a run that was ended goes on where it was. Scores are made of that file
alone, and are beside it: NAME.scores.json, and NAME.html to look at.
"""

import argparse
import contextlib
import dataclasses
import itertools
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation import runner, scenes
from qwenvl_jax.evaluation.baseline import best_fixed_reply
from qwenvl_jax.evaluation.fingerprint import folder_fingerprint
from qwenvl_jax.evaluation.html_parts import Run
from qwenvl_jax.evaluation.html_report import write_report
from qwenvl_jax.evaluation.judge import judge, judging_of, lacks_judgements
from qwenvl_jax.evaluation.judgings import JUDGINGS
from qwenvl_jax.evaluation.metrics import registry as metrics
from qwenvl_jax.evaluation.metrics.scenes import scene_record
from qwenvl_jax.evaluation.predictions import Part, Pictures, Shard, read_predictions
from qwenvl_jax.evaluation.runner import Counts, Lost, Model
from qwenvl_jax.evaluation.scores import score, to_json
from qwenvl_jax.evaluation.tables import groups_table, scores_table
from qwenvl_jax.evaluation.task import Decoding, Reading, Sample, Style, Task
from qwenvl_jax.evaluation.tasks import registry as tasks

if TYPE_CHECKING:
    from jax.sharding import Mesh

PACKAGES = ("qwenvl-jax", "jax", "flax", "numpy", "pillow")
MOST_IDS = 10  # of judgements that failed, which are all in the file
MOST_LABELS = 16  # of a grouping that is shown in the terminal; the page has all


def main(family: str, arguments: Sequence[str] | None = None) -> int:
    """0 when all is well, 1 where the model was lost, 2 after a mistake of the user, 130 when interrupted."""
    options = parser(family).parse_args(arguments)
    console = rich.console.Console(highlight=False)
    try:
        path = options.predictions
        if options.judge_base is None and (options.judge_model or options.judge_key):
            raise UserError("--judge-base says which server the judge is at")
        if path is None:
            if options.dataset is None:
                raise UserError(f"--dataset says what to ask; see python eval/{family}.py --help")
            path = predict(tasks.task(options.dataset, family), options, console)
        if path is not None and options.judge_base is not None:
            path = judged(path, options, console)
        if path is not None:
            report(path, options, console)
        return 0
    except UserError as error:
        print(f"{family}: {error}", file=sys.stderr)
        return 2
    except Lost as error:
        print(f"{family}: {error}. What was answered is kept: the same command goes on from there", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{family}: interrupted. What was answered is kept: the same command goes on from there", file=sys.stderr)
        return 130


def parser(family: str) -> argparse.ArgumentParser:
    names = [task.name for task in tasks.TASKS.values() if task.family == family]
    found = argparse.ArgumentParser(description=f"Evaluate a model: {', '.join(names)}. See docs/evaluation.md.")
    what = found.add_argument_group("what is asked")
    what.add_argument("--dataset", default=names[0] if len(names) == 1 else None, help=f"one of {', '.join(names)}")
    what.add_argument("--data", type=Path, default=Path("data"), help="folder of the datasets (default: data)")
    what.add_argument("--limit", type=_positive, help="only so many samples, the first")
    what.add_argument("--style", choices=("qwenvl", "chat"), help="whose prompts: the original's raw ones, or chat's")
    what.add_argument("--generate", action="store_true", help="have choices written, not ranked by likelihood")
    what.add_argument("--few-shot", type=int, default=0, help="worked examples before each question")
    what.add_argument("--seed", type=int, default=0, help="of the examples, and of draws in metrics and intervals")
    what.add_argument("--max-new-tokens", type=_positive, help="of a reply (default: the task's)")
    what.add_argument("--blind", action="store_true", help="show grey noise instead of each picture")
    who = found.add_argument_group("who is asked")
    who.add_argument("--checkpoint", default="tiny", help="folder, hub name, or the model that ships (default)")
    who.add_argument("--adapter", type=Path, help="folder of a LoRA adapter of that checkpoint, in PEFT's format")
    who.add_argument("--quantize", choices=("int8", "int4", "nf4"), help="load the weights in 8 or 4 bits")
    who.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    who.add_argument("--tensor", type=_positive, default=1, help="devices over which the model is split")
    who.add_argument("--batch-size", type=_positive, default=32, help="samples answered at once")
    who.add_argument("--api-base", help="an OpenAI server instead, as http://127.0.0.1:8000/v1")
    who.add_argument("--api-key", help="of that server (default: the variable OPENAI_API_KEY)")
    who.add_argument("--model", help="which of that server's (default: its first)")
    if any(tasks.TASKS[name].metric in JUDGINGS for name in names):
        judge = found.add_argument_group("who judges the replies, where not only rules do")
        judge.add_argument("--judge-base", help="an OpenAI server, as http://127.0.0.1:8000/v1")
        judge.add_argument("--judge-key", help="of that server (default: the variable OPENAI_API_KEY)")
        judge.add_argument("--judge-model", help="which of that server's (default: its first)")
    else:
        found.set_defaults(judge_base=None, judge_key=None, judge_model=None)
    where = found.add_argument_group("where it goes")
    where.add_argument("--output", type=Path, default=Path("predictions"), help="folder (default: predictions)")
    where.add_argument("--overwrite", action="store_true", help="begin anew where there are predictions")
    where.add_argument("--shard", type=Shard.of, default=Shard(), help="a share of the samples, as 0/4, 1/4, ...")
    where.add_argument("--predictions", type=Path, help="score this file; no model is loaded")
    where.add_argument("--metric", default="official", help="whose rules: official (default), qwenvl, vlmevalkit, ...")
    return found


def predict(task: Task, options: argparse.Namespace, console: rich.console.Console) -> Path | None:
    """The file of all predictions, made or found; None while other shards are not done."""
    if options.judge_base is not None:
        judging_of(task.name, task.metric)
    if task.metric:
        metrics.metric(task.metric, options.metric)  # a mistake is better found now than after the run
    style: Style = options.style or ("chat" if options.api_base or task.chats else "qwenvl")
    reading = Reading(style, options.generate, options.few_shot, options.seed)
    decoding = (task.chat_decoding if style == "chat" else None) or task.decoding
    if options.max_new_tokens is not None:
        most = options.max_new_tokens
        decoding = dataclasses.replace(decoding, max_new_tokens=most, min_new_tokens=min(decoding.min_new_tokens, most))
    samples = list(itertools.islice(task.read(options.data, reading), options.limit))
    if not samples:
        raise UserError(f"{task.name}: there are no samples in {options.data}")
    if options.blind:
        samples = [runner.blind(sample) for sample in samples]
    path = options.output / f"{task.name}.jsonl"
    asked = _Asked(options, task, style, decoding)
    manifest = manifest_of(task, options, reading, decoding, len(samples)) | asked.described()
    part = Part(path, manifest, options.shard, options.overwrite)
    share = [samples[place] for place in options.shard.share(len(samples))]
    if not part.complete:
        with part, asked.model() as model:
            counts = ask(share, model, part, Pictures(path), console)
        if counts.failed:
            console.print(
                f"{counts.failed} of {counts.asked} samples could not be asked; the page lists them", style="red"
            )
    whole = part.finish([sample.id for sample in share])
    if not whole:
        console.print(f"shard {options.shard.index} of {options.shard.count} is done; the last one scores all")
    return path if whole else None


class _Asked:
    """Who is asked: a server, or a checkpoint, which is loaded only where there is something to ask."""

    def __init__(self, options: argparse.Namespace, task: Task, style: Style, decoding: Decoding):
        self._options, self._task, self._style, self._decoding = options, task, style, decoding
        self._served = None
        if options.api_base:
            if style != "chat":
                raise UserError("--style qwenvl has raw prompts, which a server of chats does not take")
            from qwenvl_jax.evaluation.served_model import ServedModel

            self._served = ServedModel(
                options.api_base, decoding, options.model, options.api_key, at_once=options.batch_size
            )

    def described(self) -> dict[str, Any]:
        """For the manifest: what replies depend on."""
        options = self._options
        if self._served is not None:
            return {"server_model": self._served.name}
        from qwenvl_jax.checkpoints.folder import locate, read_config

        folder = locate(options.checkpoint)
        adapter = None if options.adapter is None else folder_fingerprint(options.adapter)
        return {
            "checkpoint": Path(options.checkpoint).name,
            "fingerprint": folder_fingerprint(folder),
            "adapter": adapter,
            "quantize": options.quantize,
            "dtype": options.dtype,
            "pixels": [read_config(folder).visual.image_size] * 2,
        }

    @contextlib.contextmanager
    def model(self) -> Iterator[Model]:
        """Ready to be asked."""
        if self._served is not None:
            with self._served:
                yield self._served
            return
        import qwenvl_jax  # scoring alone needs no model
        from qwenvl_jax.evaluation.local_model import LocalModel

        options = self._options
        vlm = qwenvl_jax.load(
            options.checkpoint,
            adapter=options.adapter,
            quantize=options.quantize,
            dtype=options.dtype,
            mesh=_mesh(options.tensor),
        )
        chats = self._style == "chat" or (self._task.chats and vlm.is_chat)
        with LocalModel(vlm, chats, self._decoding, options.batch_size) as local:
            yield local


def _mesh(tensor: int) -> "Mesh | None":
    if tensor == 1:
        return None
    import jax

    from qwenvl_jax.sharding import make_mesh

    devices = jax.devices()
    if tensor > len(devices):
        raise UserError(f"--tensor {tensor}: there are {len(devices)} devices")
    return make_mesh("fsdp_tensor", devices[:tensor], tensor=tensor)


def manifest_of(
    task: Task, options: argparse.Namespace, reading: Reading, decoding: Decoding, samples: int
) -> dict[str, Any]:
    """What a file of predictions says of itself, but for who was asked."""
    return {
        "task": task.name,
        "metric": task.metric,
        "samples": samples,
        "style": reading.style,
        "generate": reading.generate,
        "few_shot": reading.few_shot,
        "seed": reading.seed,
        "blind": options.blind,
        "decoding": dataclasses.asdict(decoding),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def ask(
    samples: Sequence[Sample], model: Model, part: Part, pictures: Pictures, console: rich.console.Console
) -> Counts:
    """`runner.predict`, with its progress on the screen."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        asking = progress.add_task("samples", total=len(samples), completed=len(part.done), speed="")

        def say(counts: Counts) -> None:
            seconds = progress.tasks[asking].elapsed or 0.0
            speed = f"{counts.asked / seconds:.1f}/s" if seconds and counts.asked else ""
            failed = f", {counts.failed} failed" if counts.failed else ""
            progress.update(asking, completed=counts.done, speed=speed + failed)

        return runner.predict(samples, model, part, pictures, say)


def judged(path: Path, options: argparse.Namespace, console: rich.console.Console) -> Path:
    """The file of the same predictions with what a judge says of them, made or found."""
    from qwenvl_jax.evaluation.served_model import ServedModel

    manifest, _ = read_predictions(path)
    decoding = judging_of(str(manifest.get("task", path.stem)), manifest.get("metric")).decoding
    with ServedModel(
        options.judge_base, decoding, options.judge_model, options.judge_key, options.batch_size
    ) as judge_model:
        found = judge(
            path,
            judge_model.name,
            options.overwrite,
            lambda samples, part: ask(samples, judge_model, part, Pictures(part.path), console),
        )
    for ids, what in ((found.failed, "could not be asked"), (found.unread, "gave a reply that cannot be read")):
        if ids:
            shown = ", ".join(ids[:MOST_IDS]) + (", ..." if len(ids) > MOST_IDS else "")
            told = f"judge: {len(ids)} of {found.asked} requests {what}, see {found.raw}: {shown}"
            console.print(told, style="red", soft_wrap=True)
    return found.path


def report(path: Path, options: argparse.Namespace, console: rich.console.Console) -> None:
    """Scores a file of predictions and shows them, in the terminal and as a page."""
    manifest, predictions = read_predictions(path)
    task, name = str(manifest.get("task", path.stem)), manifest.get("metric")
    if not name:
        console.print(f"{path}: the answers of {task} are kept by a server; docs/evaluation.md has how to submit")
        return
    if lacks_judgements(str(name), predictions):
        command = f"python eval/{tasks.task(task).family}.py --predictions {path} --judge-base URL --judge-model NAME"
        console.print(f"{path}: a judge scores the answers of {task}, which are kept: {command}", soft_wrap=True)
        return
    metric = metrics.metric(str(name), options.metric)
    scores = score(predictions, metric, seed=options.seed)
    # Of a reply that no judge has read nothing is known, so there is nothing to guess with.
    guess = None if "judge" in manifest else best_fixed_reply(predictions, metric)
    console.print(scores_table(scores, task, guess))
    for grouping, labels in scores.groups.items():
        if 1 < len(labels) <= MOST_LABELS:
            console.print(groups_table(scores, grouping))
    if metric.name == "scenes":
        console.print(scenes.table(scenes.report([scene_record(prediction) for prediction in predictions])))
    if scores.note:
        console.print(scores.note)
    kept = path.with_suffix(".scores.json")
    kept.write_text(to_json(scores) + "\n", encoding="utf-8")
    page = write_report(path.with_suffix(".html"), Run(path.name, manifest, predictions, scores, path.parent), guess)
    console.print(f"{path}, {kept.name}, {page.name}", soft_wrap=True)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number
