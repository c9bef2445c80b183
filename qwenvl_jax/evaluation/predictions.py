"""Files of predictions: a line that says how they were made, then a line for each sample, in the dataset's order.

While a run goes on its predictions are kept in the order in which they come, in a file beside (`Part`); whoever is
killed goes on from there, and the file that comes out is that of an undisturbed run, byte for byte. Several processes
have a part each, and the last one to finish puts them together.
"""

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.task import Prediction

Manifest = Mapping[str, Any]
_FIELDS = {field.name: field for field in dataclasses.fields(Prediction)}
_DEFAULTS = dataclasses.asdict(Prediction("", "", {}))


@dataclasses.dataclass(frozen=True)
class Shard:
    """The share of one of several processes: the samples from `share` on, all of like size but for one sample."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise UserError(f"shard {self.index} of {self.count}: shards are numbered from 0 to {self.count - 1}")

    @classmethod
    def of(cls, text: str) -> "Shard":
        """Of "2/8", the third of eight. Raises UserError."""
        try:
            index, count = map(int, text.split("/"))
        except ValueError:
            raise UserError(f"--shard {text}: write INDEX/COUNT, as 0/4 for the first of four") from None
        return cls(index, count)

    def share(self, total: int) -> range:
        """Which of `total` samples: contiguous, and the first shards have one more where they cannot be equal."""
        size, more = divmod(total, self.count)
        start = self.index * size + min(self.index, more)
        return range(start, start + size + (self.index < more))


def line(prediction: Prediction) -> str:
    """A prediction as JSON; fields that hold their default are left out."""
    values = dataclasses.asdict(prediction)
    kept = {name: value for name, value in values.items() if name in ("id", "reply") or value != _DEFAULTS[name]}
    return json.dumps(kept, ensure_ascii=False) + "\n"


def read_predictions(path: Path) -> tuple[Manifest, list[Prediction]]:
    """The manifest and the predictions of a file. Raises UserError that names the line which is none."""
    with _open(path) as lines:
        first = next(lines, "")
        manifest = _manifest(path, first)
        found, seen = [], set()
        for number, text in enumerate(lines, 2):
            prediction = _prediction(path, number, text)
            if prediction.id in seen:
                raise UserError(f"{path}, line {number}: {prediction.id} is there twice")
            seen.add(prediction.id)
            found.append(prediction)
    return manifest, found


def write_predictions(path: Path, manifest: Manifest, predictions: Iterable[Prediction]) -> None:
    """A file of predictions, whole or not at all."""
    _write_whole(path, manifest, map(line, predictions))


def _write_whole(path: Path, manifest: Manifest, lines: Iterable[str]) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(json.dumps({"manifest": manifest}, ensure_ascii=False) + "\n")
        file.writelines(lines)
    new.replace(path)


class Part:
    """The predictions that a process has made so far. Use it as a context; `append` from one thread at a time.

    path: where the whole is to be. Raises UserError where there are predictions made in another way than `manifest`
    says, unless they are to be overwritten.
    """

    def __init__(self, path: Path, manifest: Manifest, shard: Shard | None = None, overwrite: bool = False):
        self.path, self.manifest, self.shard = path, json.loads(json.dumps(manifest)), shard or Shard()
        self._part = self._name("part")
        path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for old in (path, self._part, self._name("done")):
                old.unlink(missing_ok=True)
        self.done: set[str] = set()
        for old in (path, self._name("done"), self._part):
            if old.exists() and not (old == self._part and self._cut()):
                self._check(old)
        if self._part.exists():
            self.done = {prediction.id for prediction in read_predictions(self._part)[1]}

    @property
    def complete(self) -> bool:
        """Whether there is nothing to be done, by this process at least."""
        return self.path.exists() or self._name("done").exists()

    def __enter__(self) -> "Part":
        new = not self._part.exists()
        self._file: TextIO = open(self._part, "a", encoding="utf-8")
        if new:
            self._write(json.dumps({"manifest": self.manifest}, ensure_ascii=False) + "\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, prediction: Prediction) -> None:
        """Keeps a prediction, whatever becomes of this process."""
        self._write(line(prediction))
        self.done.add(prediction.id)

    def finish(self, order: Sequence[str]) -> bool:
        """Puts the predictions in this order of ids; with those of all other shards, if they are there, into `path`.

        Returns whether the whole is there now.
        """
        if not self.complete:
            found = {prediction.id: prediction for prediction in read_predictions(self._part)[1]}
            self._replace(self._name("done"), (line(found[name]) for name in order))
            self._part.unlink()
        parts = [self._name("done", index) for index in range(self.shard.count)]
        if not self.path.exists() and all(part.exists() for part in parts):
            try:
                self._replace(self.path, (line(each) for part in parts for each in read_predictions(part)[1]))
            except UserError:
                if not self.path.exists():  # else another process was faster
                    raise
        if self.path.exists():
            for part in parts:
                part.unlink(missing_ok=True)
        return self.path.exists()

    def _name(self, state: str, index: int | None = None) -> Path:
        share = (
            "" if self.shard.count == 1 else f"-{self.shard.index if index is None else index}-of-{self.shard.count}"
        )
        return self.path.with_name(f"{self.path.name}.{state}{share}")

    def _cut(self) -> bool:
        """Removes the line that was being written when the last process ended. Whether nothing at all is left."""
        content = self._part.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            self._part.unlink()
        elif len(whole) < len(content):
            os.truncate(self._part, len(whole))
        return not whole

    def _check(self, old: Path) -> None:
        with _open(old) as lines:
            theirs = _manifest(old, next(lines, ""))
        for name in sorted({*theirs, *self.manifest}):
            ours, other = self.manifest.get(name), theirs.get(name)
            if ours != other:
                raise UserError(
                    f"{old} was made with {name} {json.dumps(other)}, and now it is {json.dumps(ours)}: "
                    "give another --output, or --overwrite to begin anew"
                )

    def _replace(self, path: Path, lines: Iterable[str]) -> None:
        _write_whole(path, self.manifest, lines)

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


class Pictures:
    """The pictures of predictions whose samples hold them as bytes: files in a folder, each once.

    path: of the predictions. folder: by default one beside them; several files of predictions may share one.
    """

    def __init__(self, path: Path, folder: Path | None = None):
        self._folder = folder or path.with_name(f"{path.stem}.pictures")
        self._name = os.path.relpath(self._folder, path.parent)

    def name(self, picture: Path | bytes) -> str:
        """Where a report finds a picture: its path, or a file name from the folder of the predictions on."""
        if isinstance(picture, Path):
            return str(picture)
        file = self._folder / hashlib.sha256(picture).hexdigest()[:24]
        if not file.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}")
            part.write_bytes(picture)
            part.replace(file)
        return f"{self._name}/{file.name}"


def _open(path: Path) -> TextIO:
    try:
        return open(path, encoding="utf-8", newline="\n")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; predictions come of evaluating a model") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _json(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number}: not an object")
    return value


def _manifest(path: Path, text: str) -> Manifest:
    manifest = _json(path, 1, text or "null").get("manifest") if text else None
    if not isinstance(manifest, dict):
        raise UserError(
            f'{path}, line 1: predictions begin with {{"manifest": {{...}}}}, which says how they were made'
        )
    return manifest


def _prediction(path: Path, number: int, text: str) -> Prediction:
    values = _json(path, number, text)
    for name in ("id", "reply"):
        if not isinstance(values.get(name), str):
            raise UserError(f"{path}, line {number}: {name} must be a string")
    unknown = sorted(values.keys() - _FIELDS)
    if unknown:
        raise UserError(f"{path}, line {number}: unknown field {unknown[0]}; there are {', '.join(_FIELDS)}")
    for name in ("reference", "groups"):
        if not isinstance(values.setdefault(name, {}), dict):
            raise UserError(f"{path}, line {number}: {name} must be an object")
    for name in ("likelihoods", "pictures"):
        values[name] = tuple(values.get(name, ()))
    return Prediction(**values)
