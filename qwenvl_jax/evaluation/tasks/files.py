"""Files of benchmarks: which of several layouts is there, rows that say where they stand, and where pictures lie.

Everything that is missing or malformed raises UserError with file, line and field. Whether a picture can be opened is
no concern of a reader: it only says which one it is.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenvl_jax.config import UserError
from qwenvl_jax.evaluation.task import Reading, Sample

Pattern = str  # a path under the data folder, or one with * where any of several files may stand


@dataclasses.dataclass(frozen=True)
class Row:
    """A record of a file. where: "vqav2_val.jsonl, line 3", for errors."""

    where: str
    fields: Mapping[str, Any]

    def error(self, field: str, wrong: str) -> UserError:
        return UserError(f"{self.where}: field {field!r} {wrong}")

    def value(self, field: str) -> Any:
        """What stands in the field. Raises UserError where there is no such field, or nothing in it."""
        if self.fields.get(field) is None:
            raise self.error(field, f"is missing; there are {', '.join(map(repr, self.fields))}")
        return self.fields[field]

    def text(self, field: str, default: str | None = None) -> str:
        """The text of the field; `default`, where one is given, for a missing one."""
        if default is not None and self.fields.get(field) is None:
            return default
        value = self.value(field)
        if not isinstance(value, str):
            raise self.error(field, f"holds {_shown(value)}, not a text")
        return value

    def name(self, field: str) -> str:
        """An id: a text or a number, as text."""
        value = self.value(field)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.error(field, f"holds {_shown(value)}, not an id")
        return str(value)

    def integer(self, field: str) -> int:
        value = self.value(field)
        if isinstance(value, str) and value.strip().lstrip("-").isdigit():
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(field, f"holds {_shown(value)}, not a whole number")
        return value

    def numbers(self, field: str, count: int) -> list[float]:
        value = self.value(field)
        right = isinstance(value, list) and len(value) == count
        if not right or not all(isinstance(number, int | float) and math.isfinite(number) for number in value):
            raise self.error(field, f"holds {_shown(value)}, not {count} numbers")
        return [float(number) for number in value]

    def texts(self, field: str) -> list[str]:
        """A text, or a list of texts; numbers among them become text."""
        value = self.value(field)
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(item, str | int | float) for item in values):
            raise self.error(field, f"holds {_shown(value)}, not a text or a list of them")
        return [item if isinstance(item, str) else str(item) for item in values]

    def rows(self, field: str) -> "Iterator[Row]":
        """The records of a list that stands in the field."""
        value = self.value(field)
        if not isinstance(value, list):
            raise self.error(field, f"holds {_shown(value)}, not a list")
        for number, item in enumerate(value):
            yield as_row(f"{self.where}: {field}[{number}]", item)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def as_row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {_shown(value)} is not an object with fields")
    return Row(where, value)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason})") from None


def json_file(path: Path) -> Any:
    """The value in a JSON file."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def json_lines(path: Path) -> Iterator[Row]:
    """The records of a file with a JSON object in each line; blank lines do not count."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield json_line(f"{path}, line {number}", line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason})") from None


def json_line(where: str, line: str) -> Row:
    try:
        return as_row(where, json.loads(line))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None


class Pictures:
    """Finds the pictures that records name, under the first of several folders that has them, else the first of all.

    Names may begin with the "data/" of the original's files. Where one picture of a folder was found, the others are
    taken to be, so that a file of many records does not cost a look at the disk for each.
    """

    def __init__(self, *roots: Path):
        self.roots = roots
        self._found: dict[str, Path] = {}

    def __call__(self, name: str) -> Path:
        name = name.removeprefix("./").removeprefix("data/")
        folder = name.rpartition("/")[0]
        if folder not in self._found:
            root = next((root for root in self.roots if (root / name).exists()), None)
            if root is None:
                return self.roots[0] / name
            self._found[folder] = root
        return self._found[folder] / name


@dataclasses.dataclass(frozen=True)
class Source:
    """One way in which a split may lie in the data folder. read: from the data folder and the paths of `files`."""

    files: tuple[Pattern, ...]
    read: Callable[[Path, Sequence[Path]], Iterable[Any]]

    def missing(self, data: Path) -> list[str]:
        return [file for file in self.files if located(data, file) is None]

    def __call__(self, data: Path) -> Iterable[Any]:
        return self.read(data, [located(data, file) or data / file for file in self.files])


def located(data: Path, file: Pattern) -> Path | None:
    """The file or folder, if it is there."""
    if "*" in file:
        return next(iter(sorted(data.glob(file))), None)
    return data / file if (data / file).exists() else None


def choose(name: str, data: Path, sources: Sequence[Source], what: str = "") -> Source:
    """The first source that is all there. Raises UserError that names what is missing of the one nearest to it."""
    lacks = [source.missing(data) for source in sources]
    complete = [source for source, missing in zip(sources, lacks, strict=True) if not missing]
    if complete:
        return complete[0]
    if not data.is_dir():
        raise UserError(f"{data}: no such folder of data; {name} expects {sources[0].files[0]} in it")
    begun = [i for i, missing in enumerate(lacks) if len(missing) < len(sources[i].files)]
    nearest = begun[0] if begun else 0
    paths = _listed([str(data / file) for file in lacks[nearest]])
    others = [_listed(source.files) for i, source in enumerate(sources) if i != nearest]
    also = f" (or {', or '.join(others)})" if others else ""
    verb = "are" if len(lacks[nearest]) > 1 else "is"
    raise UserError(f"{paths}: {verb} missing{what}{also}; docs/evaluation.md says where {name} comes from")


def _listed(files: Sequence[str]) -> str:
    """The first two, and how many more."""
    more = f" and {len(files) - 2} more" if len(files) > 2 else ""
    return (", " if more else " and ").join(files[:2]) + more


def unique(read: Callable[[Path, Reading], Iterable[Sample]]) -> Callable[[Path, Reading], Iterator[Sample]]:
    """The same reader with ids made unique: the second sample of an id that a file uses twice becomes "id#2"."""

    def reader(data: Path, reading: Reading) -> Iterator[Sample]:
        seen: dict[str, int] = {}
        for sample in read(Path(data), reading):
            count = seen[sample.id] = seen.get(sample.id, 0) + 1
            yield sample if count == 1 else dataclasses.replace(sample, id=f"{sample.id}#{count}")

    return reader


def no_examples(name: str, reading: Reading) -> None:
    """Refuses worked examples for a task that has no training file to take them from."""
    if reading.few_shot:
        raise UserError(f"{name}: there is no training file to draw {reading.few_shot} worked examples from")
