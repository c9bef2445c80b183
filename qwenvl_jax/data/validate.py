"""`python -m qwenvl_jax.data.validate FILE`: checks training records before a run does, and names every bad one.

`problems` is the same check for one record, for training that leaves bad records out; `fit` is how training cuts a
record that is too long.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from qwenvl_jax.checkpoints.folder import locate, read_config
from qwenvl_jax.config import UserError
from qwenvl_jax.data.problems import Problem, RecordError, split_advice
from qwenvl_jax.data.records import Record, Records, open_records
from qwenvl_jax.processing.boxes import notation_problems
from qwenvl_jax.processing.processor import Processor
from qwenvl_jax.processing.template import IGNORED, Prompt

PROGRAM = "python -m qwenvl_jax.data.validate"
_PLACE = re.compile(r"messages\[(\d+)\]\.content")  # how the processor names a message


@dataclasses.dataclass(frozen=True)
class Examination:
    """What is known of a record. tokens: its whole length; cut: whether its end was cut off to fit; pair: whether it
    has a rejected answer.

    needed: the tokens up to the end of the last picture and to the first token of an answer, whichever is later; cut
    shorter, a record has a picture cut or teaches nothing. trained: at most so many tokens are learnt, by either mask.
    """

    problems: list[Problem]
    tokens: int = 0
    pictures: int = 0
    needed: int = 0
    trained: int = 0
    cut: bool = False
    pair: bool = False


def problems(record: Record, processor: Processor, max_length: int | None = None) -> list[Problem]:
    """Why `record` is not to be trained on at `max_length` tokens (None: of any length); empty for a good one.

    Loads its pictures. Records that cannot be read raise RecordError when they are taken from their source.
    """
    return examine(record, processor, max_length).problems


def examine(record: Record, processor: Processor, max_length: int | None = None) -> Examination:
    """The check behind `problems`, with what else it sees."""
    found = list(_text_problems(record))
    try:
        prompt, labels = processor.training(record.messages, answers_only=True)
    except UserError as error:
        return Examination(found + (_picture_problems(record, processor) or [_placed_problem(record, error)]))
    except RecursionError:
        return Examination([*found, Problem(record.where, "", "nested too deeply", "mend or remove the record")])
    tokens, pictures = len(prompt.input_ids), len(prompt.pixels)
    needed = max(_pictures_end(prompt), int(np.flatnonzero(labels != IGNORED)[0]) + 1)
    # Of each block the mask of the original learns `<|im_start|>`, `<|im_end|>` and the line break, too.
    blocks = int(np.sum(prompt.input_ids == processor.tokenizer.im_start_id))
    trained = int(np.sum(labels != IGNORED)) + 3 * blocks
    pair = record.rejected is not None
    if found or max_length is None:
        return Examination(found, tokens, pictures, needed, trained, pair=pair)
    answers = [("", prompt, labels)]
    if record.rejected is not None:
        messages = [*record.messages[:-1], {"role": "assistant", "content": record.rejected}]
        answers.append(("rejected", *processor.training(messages, answers_only=True)))
    for field, whole, targets in answers:
        found += _length_problems(record, field, whole, targets, max_length)
    return Examination(found, tokens, pictures, needed, trained, tokens > max_length, pair)


def fit(prompt: Prompt, labels: np.ndarray, max_length: int) -> tuple[Prompt, np.ndarray]:
    """A training example of `Processor.training` cut to `max_length` tokens, in text after the last picture only.

    labels: int32 [T]. Raises UserError where a picture would have to be cut.
    """
    total = len(prompt.input_ids)
    if total <= max_length:
        return prompt, labels
    end = _pictures_end(prompt)
    if end > max_length:
        raise UserError(f"{total} tokens, of which the last picture ends at {end}, behind the {max_length} allowed")
    ids, slots = prompt.input_ids[:max_length], prompt.image_slots[:max_length]
    return dataclasses.replace(prompt, input_ids=ids, image_slots=slots), labels[:max_length]


def _pictures_end(prompt: Prompt) -> int:
    """How many tokens the prompt has up to the end of its last picture."""
    slots = np.flatnonzero(prompt.image_slots >= 0)
    return int(slots[-1]) + 2 if len(slots) else 0  # behind `</img>`


def _length_problems(
    record: Record, field: str, prompt: Prompt, labels: np.ndarray, max_length: int
) -> Iterator[Problem]:
    """`labels` are those of answers alone."""
    advice = "allow more tokens (--max-length), or shorten the record"
    try:
        _, kept = fit(prompt, labels, max_length)
    except UserError as error:
        yield Problem(record.where, field, str(error), advice)
        return
    if not (kept != IGNORED).any():
        wrong = f"{len(labels)} tokens, and nothing of an answer is among the first {max_length}"
        yield Problem(record.where, field, wrong, advice)


def _text_problems(record: Record) -> Iterator[Problem]:
    """Empty answers, and boxes and tags in answers that say nothing."""
    answers = list(_answers(record))
    if record.rejected is not None:
        answers.append(("rejected", [record.rejected]))
        if record.rejected == "".join(answers[-2][1]):
            yield Problem(record.where, "rejected", "the same as the answer", "give an answer that is worse")
    for field, texts in answers:
        if not "".join(texts).strip():
            yield Problem(record.where, field, "the answer is empty", "write one, or remove the record")
        for text in texts:
            for wrong in notation_problems(text):
                yield Problem(record.where, field, *split_advice(wrong))


def _answers(record: Record) -> Iterator[tuple[str, list[str]]]:
    """Field and texts of the assistant's messages; a box part counts as text, since it is something to learn."""
    for number, message in enumerate(record.messages):
        content = message.get("content")
        if message.get("role") == "assistant" and isinstance(content, str):
            yield _field(record, number), [content]
        elif message.get("role") == "assistant" and isinstance(content, list):
            texts = [part.get("text", "(a box)") for part in content if isinstance(part, Mapping)]
            yield _field(record, number), [text for text in texts if isinstance(text, str)]


