"""How long each record is: what packing must know before the first batch, measured once and kept in a file.

A record is measured by the check of `validate.py`, so one that cannot be trained on is found before the first step.
Which records go into which row is decided in `plan.py`.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwenvl_jax.config import UserError
from qwenvl_jax.data.mixture import Mixture
from qwenvl_jax.data.pipeline import ahead
from qwenvl_jax.data.problems import RecordError
from qwenvl_jax.data.records import Record
from qwenvl_jax.data.validate import Examination, examine
from qwenvl_jax.processing.processor import Processor

CHUNK = 64  # records that a worker measures at once
FEW = 4096  # records are measured without workers: to start them takes longer
_VERSION = "2"  # of what is measured; another one makes no use of older files


class Source(Protocol):
    """Random access to records, such as `Records` or a list. Bad ones may raise RecordError."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


class AllRecords:
    """The records of several sources, one source after another. Pickles where they do."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = list(sources)
        self.starts = np.cumsum([0, *(len(source) for source in self.sources)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sources[source][int(index - self.starts[source])]

    def passes(self, mixture: Mixture) -> Iterator[np.ndarray]:
        """For each epoch of a mixture of these sources, without end, int64 [R]: the indexes of its records in order."""
        for epoch in itertools.count():
            places = [mixture.locate(epoch * len(mixture) + number) for number in range(len(mixture))]
            yield np.array([self.starts[source] + item for source, item in places])


@dataclasses.dataclass(frozen=True)
class Measures:
    """Of R records, in the order of their source; all int32 [R].

    tokens: in all, 0 of a bad record. pictures: how many. needed: tokens that cutting must leave, and trained: the most
    that are learnt, see `Examination`. problems: what is wrong with each bad record, by its index.
    """

    tokens: np.ndarray
    pictures: np.ndarray
    needed: np.ndarray
    trained: np.ndarray
    problems: dict[int, str]


def measure(source: Source, processor: Processor, *, cache: Path | None = None, workers: int = 0) -> Measures:
    """The measures of all records of a source.

    cache: a file that remembers them; records and pictures that have not changed since are not read again. workers:
    processes that share the work of a large source.
    """
    vocabulary = _vocabulary_digest(processor)
    keys = [_key(source, index, vocabulary) for index in range(len(source))] if cache else []
    known = _read_cache(cache) if cache else {}
    table = np.zeros((len(source), 4), np.int32)
    unknown = [index for index in range(len(source)) if not keys or keys[index] not in known]
    for index in set(range(len(source))) - set(unknown):
        table[index] = known[keys[index]]
    problems: dict[int, str] = {}
    chunks = _Chunks(source, processor, unknown)
    for rows, wrong in ahead(chunks, first=0, workers=workers if len(unknown) > FEW else 0):
        table[rows[:, 0]] = rows[:, 1:]
        problems |= wrong
    if cache and unknown:
        _write_cache(cache, {key: table[i] for i, key in enumerate(keys) if key and i not in problems})
    tokens, pictures, needed, trained = (column.copy() for column in table.T)
    return Measures(tokens, pictures, needed, trained, problems)


class _Chunks:
    """A random-access source of measures: int32 [n, 5], index and measures, and problems by index."""

    def __init__(self, source: Source, processor: Processor, indexes: list[int]):
        self.source, self.processor, self.indexes = source, processor, indexes

    def __len__(self) -> int:
        return -(-len(self.indexes) // CHUNK)

    def __getitem__(self, number: int) -> tuple[np.ndarray, dict[int, str]]:
        rows, problems = [], {}
        for index in self.indexes[number * CHUNK : (number + 1) * CHUNK]:
            seen = self._examine(index)
            found = (0, 0, 0, 0) if seen.problems else (seen.tokens, seen.pictures, seen.needed, seen.trained)
            rows.append((index, *found))
            if seen.problems:
                problems[index] = str(seen.problems[0])
        return np.array(rows, np.int32).reshape(-1, 5), problems

    def _examine(self, index: int) -> Examination:
        try:
            return examine(self.source[index], self.processor)
        except RecordError as error:
            return Examination([error.problem])


def _vocabulary_digest(processor: Processor) -> bytes:
    digest = hashlib.sha256(f"{_VERSION} {processor.tokenizer.n_queries} {processor.training_form}".encode())
    for token, rank in sorted(processor.tokenizer.ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %s " % (rank, token))
    return digest.digest()


def _key(source: Source, index: int, vocabulary: bytes) -> bytes:
    """What the measures of a record depend on, as 16 bytes; empty where that cannot be told, or the record is bad."""
    try:
        record = source[index]
        text = json.dumps([record.messages, record.rejected], default=_content_digest)
        facts = [_file_facts(path) for path in _picture_files(record.messages)]
    except (UserError, TypeError, OSError, ValueError, KeyError, AttributeError):
        return b""
    return hashlib.blake2b(f"{text} {facts}".encode(), key=vocabulary, digest_size=16).digest()


def _content_digest(value: Any) -> str:
    """For json.dumps: what is no JSON. Pictures in memory that are not bytes have no digest."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    raise TypeError


def _picture_files(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    pictures = [part.get("image") or part["image_url"]["url"] for part in parts if "image" in part["type"]]
    return [os.fspath(x) for x in pictures if isinstance(x, str | os.PathLike) and ":" not in os.fspath(x)[:6]]


def _file_facts(path: str) -> tuple[int, int]:
    facts = os.stat(path)
    return facts.st_size, facts.st_mtime_ns


def _read_cache(path: Path) -> dict[bytes, np.ndarray]:
    try:
        with np.load(path) as stored:
            return {key.tobytes(): row for key, row in zip(stored["keys"], stored["measures"], strict=True)}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # absent or damaged: measure again
        return {}


def _write_cache(path: Path, measures: dict[bytes, np.ndarray]) -> None:
    """Writes the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = np.frombuffer(b"".join(measures), np.uint8).reshape(-1, 16)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial.npz")  # all hosts write it
    np.savez(temporary, keys=keys, measures=np.array(list(measures.values()), np.int32).reshape(-1, 4))
    temporary.replace(path)
