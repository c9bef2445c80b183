"""Training records from files: `open_records` gives random access to any of the formats of docs/data.md.

The readers of files are in `record_files.py`, the forms that a row may have in `record_forms.py`. Pictures are not
opened here; they stay what the message names, but for their size where a user's text holds a box.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from qwenvl_jax.config import UserError
from qwenvl_jax.data.problems import RecordError, record_error
from qwenvl_jax.data.record_files import BYTE_ORDER_MARK, ArrayRecordRows, JsonRows, TableRows, TfdsRows, head
from qwenvl_jax.data.record_forms import read_row

JSON_LINES = (".jsonl", ".ndjson")
ARRAY_RECORD = (".array_record", ".arrayrecord", ".riegeli")
SPLITS = ("train", "val", "dev", "test")  # how the names of data files begin


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation to learn from.

    messages: in the one message format (`processing/messages.py`), an optional system message first, an assistant
    message last; where: "file.json:12", its line or row in the file; rejected: the last answer that is liked less,
    for preference tuning; fields: what the file calls the content of each message ("conversations[0].value").
    """

    messages: list[dict[str, Any]]
    where: str
    rejected: str | None = None
    fields: tuple[str, ...] = ()


class Rows(Protocol):
    """What a reader of files offers. Pickles, for worker processes."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def where(self, index: int) -> str: ...


class Records:
    """Random access to the records in `rows`; `root` is where relative picture paths start.

    `records[index]` raises RecordError, a UserError, naming file, line and field of what cannot be read.
    """

    def __init__(self, rows: Rows, root: Path):
        self.rows = rows
        self.root = root

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        where = self.rows.where(index)
        try:
            row = read_row(self.rows[index], self.root)
        except RecordError as error:
            raise RecordError(dataclasses.replace(error.problem, where=where)) from None
        except RecursionError:
            raise record_error("", "nested too deeply", "mend or remove the record", where) from None
        return Record(row.messages, where, row.rejected, tuple(row.fields))


def open_records(spec: str, image_root: str | Path | None = None) -> Records:
    """The records of `spec`: a file, a folder of parquet, Arrow or ArrayRecord files, or "tfds:NAME".

    A folder or TFDS name may end in "#SPLIT", else its split is "train". Relative picture paths start at `image_root`,
    or at the file's folder. Raises UserError naming what cannot be read, and its kind RecordError where the content of
    a file is at fault.
    """
    if spec.startswith("tfds:"):
        name, _, split = spec.removeprefix("tfds:").partition("#")
        rows: Rows = TfdsRows(name, split or "train")
        folder = Path()
    else:
        rows, folder = _rows_of_path(spec)
    if not len(rows):
        raise record_error("", "holds no records", "give a file with at least one", spec)
    root = folder if image_root is None else Path(image_root).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of pictures; mend the image root")
    return Records(rows, root)


def _rows_of_path(spec: str) -> tuple[Rows, Path]:
    """The rows of a file or folder, and the folder that its relative paths start from."""
    path, split = Path(spec).expanduser(), ""
    if not path.exists() and "#" in spec:
        before, _, split = spec.rpartition("#")
        path = Path(before).expanduser()
    if path.is_dir():
        return _rows_of_folder(path, split), path
    if not path.is_file():
        raise UserError(f"{spec}: no such file; give a file or folder of records, or tfds:NAME")
    if split:
        raise UserError(f"{spec}: a file has no splits; leave out #{split}")
    return _rows_of_files([path]), path.parent


def _rows_of_files(paths: Sequence[Path]) -> Rows:
    """The reader for files of one kind, chosen by the first bytes and the name's ending."""
    first = paths[0]
    start = head(first, 4096)
    if start.startswith((b"PAR1", b"ARROW1")) or first.suffix in (".parquet", ".arrow"):
        return TableRows(paths)
    if first.suffix in ARRAY_RECORD or ".array_record-" in first.name:
        return ArrayRecordRows(paths)
    text = start.removeprefix(BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"[") and first.suffix not in JSON_LINES:
        return JsonRows(first, lines=False)
    if text.startswith(b"{") or first.suffix in (".json", *JSON_LINES):
        return JsonRows(first, lines=True)
    raise UserError(
        f"{first}: neither JSON, JSON lines, parquet, Arrow nor ArrayRecord; docs/data.md shows the formats"
    )


def _rows_of_folder(folder: Path, split: str) -> Rows:
    """The rows of a split of a Hugging Face dataset folder: `save_to_disk`'s, or parquet and the like as on the hub."""
    if (folder / "dataset_dict.json").is_file():
        inner = folder / (split or "train")
        if not (inner / "state.json").is_file():
            have = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
            raise UserError(f"{folder}: no split {inner.name!r}; name one of {have} as in FOLDER#NAME")
        return _rows_of_files(sorted(inner.glob("*.arrow")))
    for pattern in ("*.arrow", "*.parquet", "*.array_record*"):
        files = sorted(path for path in (*folder.glob(pattern), *folder.glob(f"data/{pattern}")) if path.is_file())
        if files:
            return _rows_of_files(_of_split(files, split, folder))
    raise UserError(f"{folder}: a folder without .parquet, .arrow or ArrayRecord files; name a file in it")


def _of_split(files: Sequence[Path], split: str, folder: Path) -> list[Path]:
    """The `files` of a split by the start of their names ("train-00000-of-00002.parquet"); all where none has one."""
    if not split and not any(path.name.startswith(SPLITS) for path in files):
        return list(files)
    chosen = [path for path in files if path.name.startswith(split or "train")]
    if not chosen:
        have = ", ".join(path.name for path in files[:5])
        raise UserError(f"{folder}: no file of the split {split or 'train'!r}; there are {have}, see FOLDER#SPLIT")
    return chosen