def _picture_problems(record: Record, processor: Processor) -> list[Problem]:
    """All pictures that cannot be loaded."""
    found = []
    for number, message in enumerate(record.messages):
        content = message.get("content")
        for position, part in enumerate(content if isinstance(content, list) else []):
            if isinstance(part, Mapping) and part.get("type") == "image" and "image" in part:
                try:
                    processor.load(part["image"])
                except UserError as error:
                    field = _field(record, number) + (f"[{position}]" if number >= len(record.fields) else "")
                    found.append(Problem(record.where, field, _cause(str(error)), _picture_advice(part["image"])))
    return found


def _picture_advice(source: Any) -> str:
    if isinstance(source, str) and "://" in source:
        return "fetch the picture once and give its path"
    if isinstance(source, str) and not source.startswith("data:") and not _exists(source):
        return "mend the path; relative ones start at the record's folder, or at --image-root"
    return "replace the picture, or remove the record"


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long a name, a NUL
        return False


def _cause(message: str) -> str:
    """The first part of a message of `load_image`; its advice is for those who call it."""
    return message.split("; ")[0]


def _placed_problem(record: Record, error: UserError) -> Problem:
    """An error of the processor's, in terms of the file."""
    message = str(error)
    place = _PLACE.match(message)
    if not place:
        return Problem(record.where, "", *split_advice(message))
    rest = re.match(r"[\w.\[\]]*", message[place.end() :])
    inside = rest[0] if rest else ""
    field = _field(record, int(place[1])) + inside
    return Problem(record.where, field, *split_advice(message[place.end() + len(inside) :].lstrip(": ")))


def _field(record: Record, number: int) -> str:
    return record.fields[number] if number < len(record.fields) else f"messages[{number}].content"


@dataclasses.dataclass
class Summary:
    """Counts over the records of a file."""

    records: int = 0
    bad: int = 0
    cut: int = 0
    pictures: int = 0
    tokens: int = 0
    longest: int = 0
    pairs: int = 0

    def add(self, seen: Examination) -> None:
        self.records += 1
        self.bad += bool(seen.problems)
        if not seen.problems:
            self.cut += seen.cut
            self.pairs += seen.pair
            self.pictures += seen.pictures
            self.tokens += seen.tokens
            self.longest = max(self.longest, seen.tokens)

    def table(self, max_length: int | None) -> Table:
        good = self.records - self.bad
        table = Table("", "", show_header=False)
        table.add_row("records", f"{self.records:,}")
        table.add_row("good", f"{good:,}")
        table.add_row("bad", f"{self.bad:,}")
        if self.pairs:
            table.add_row("with a rejected answer", f"{self.pairs:,}")
        table.add_row("pictures in good ones", f"{self.pictures:,}")
        table.add_row("tokens of good ones", f"{self.tokens:,}")
        table.add_row("longest", f"{self.longest:,} tokens")
        if max_length is not None:
            table.add_row(f"cut to {max_length:,}", f"{self.cut:,}")
        return table


def check(records: Records, processor: Processor, max_length: int | None, limit: int | None) -> Iterator[Examination]:
    """The examinations of the first `limit` records, those that cannot be read included."""
    for index in range(len(records) if limit is None else min(limit, len(records))):
        try:
            record = records[index]
        except RecordError as error:
            yield Examination([error.problem])
        else:
            yield examine(record, processor, max_length)


def validate(options: argparse.Namespace) -> int:
    """Prints every problem and a summary; returns the exit status."""
    folder = locate(options.checkpoint)
    processor = Processor.from_folder(folder, read_config(folder))
    summary = Summary()
    try:
        records = open_records(options.file, options.image_root)
    except RecordError as error:
        print(error)
        return 1
    count = len(records) if options.limit is None else min(options.limit, len(records))
    examined = check(records, processor, options.max_length, options.limit)
    console = Console(stderr=True)
    with Progress(
        console=console, transient=True, redirect_stdout=sys.stdout.isatty(), disable=not console.is_terminal
    ) as bar:
        for seen in bar.track(examined, total=count, description="checking"):
            for problem in seen.problems:
                print(problem)
            summary.add(seen)
    Console().print(summary.table(options.max_length))
    return 1 if summary.bad else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 all good, 1 bad records, 2 a mistake in the command itself."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Checks training records and names every bad one.")
    parser.add_argument("file", help="a file or folder of records, or tfds:NAME; docs/data.md shows the formats")
    parser.add_argument("--checkpoint", default="tiny", help="whose tokens are counted; default: %(default)s")
    parser.add_argument("--max-length", type=_positive, metavar="N", help="tokens of a record in training")
    parser.add_argument(
        "--image-root", metavar="DIR", help="where relative picture paths start; default: FILE's folder"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N records")
    try:
        return validate(parser.parse_args(arguments))
    except UserError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
